"""What from_pretrained and save_pretrained refuse, and how they say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: pip install fastformer[transformers]")

import safetensors.torch
from pretrained_support import CAUSAL, bert, edit

from fastformer.models import BERT, GPT, BERTConfig, GPTConfig


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
        ("gpt2", "n_head", 0),
        ("gpt2", "layer_norm_epsilon", None),
        ("gpt2", "tie_word_embeddings", "yes"),
        ("gpt2", "activation_function", ["gelu"]),
        ("llama", "num_attention_heads", 0),
        ("llama", "num_attention_heads", "4"),
        ("llama", "num_key_value_heads", 2.0),
        ("llama", "hidden_size", None),
        ("llama", "rope_parameters", [1]),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": None}),
        ("bert", "type_vocab_size", "2"),
        ("bert", "architectures", ["BertForTokenClassification"]),
        ("bert", "architectures", ["BertForMultipleChoice"]),
    ],
)
def test_refuses_a_config(family: str, key: str, value: object, stored: Path, tmp_path: Path) -> None:
    folder = copy_of(stored / family, tmp_path / "copy")
    edit(folder, lambda settings: settings.update({key: value}))
    wanted = {"rope_parameters": r"rope_type|lacks factor|rope_theta|rope_parameters is \[1\]"}.get(key, key)
    with pytest.raises(ValueError, match=rf"copy: .*({wanted})"):
        (BERT if family == "bert" else GPT).from_pretrained(folder)


def test_refuses_another_kind_of_model(stored: Path) -> None:
    with pytest.raises(ValueError, match="model_type is 'bert', must be 'gpt2' or 'llama'"):
        GPT.from_pretrained(stored / "bert")
    with pytest.raises(ValueError, match="model_type is 'llama', must be 'bert'"):
        BERT.from_pretrained(stored / "llama")


@pytest.mark.parametrize(
    ("dtype", "error", "problem"),
    [
        ("bfloat16", TypeError, "^dtype is a str, must be a torch.dtype or None"),
        (torch.int64, ValueError, r"^dtype is torch\.int64, must be one of torch\.float64, "),
    ],
)
def test_refuses_a_dtype(dtype: object, error: type[Exception], problem: str, stored: Path) -> None:
    with pytest.raises(error, match=problem):
        GPT.from_pretrained(stored / "gpt2", dtype=dtype)


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
        (BERTConfig(61, dropout=0.1), "embedding_dropout is 0.0, must be 0.1 for bert"),
    ],
)
def test_refuses_to_save_what_the_layout_lacks(config: GPTConfig | BERTConfig, problem: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = (BERT if isinstance(config, BERTConfig) else GPT)(config)
    with pytest.raises(ValueError, match=problem):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
