"""accelerate on the single layers of Hugging Face's models: norms, feed-forward layers, residual norms."""

import copy
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers_support import assert_close, assert_same_step

import fastformer
from fastformer import accuracy
from fastformer.benchmarks.bench_hugging_face import ARCHITECTURES, build_model, draw_inputs
from fastformer.integrations.transformers_config import ATTENTION
from fastformer.integrations.transformers_layers import LEFT, RECIPES

NORMS = [name for name in RECIPES if name.endswith(("RMSNorm", "T5LayerNorm"))]


def find(name: str) -> type[torch.nn.Module]:
    """transformers' class."""
    for family in {name.rpartition(".")[2] for name in FAMILIES}:
        kind = getattr(sys.modules[f"transformers.models.{family}.modeling_{family}"], name, None)
        if kind is not None:
            return kind
    raise AssertionError(f"transformers has no {name}")


FAMILIES = [*ARCHITECTURES, "gemma", "gemma3", "mixtral", "qwen2"]


@pytest.fixture(autouse=True, scope="module")
def _import_families() -> None:
    for family in FAMILIES:
        __import__(f"transformers.models.{family}.modeling_{family}")


def test_known_classes_are_there() -> None:
    for name in (*RECIPES, *ATTENTION, *LEFT):
        assert issubclass(find(name), torch.nn.Module)
    for name, recipe in RECIPES.items():
        assert callable(getattr(find(name), recipe.method))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
def test_norms(name: str, dtypes: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    norm = find(name)(40).to(dtypes[1])
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 40).to(dtypes[0])
    peer, exact = norm(x), copy.deepcopy(norm).double()
    truth = torch.nn.functional.rms_norm(
        x.double(), (40,), exact.weight + (1 if name.startswith("Gemma") else 0), getattr(norm, "eps", 1e-6)
    )
    fastformer.accelerate(norm)
    ours = norm(x)
    assert ours.dtype == peer.dtype
    assert accuracy.judge(ours, peer, truth, factor=accuracy.FORWARD_FACTOR).ok


@pytest.mark.parametrize("family", ["Gemma", "Gemma3", "Mixtral", "Qwen2"])
def test_relatives(family: str, backend: str) -> None:
    """Families that are not among the architectures."""
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=6,
        pad_token_id=0,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    original = copy.deepcopy(model)
    report = fastformer.accelerate(model)
    own = {f"{family}RMSNorm", f"{family}Attention", "Linear"}
    own |= set() if family == "Mixtral" else {f"{family}MLP", f"{family}ForCausalLM"}
    assert {layer.kind for layer in report.swapped} == own
    output = assert_same_step(model, original, **draw_inputs("llama", padding="right", labels=True))
    assert ("logits" in dict(output)) == (family == "Mixtral")


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("t5", {"feed_forward_proj": "gated-gelu"}, "T5DenseGatedActDense"),
        ("bert", {"chunk_size_feed_forward": 1, "hidden_act": "gelu_new"}, "BertLayer"),
        ("bert", {"hidden_act": "tanh"}, "BertLayer"),  # an activation that the fused feed-forward doesn't have
        ("llama", {"mlp_bias": True}, "LlamaMLP"),  # nor a bias of the gate
        ("gpt2", {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True}, "GPT2MLP"),
    ],
)
def test_options(name: str, options: dict[str, Any], kind: str, backend: str) -> None:
    model = build_model(name, **options)
    original = copy.deepcopy(model)
    report = fastformer.accelerate(model)
    assert kind in {layer.kind for layer in report.swapped}
    inputs = {key: tensor.repeat(6, 1) for key, tensor in draw_inputs(name, labels=True).items()}  # enough for GPT-2
    assert_same_step(model, original, **inputs)


def test_cross_attention() -> None:
    model = build_model("bert", is_decoder=True, add_cross_attention=True)
    original, inputs = copy.deepcopy(model), draw_inputs("bert")
    report = fastformer.accelerate(model)
    assert "BertCrossAttention" in {layer.kind for layer in report.swapped}
    inputs["encoder_hidden_states"] = torch.randn(2, 5, 64)
    assert_close(model(**inputs).logits, original(**inputs).logits)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.3}),
        ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.3, "embd_pdrop": 0.3}),
        ("vit", {"hidden_dropout_prob": 0.3}),
    ],
)
def test_dropout_draws_the_same(name: str, options: dict[str, float]) -> None:
    model = build_model(name, **options).train()
    original = copy.deepcopy(model)
    fastformer.accelerate(model)
    assert_same_step(model, original, **draw_inputs(name, labels=True))


@pytest.mark.parametrize(
    ("name", "layer", "part"),
    [
        ("llama", "model.layers.0.mlp", "up_proj"),
        ("llama", "model.layers.0.mlp", "act_fn"),
        ("bert", "bert.encoder.layer.0", "output"),
        ("bert", "bert.encoder.layer.0", "intermediate.dense"),
        ("bert", "bert.encoder.layer.0", "output.LayerNorm"),
        ("gpt2", "transformer.h.0.mlp", "c_fc"),
        ("t5", "encoder.block.0.layer.1.DenseReluDense", "wi"),
        ("vit", "vit.layers.0.mlp", "fc1"),
    ],
)
def test_hooks_and_replaced_parts_are_called(name: str, layer: str, part: str) -> None:
    model = build_model(name)
    fastformer.accelerate(model)
    inputs = {key: tensor.repeat(5, *[1] * (tensor.dim() - 1)) for key, tensor in draw_inputs(name).items()}
    fired: list[str] = []
    child = model.get_submodule(f"{layer}.{part}")
    handle = child.register_forward_hook(lambda *_: fired.append("hook"))
    model(**inputs)
    handle.remove()
    holder = model.get_submodule(f"{layer}.{part}".rpartition(".")[0])

    class Replacement(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            fired.append("replaced")
            return child(*args)

    setattr(holder, part.rpartition(".")[2], Replacement())
    model(**inputs)
    assert fired == ["hook", "replaced"]
