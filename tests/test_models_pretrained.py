"""Checkpoints of transformers' GPT-2, Llama and BERT give the same numbers here, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: pip install fastformer[transformers]")

import safetensors.torch
import transformers

from fastformer.models import BERT, GPT, BERTConfig, GPTConfig, RotaryScaling
from fastformer.models.layouts import layout_to_write

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 2e-5  # of the largest value

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
GPT2 = {"vocab_size": 61, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**SIZES, "vocab_size": 61, "intermediate_size": 48, "num_key_value_heads": 2}
BERT_SIZES = {**SIZES, "vocab_size": 61, "intermediate_size": 48}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

CAUSAL = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "gpt2 untied, relu": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**GPT2, tie_word_embeddings=False, activation_function="relu", n_inner=40)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "llama scaled, tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, rope_parameters=SCALED, tie_word_embeddings=True)
    ),
}
BERTS = {
    "pretraining": transformers.BertForPreTraining,
    "masked": transformers.BertForMaskedLM,
    "classes": transformers.BertForSequenceClassification,
    "base": transformers.BertModel,
}


def randomised(theirs: torch.nn.Module) -> torch.nn.Module:
    """Weights larger than transformers' first ones, so that every part has a say, in evaluation mode."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.set_attn_implementation("eager")
    return theirs.eval()


def bert(name: str, **options: Any) -> torch.nn.Module:
    return randomised(BERTS[name](transformers.BertConfig(**BERT_SIZES, num_labels=3, **options)))


def assert_close(ours: Tensor, theirs: Tensor, what: str, *, scale: float | None = None) -> None:
    largest = theirs.abs().max().item() if scale is None else scale
    difference = (ours - theirs).abs().max().item()
    assert difference <= TOLERANCE * largest, f"{what} differs by {difference:.2e}, the largest value is {largest:.2e}"


def assert_same_gradients(ours: GPT | BERT, theirs: torch.nn.Module) -> None:
    expected = dict(theirs.named_parameters())
    base = "" if any(name.startswith(("transformer.", "model.", "bert.")) for name in expected) else "bert."
    expected = {base + name: p.grad for name, p in expected.items()}
    scale = max(grad.abs().max().item() for grad in expected.values() if grad is not None)
    parameters = dict(ours.named_parameters())
    for piece in layout_to_write(ours.config).pieces(ours.config):
        whole = parameters.pop(piece.ours).grad
        for name, part in zip(piece.theirs, whole.split(piece.sizes or [len(whole)]), strict=True):
            assert_close(part.t() if piece.transposed else part, expected[name], f"gradient of {name}", scale=scale)
    assert not parameters


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 61, (3, 20))


@pytest.mark.parametrize("name", CAUSAL)
def test_gpt_gives_the_same_logits_and_gradients_and_saves_them(name: str, tokens: Tensor, tmp_path: Path) -> None:
    theirs = randomised(CAUSAL[name]())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert not ours.training
    expected = theirs(tokens).logits
    assert_close(ours(tokens), expected, "logits")

    theirs(tokens, labels=tokens).loss.backward()
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert_close(loss, theirs.loss_function(expected, tokens, vocab_size=61), "loss")
    assert_same_gradients(ours, theirs)

    ours.save_pretrained(tmp_path / "ours")
    back = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert_close(back(tokens).logits, expected, "logits of what was saved")
    assert GPT.from_pretrained(tmp_path / "ours").config == ours.config


def test_generation_is_transformers_own(tokens: Tensor, tmp_path: Path) -> None:
    theirs = randomised(CAUSAL["llama scaled, tied"]())
    theirs.save_pretrained(tmp_path)
    expected = theirs.generate(tokens[:, :8], max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert torch.equal(GPT.from_pretrained(tmp_path).generate(tokens[:, :8], 16, temperature=0), expected)


@pytest.mark.parametrize("name", BERTS)
def test_bert_gives_the_same_outputs_and_gradients_and_saves_them(name: str, tokens: Tensor, tmp_path: Path) -> None:
    theirs = bert(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BERT.from_pretrained(tmp_path / "theirs")
    mask = torch.arange(20) < torch.tensor([[20], [7], [1]])
    segments = torch.randint(2, tokens.shape)
    inputs = {"input_ids": tokens, "attention_mask": mask.long(), "token_type_ids": segments}
    options = {"tokens_mask": mask, "segments": segments}

    def outputs(model: BERT) -> tuple[Tensor, ...]:
        if name == "masked":
            return (model(tokens, **options),)
        if name == "classes":
            return (model.classify(tokens, **options),)
        features = model.features(tokens, **options)
        pooled = model.pool(features)
        return (features, pooled) if name == "base" else (model(tokens, **options), model.next_sentence(pooled))

    expected = theirs(**inputs).to_tuple()
    found = outputs(ours)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, "output")
    weights = [torch.randn_like(x) * (mask[..., None] if x.dim() == 3 else 1) for x in expected]
    for tensors in (found, expected):
        sum((x * weight).sum() for x, weight in zip(tensors, weights)).backward()
    assert_same_gradients(ours, theirs)

    ours.save_pretrained(tmp_path / "ours")
    back = type(theirs).from_pretrained(tmp_path / "ours").eval()
    for a, b in zip(back(**inputs).to_tuple(), expected, strict=True):
        assert_close(a, b, "output of what was saved")
    assert BERT.from_pretrained(tmp_path / "ours").config == ours.config


def test_bert_losses_are_transformers(tokens: Tensor, tmp_path: Path) -> None:
    theirs = bert("masked")
    theirs.save_pretrained(tmp_path / "masked")
    targets = torch.where(torch.rand(tokens.shape) < 0.3, tokens, -100)
    loss = BERT.from_pretrained(tmp_path / "masked")(tokens, targets)
    assert_close(loss, theirs(tokens, labels=targets).loss, "masked loss")

    theirs = bert("classes")
    theirs.save_pretrained(tmp_path / "classes")
    classes = torch.tensor([0, 2, 1])
    loss = BERT.from_pretrained(tmp_path / "classes").classify(tokens, classes)
    assert_close(loss, theirs(tokens, labels=classes).loss, "classification loss")


def test_bert_with_names_of_tensorflows_first(tokens: Tensor, tmp_path: Path) -> None:
    theirs = bert("masked")
    theirs.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, was in old.items():
            name = name.replace(new, was)
        renamed[name] = tensor
    assert any(name.endswith("gamma") for name in renamed)
    renamed["bert.embeddings.position_ids"] = torch.arange(32)[None]
    renamed["cls.predictions.decoder.weight"] = renamed["bert.embeddings.word_embeddings.weight"].clone()
    renamed["cls.predictions.decoder.bias"] = renamed["cls.predictions.bias"].clone()
    safetensors.torch.save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    ours = BERT.from_pretrained(tmp_path)
    assert_close(ours(tokens), theirs(tokens).logits, "logits")


def test_checkpoint_in_several_files(tokens: Tensor, tmp_path: Path) -> None:
    theirs = randomised(CAUSAL["llama"]())
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = GPT.from_pretrained(tmp_path)
    assert_close(ours(tokens), theirs(tokens).logits, "logits")
    ours.save_pretrained(tmp_path)  # over it: the index would lead to the old files
    assert not (tmp_path / "model.safetensors.index.json").exists()
    next(tmp_path.glob("model-*")).unlink()
    theirs.save_pretrained(tmp_path / "other", max_shard_size="20KB")
    lost = next((tmp_path / "other").glob("model-*"))
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        GPT.from_pretrained(tmp_path / "other")


def test_checkpoint_without_heads_and_with_old_constants(tokens: Tensor, tmp_path: Path) -> None:
    theirs = randomised(CAUSAL["gpt2"]())
    theirs.transformer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    assert "wte.weight" in tensors
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert_close(GPT.from_pretrained(tmp_path)(tokens), theirs(tokens).logits, "logits")


@pytest.mark.parametrize("rope", [{"rope_theta": 500.0}, {"rope_theta": 500.0, "rope_scaling": SCALED}])
def test_llama_config_of_transformers_4(rope: dict[str, Any], tmp_path: Path) -> None:
    CAUSAL["llama"]().save_pretrained(tmp_path)
    edit(tmp_path, lambda settings: settings.pop("rope_parameters") and settings.update(rope))
    config = GPT.from_pretrained(tmp_path).config
    assert config.rotary_base == 500.0
    scaling = RotaryScaling(8.0, 1.0, 4.0, 16) if "rope_scaling" in rope else None
    assert config.rotary_scaling == scaling


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_dtype(dtype: torch.dtype | None, tokens: Tensor, tmp_path: Path) -> None:
    theirs = CAUSAL["llama"]().half()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype or torch.float16}
    assert torch.equal(ours.token_embedding.weight, theirs.model.embed_tokens.weight.to(dtype or torch.float16))
    assert ours.rotary.cos.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.rotary.cos[0, 0] == 1.0


# What is refused


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    CAUSAL["gpt2"]().save_pretrained(folder / "gpt2")
    CAUSAL["llama"]().save_pretrained(folder / "llama")
    bert("masked").save_pretrained(folder / "bert")
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gpt2", "model_type", "t5"),
        ("gpt2", "is_causal", False),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "activation_function", "quick_gelu"),
        ("gpt2", "quantization_config", {"bits": 4}),
        ("gpt2", "resid_pdrop", 2.0),
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("llama", "head_dim", 16),
        ("llama", "hidden_act", "relu"),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        ("llama", "rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("bert", "model_type", "roberta"),
        ("bert", "is_decoder", True),
        ("bert", "tie_word_embeddings", False),
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "problem_type", "regression"),
        ("bert", "vocab_size", "many"),
    ],
)
def test_refuses_a_config(family: str, key: str, value: object, stored: Path, tmp_path: Path) -> None:
    folder = copy_of(stored / family, tmp_path / "copy")
    edit(folder, lambda settings: settings.update({key: value}))
    wanted = {"rope_parameters": "rope_type|lacks factor", "resid_pdrop": "dropout"}.get(key, key)
    with pytest.raises(ValueError, match=rf"copy: .*({wanted})"):
        (BERT if family == "bert" else GPT).from_pretrained(folder)


def test_refuses_another_kind_of_model(stored: Path) -> None:
    with pytest.raises(ValueError, match="model_type is 'bert', must be 'gpt2' or 'llama'"):
        GPT.from_pretrained(stored / "bert")
    with pytest.raises(ValueError, match="model_type is 'llama', must be 'bert'"):
        BERT.from_pretrained(stored / "llama")


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(31)


def untie(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.h.0.ln_1.weight"].add_(1)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1


@pytest.mark.parametrize(
    ("family", "change", "problem"),
    [
        ("llama", lambda x: x.pop("lm_head.weight"), "lacks the tensor lm_head.weight"),
        ("llama", lambda x: x.update(extra=torch.ones(1)), "has the tensor extra, for which"),
        ("llama", reshape, r"tensor model.norm.weight has shape \(31,\), must be \(32,\)"),
        ("llama", lambda x: x.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "has a tensor of I8"),
        ("llama", lambda x: x.update({"model.norm.weight": torch.ones(32).half()}), "dtype is None, must be given"),
        ("gpt2", untie, "lm_head.weight differs from the one that it is tied to"),
        ("bert", lambda x: x.pop("bert.encoder.layer.1.output.dense.bias"), "lacks the tensor bert.encoder.layer.1"),
    ],
)
def test_refuses_tensors(
    family: str, change: Callable[[dict[str, Tensor]], object], problem: str, stored: Path, tmp_path: Path
) -> None:
    folder = copy_of(stored / family, tmp_path / "copy")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=problem):
        (BERT if family == "bert" else GPT).from_pretrained(folder)


def test_refuses_missing_and_damaged_files(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        GPT.from_pretrained(tmp_path)
    folder = copy_of(stored / "gpt2", tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        GPT.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor"):
        GPT.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(ValueError, match="must be one in the same folder"):
        GPT.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (GPTConfig(61, positions="sinusoidal"), "positions is 'sinusoidal', must be 'learned' for gpt2"),
        (GPTConfig(61, num_kv_heads=2), "kv_heads is 2, must be 6 for gpt2"),
        (GPTConfig(61, positions="rotary", norm="rms_norm"), "bias is True, must be False for llama"),
        (BERTConfig(61, norm_first=True), "norm_first is True, must be False for bert"),
        (BERTConfig(61, tied_unembedding=False), "tied_unembedding is False, must be True for bert"),
        (BERTConfig(61, num_segments=0), "num_segments is 0"),
        (BERTConfig(61, dropout=0.1), "embedding_dropout is 0.0, must be dropout, 0.1"),
    ],
)
def test_refuses_to_save_what_the_layout_lacks(config: GPTConfig | BERTConfig, problem: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = (BERT if isinstance(config, BERTConfig) else GPT)(config)
    with pytest.raises(ValueError, match=problem):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
