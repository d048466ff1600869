"""accelerate and restore on Hugging Face's models, small and with random weights."""

import copy
import functools
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: pip install fastformer[transformers]")

import transformers
from support import needs_library

import fastformer
from fastformer import accuracy
from fastformer.benchmarks.bench_hugging_face import ARCHITECTURES, IMAGE, build_model, draw_inputs
from fastformer.integrations.transformers_config import ATTENTION, NAME
from fastformer.integrations.transformers_layers import LEFT, RECIPES

TOLERANCE = 2e-5  # of the largest value

#: What is swapped in each architecture.
SWAPPED = {
    "gpt2": {"GPT2LMHeadModel", "GPT2Attention", "GPT2MLP", "LayerNorm"},
    "bert": {"BertLayer", "BertSelfAttention", "BertSelfOutput", "BertOutput", "LayerNorm"},
    "roberta": {"RobertaLayer", "RobertaSelfAttention", "RobertaSelfOutput", "RobertaOutput", "LayerNorm"},
    "t5": {"T5Attention", "T5DenseActDense", "T5LayerNorm"},
    "bart": {"BartAttention", "LayerNorm"},
    "llama": {"LlamaForCausalLM", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm"},
    "qwen3": {"Qwen3ForCausalLM", "Qwen3Attention", "Qwen3MLP", "Qwen3RMSNorm"},
    "mistral": {"MistralForCausalLM", "MistralAttention", "MistralMLP", "MistralRMSNorm"},
    "gemma2": {"Gemma2Attention", "Gemma2MLP", "Gemma2RMSNorm"},
    "gpt_oss": {"GptOssAttention", "GptOssRMSNorm"},
    "vit": {"ViTAttention", "ViTMLP", "LayerNorm"},
}
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.fixture(params=["auto", pytest.param("cpu", marks=needs_library)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Asked for during the test; auto leaves tensors as small as here to torch."""
    with fastformer.backend(request.param):
        yield request.param


def kinds(model: torch.nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def assert_close(ours: Tensor, theirs: Tensor, what: str = "", *, scale: float | None = None) -> None:
    largest = theirs.abs().max() if scale is None else scale
    difference = (ours - theirs).abs().max()
    assert difference <= TOLERANCE * largest, f"{what} differs by {difference:.2e}, the largest value is {largest:.2e}"


def assert_same_step(ours: torch.nn.Module, theirs: torch.nn.Module, **inputs: Any) -> Any:
    """Equal loss and gradients; returns our output."""
    outputs = []
    for model in (ours, theirs):
        model.zero_grad()
        torch.manual_seed(0)
        outputs.append(model(**inputs))
        outputs[-1].loss.backward()
    assert outputs[0].loss.dtype == outputs[1].loss.dtype
    assert_close(outputs[0].loss, outputs[1].loss, "loss")
    largest = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            assert_close(a.grad, b.grad, f"gradient of {name}", scale=largest)
    return outputs[0]


def generated(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    prompt = {name: tensor for name, tensor in inputs.items() if not name.startswith("decoder")}
    return model.generate(**prompt, max_new_tokens=6, do_sample=False)


# --- the ten architectures


@each_architecture
def test_computes_the_same(name: str, backend: str) -> None:
    model = build_model(name)
    original = copy.deepcopy(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    report = fastformer.accelerate(model)
    assert {layer.kind for layer in report.swapped} == SWAPPED[name]
    assert {layer.name for layer in report.swapped} == {
        module_name for module_name, kind in kinds(original).items() if kind.__name__ in SWAPPED[name]
    }
    assert all(module is modules[module_name] for module_name, module in model.named_modules())
    now = dict(model.named_parameters(remove_duplicate=False))
    assert list(now) == list(parameters) and all(now[key] is parameters[key] for key in now)
    assert list(model.state_dict()) == list(original.state_dict())

    for padding in (None, "left", "right"):
        inputs = draw_inputs(name, padding=padding)
        with torch.inference_mode():
            ours, theirs = model(**inputs).logits, original(**inputs).logits
        if padding and ARCHITECTURES[name].kind != IMAGE and "decoder_input_ids" not in inputs:
            real = inputs["attention_mask"].bool()
            ours, theirs = ours[real], theirs[real]
        assert_close(ours, theirs, f"logits with padding {padding}")
        if ARCHITECTURES[name].generates and padding != "right":
            assert torch.equal(generated(model, inputs), generated(original, inputs))
    assert_same_step(model, original, **draw_inputs(name, padding="right", labels=True))


@each_architecture
def test_autocast(name: str, backend: str) -> None:
    model = build_model(name)
    original, inputs = copy.deepcopy(model), draw_inputs(name)
    fastformer.accelerate(model)
    with torch.inference_mode():
        exact = original(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = model(**inputs).logits, original(**inputs).logits
    assert ours.dtype == theirs.dtype
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


@each_architecture
def test_restore_gives_back(name: str) -> None:
    model, inputs = build_model(name), draw_inputs(name)
    before, logits = kinds(model), model(**inputs).logits
    attributes = {module_name: dict(vars(module)) for module_name, module in model.named_modules()}
    report = fastformer.accelerate(model)
    model(**inputs)
    if ARCHITECTURES[name].generates:
        generated(model, inputs)
    for restored in (len(report.swapped), 0):
        assert fastformer.restore(model) == restored
        assert kinds(model) == before
        for module_name, module in model.named_modules():
            assert vars(module).keys() == attributes[module_name].keys()
            for key, value in vars(module).items():
                assert value is attributes[module_name][key], f"{key} of {module_name}"
        assert torch.equal(model(**inputs).logits, logits)


@each_architecture
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(name: str, copied: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    model, inputs = build_model(name), draw_inputs(name)
    before = kinds(model)
    holders = [module for module in model.modules() if hasattr(module, "config")]
    configs = len({id(module.config) for module in holders})
    report = fastformer.accelerate(model)
    twin = copied(model)
    assert kinds(twin) == kinds(model) != before
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    assert fastformer.restore(twin) == len(report.swapped)
    assert kinds(twin) == before != kinds(model)
    assert len({id(module.config) for module in twin.modules() if hasattr(module, "config")}) == configs


@each_architecture
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model, inputs = build_model(name), draw_inputs(name)
    logits, original = model(**inputs).logits, type(model)
    fastformer.accelerate(model)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == [ARCHITECTURES[name].model]
    loaded = original.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, logits)
    through_ours = type(model).from_pretrained(tmp_path)
    fastformer.restore(through_ours)
    assert kinds(through_ours) == kinds(loaded)


# --- layers


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
    own = {f"{family}RMSNorm", f"{family}Attention"}
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


# --- unembedding and loss


@functools.cache
def causal_pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    options = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    model = build_model(name, **options).train()
    original = copy.deepcopy(model)
    fastformer.accelerate(model)
    return model, original


LABELS = draw_inputs("llama", labels=True)["labels"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": int(LABELS[0, 3])},
        {"shift_labels": LABELS.flip(0)},
        {"output_hidden_states": True, "use_cache": True},
        {"return_dict": True, "logits_to_keep": 0},
    ],
)
def test_fused_loss(name: str, extra: dict[str, Any], backend: str) -> None:
    model, original = causal_pair(name)
    inputs = draw_inputs(name, labels=True) | extra
    output = assert_same_step(model, original, **inputs)
    expected = original(**inputs)
    assert isinstance(output, type(expected)) and type(output).__name__ == type(expected).__name__
    assert [*output] == [key for key in expected if key != "logits"]
    copied = pickle.loads(pickle.dumps(output.__reduce__()[1][1]))
    for logits in (output.logits, output["logits"], output[1], output.to_tuple()[1], copied):
        assert_close(logits, expected.logits)
    assert len(output.to_tuple()) == len(expected.to_tuple())
    if "output_hidden_states" in extra:
        assert_close(output.hidden_states[-1], expected.hidden_states[-1])
    assert inspect.signature(model.forward) == inspect.signature(original.forward)


def test_late_logits() -> None:
    """They have gradients, are of the forward pass's autocast and weights, and aren't computed if they aren't read."""
    model, original = (copy.deepcopy(each) for each in causal_pair("llama"))
    inputs = draw_inputs("llama", labels=True)
    outputs = [each(**inputs) for each in (model, original)]
    grads = [
        torch.autograd.grad(y.logits.square().mean() + y.loss, each.lm_head.weight)[0]
        for y, each in zip(outputs, (model, original))
    ]
    assert_close(*grads)
    assert outputs[0].logits is outputs[0].logits
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [each(**inputs) for each in (model, original)]
    assert outputs[0].logits.dtype == outputs[1].logits.dtype == torch.bfloat16

    calls, output = [], model(**inputs)
    head = type(model.lm_head).forward
    model.lm_head.forward = lambda x: calls.append(1) or head(model.lm_head, x)
    output.loss.backward()
    assert dict(output).keys() == {"loss", "past_key_values"} and not calls
    assert output.logits is not None and calls == [1]
    del model.lm_head.forward

    output = model(**inputs)
    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(RuntimeError, match="lm_head has changed since the forward pass"):
        _ = output.logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fused_loss_in_low_precision(name: str) -> None:
    inputs = draw_inputs(name, labels=True)
    model, original = (copy.deepcopy(each).bfloat16() for each in causal_pair(name))
    loss, expected = model(**inputs).loss, original(**inputs).loss
    exact = causal_pair(name)[1](**inputs).loss
    assert loss.dtype == expected.dtype == torch.float32
    assert (loss - exact).abs() <= 2 * (expected - exact).abs() + 2e-3
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = (each(**inputs).loss for each in causal_pair(name))
    assert loss.dtype == expected.dtype == torch.float32
    assert (loss - exact).abs() <= 2 * (expected - exact).abs() + 2e-3


class Head(torch.nn.Linear):
    pass


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("change", "extra"),
    [
        (lambda model: model.eval(), {}),
        (lambda model: model.requires_grad_(False) and torch.set_grad_enabled(False), {}),
        (lambda model: None, {"labels": None}),
        (lambda model: None, {"return_dict": False}),
        (lambda model: None, {"logits_to_keep": 3, "labels": LABELS[:, -3:]}),
        (lambda model: model.lm_head.register_forward_hook(lambda *_: None), {}),
        (lambda model: setattr(model.lm_head, "__class__", Head), {}),
        (lambda model: setattr(model, "loss_function", lambda logits, labels, **_: logits.sum()), {}),
    ],
)
def test_original_loss(name: str, change: Callable[[torch.nn.Module], Any], extra: dict[str, Any]) -> None:
    """Where the loss alone would not do, or not be the same, the original's forward runs."""
    pair = [copy.deepcopy(each) for each in causal_pair(name)]
    inputs = draw_inputs(name, labels=True) | extra
    try:
        for model in pair:
            change(model)
        ours, theirs = (model(**inputs) for model in pair)
    finally:
        torch.set_grad_enabled(True)
    assert len(ours) == len(theirs)
    if isinstance(theirs, tuple):
        ours, theirs = ours[1], theirs[1]
    else:
        ours, theirs = ours.logits, theirs.logits
    assert_close(ours, theirs)


# --- configs


def test_a_config_may_be_shared() -> None:
    first = build_model("llama")
    config = first.config
    second = transformers.LlamaForCausalLM(config).eval()
    wrapper = torch.nn.ModuleDict({"first": first, "norm": torch.nn.LayerNorm(4)})
    wrapper.config = config
    before, output = config.to_dict(), second(**draw_inputs("llama")).logits
    fastformer.accelerate(wrapper)
    assert second.config is config and config._attn_implementation == "sdpa" and config.to_dict() == before
    assert all(not any("fastformer" in key for key in vars(module)) for module in second.modules())
    assert torch.equal(second(**draw_inputs("llama")).logits, output)
    configs = {id(module.config) for module in wrapper.modules() if hasattr(module, "config")}
    assert configs == {id(wrapper.config)} != {id(config)}
    assert wrapper.config._attn_implementation == NAME
    fastformer.restore(wrapper)
    assert wrapper.config is first.config is first.model.layers[0].self_attn.config is config


def test_configs_inside_configs() -> None:
    text, vision = build_model("llama"), build_model("vit")
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision.config, text.config)
    config.text_config, config.vision_config = text.config, vision.config
    model = torch.nn.ModuleList([text, vision])
    model.config = config
    fastformer.accelerate(model, skip="0.model.layers.1.self_attn")
    attention = [layer.self_attn for layer in text.model.layers]
    assert [x.config._attn_implementation for x in attention] == [NAME, "sdpa"]
    assert text.config is attention[1].config and text.config._attn_implementation == "sdpa"
    assert model.config is not config and model.config.vision_config is vision.config
    assert vision.config._attn_implementation == NAME and config.vision_config._attn_implementation == "sdpa"
    fastformer.restore(model)
    assert model.config is config and model.config.text_config is attention[0].config is text.config
    assert model.config.vision_config is vision.config and vision.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bart"])
def test_only_and_skip(name: str) -> None:
    model = build_model(name)
    original, config = copy.deepcopy(model), model.config
    attention = [n for n, kind in kinds(model).items() if kind.__name__ in ATTENTION]
    report = fastformer.accelerate(model, only=attention[0])
    assert [layer.name for layer in report.swapped] == attention[:1]
    assert model.config is config is model.get_submodule(attention[1]).config
    assert model.get_submodule(attention[0]).config._attn_implementation == NAME
    inputs = draw_inputs(name, padding="left")
    real = slice(None) if "decoder_input_ids" in inputs else inputs["attention_mask"].bool()
    assert_close(model(**inputs).logits[real], original(**inputs).logits[real])
    report = fastformer.accelerate(model, skip=type(model.base_model))
    assert all(layer.kind == type(model).__name__ for layer in report.swapped)
    fastformer.accelerate(model)
    assert model.config is not config and model.config._attn_implementation == NAME
    assert_close(model(**inputs).logits[real], original(**inputs).logits[real])
    fastformer.restore(model)
    assert kinds(model) == kinds(original) and model.config is config
    assert all(model.get_submodule(n).config is config for n in attention)


def test_the_base_model_alone() -> None:
    model = build_model("llama").train()
    report = fastformer.accelerate(model, only="model")
    assert {layer.kind for layer in report.swapped} == SWAPPED["llama"] - {"LlamaForCausalLM"}
    assert "logits" in dict(model(**draw_inputs("llama", labels=True)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bart"])
def test_what_was_changed_in_a_config_stays(name: str) -> None:
    """As it would in the original, and what another model's owner changed there meanwhile stays too."""
    model = build_model(name).train()
    config = model.config
    fastformer.accelerate(model)
    model.resize_token_embeddings(70)
    model.config.use_cache = False
    model.config.mine = {"some": "thing"}
    config.theirs = 3
    fastformer.restore(model)
    assert model.config is config and config._attn_implementation != "fastformer"
    assert (config.vocab_size, config.use_cache, config.mine, config.theirs) == (70, False, {"some": "thing"}, 3)
    inputs = {
        key: x.clamp(max=69) if x.dtype == torch.int64 else x for key, x in draw_inputs(name, labels=True).items()
    }
    assert model(**inputs).loss.isfinite()
    fastformer.accelerate(model)
    model.set_attn_implementation("eager")
    fastformer.restore(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "options", "change", "kind", "reason"),
    [
        ("llama", {"attn_implementation": "eager"}, None, "LlamaAttention", "is 'eager', not the default"),
        ("llama", {"attn_implementation": "flex_attention"}, None, "LlamaAttention", "'flex_attention'"),
        ("gemma2", {"output_attentions": True}, None, "Gemma2Attention", "asks for the attention weights"),
        ("gemma2", {}, None, "Gemma2ForCausalLM", "softcapped"),
        ("gpt_oss", {}, None, "GptOssForCausalLM", "router"),
        ("gpt_oss", {}, None, "GptOssExperts", "no experts"),
        ("bart", {}, None, "BartDecoderLayer", "part of a longer forward"),
        ("bert", {}, None, "BertForMaskedLM", "part of a longer forward"),
        ("llama", {}, lambda m: setattr(m, "loss_function", max), "LlamaForCausalLM", "loss function was replaced"),
        ("llama", {}, lambda m: setattr(m, "lm_head", Head(64, 99)), "LlamaForCausalLM", "no plain torch.nn.Linear"),
        ("llama", {}, lambda m: setattr(m.model.norm, "forward", abs), "LlamaRMSNorm", "forward was replaced"),
        ("llama", {}, lambda m: fastformer.accelerate(m), "LlamaForCausalLM", "fastformer's already"),
        ("llama", {}, lambda m: fastformer.accelerate(m), "LlamaAttention", "fastformer's already"),
        ("llama", {}, None, "Linear", "no such layer"),
    ],
)
def test_reasons(
    name: str, options: dict[str, Any], change: Callable[[torch.nn.Module], Any] | None, kind: str, reason: str
) -> None:
    model = build_model(name, **options)
    if change is not None:
        change(model)
    before = kinds(model)
    planned = fastformer.accelerate(model, dry_run=True)
    assert kinds(model) == before
    report = fastformer.accelerate(model)
    assert (planned.swapped, planned.left) == (report.swapped, report.left)
    assert [layer for layer in report.left if layer.kind == kind and reason in layer.reason]
    assert reason in str(report) and "swapped" in str(report)


# --- nothing else changes


def test_the_library_stays() -> None:
    def everything() -> dict[str, dict[str, Any]]:
        modules = {name: module for name, module in sys.modules.items() if name.startswith("transformers.models.llama")}
        found = {name: dict(vars(module)) for name, module in modules.items()}
        for module in modules.values():
            found |= {str(x): dict(vars(x)) for x in vars(module).values() if isinstance(x, type)}
        return found

    build_model("llama")(**draw_inputs("llama"))
    before = everything()
    model = build_model("llama")
    fastformer.accelerate(model)
    model(**draw_inputs("llama"))
    fastformer.restore(model)
    assert everything() == before


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_compile_and_checkpointing(name: str) -> None:
    dropout = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    pair = causal_pair(name) if name != "bert" else [build_model(name, **dropout).train() for _ in range(2)]
    model, original = (copy.deepcopy(each) for each in pair)
    fastformer.accelerate(model)
    inputs = draw_inputs(name, labels=True)
    assert_same_step(torch.compile(model, backend="aot_eager", fullgraph=True), original, **inputs)
    model.gradient_checkpointing_enable()
    assert_same_step(model, original, **inputs)


def test_in_a_fresh_process(tmp_path: Path) -> None:
    """transformers is imported by those who need it, and an unpickled model knows fastformer's attention."""
    model = build_model("bart")  # in which attention alone is transformers'
    inputs = draw_inputs("bart")
    fastformer.accelerate(model)
    torch.save((model, inputs, model(**inputs).logits), tmp_path / "model.pt")
    program = f"""
import sys, torch, fastformer
fastformer.restore(torch.nn.LayerNorm(4))
fastformer.accelerate(torch.nn.LayerNorm(4))
assert "transformers" not in sys.modules
model, inputs, logits = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
torch.testing.assert_close(model(**inputs).logits, logits)
assert fastformer.restore(model)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
