"""Configurations: defaults, JSON, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from fastformer.models import BERTConfig, GPTConfig, RotaryScaling, Seq2SeqConfig

SCALING = RotaryScaling(8.0, 1.0, 4.0, 8192)
ROTARY = {"positions": "rotary"}


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(11, positions="rotary", rotary_base=5e5, rotary_scaling=SCALING, num_kv_heads=3),
        BERTConfig(11, pooler=True, num_classes=4),
        Seq2SeqConfig(11, num_decoder_layers=2, start_token=3),
    ],
)
def test_config_through_json(config: GPTConfig | BERTConfig | Seq2SeqConfig) -> None:
    assert type(config)(**json.loads(json.dumps(asdict(config)))) == config


def test_what_none_stands_for() -> None:
    config = Seq2SeqConfig(11, num_layers=5, num_heads=4, d_model=48)
    assert (config.head_dim, config.kv_heads, config.hidden_width, config.decoder_layers) == (12, 4, 192, 5)
    config = Seq2SeqConfig(11, num_heads=4, d_model=48, num_kv_heads=2, d_hidden=7, num_decoder_layers=1)
    assert (config.head_dim, config.kv_heads, config.hidden_width, config.decoder_layers) == (12, 2, 7, 1)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 8.0}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"context_length": 1}, "context_length"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_heads": 5}, "d_model"),
        ({"num_kv_heads": 4}, "num_kv_heads"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"d_hidden": -1}, "d_hidden"),
        ({"positions": "relative"}, "positions"),
        ({"norm": "batch_norm"}, "norm"),
        ({"norm_first": 1}, "norm_first"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"activation": "swish"}, "activation"),
        ({"activation": ["gelu"]}, "activation"),
        ({"bias": None}, "bias"),
        ({"dropout": 1.5}, "dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"embedding_dropout": "0.1"}, "embedding_dropout"),
        ({"tied_unembedding": "yes"}, "tied_unembedding"),
        ({"rotary_base": 500.0}, "rotary_base"),
        ({"rotary_scaling": SCALING}, "rotary_scaling"),
        ({**ROTARY, "rotary_scaling": 8.0}, "rotary_scaling"),
        ({**ROTARY, "rotary_base": float("inf")}, "rotary_base"),
        ({**ROTARY, "num_heads": 128}, "num_heads"),
    ],
)
def test_config_refuses(fields: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*, must "):
        GPTConfig(**({"vocab_size": 8} | fields))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"num_segments": -1}, "num_segments"),
        ({"num_classes": 2}, "pooler"),
        ({"next_sentence_head": True}, "pooler"),
        ({"pooler": True, "num_classes": 0}, "num_classes"),
        ({"classifier_dropout": 2.0}, "classifier_dropout"),
        ({"masked_language_head": False, "tied_unembedding": False}, "tied_unembedding"),
    ],
)
def test_bert_config_refuses(fields: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*, must "):
        BERTConfig(8, **fields)


@pytest.mark.parametrize(
    ("fields", "name"), [({"num_decoder_layers": 0}, "num_decoder_layers"), ({"start_token": 8}, "start_token")]
)
def test_seq2seq_config_refuses(fields: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*, must "):
        Seq2SeqConfig(8, **fields)


def test_rotary_scaling_refuses() -> None:
    with pytest.raises(ValueError, match=r"^rotary_scaling\.factor is 0\.0, must"):
        RotaryScaling(0.0, 1.0, 4.0, 8192)
    with pytest.raises(ValueError, match=r"^rotary_scaling\.high_freq_factor is 1\.0, must be above"):
        RotaryScaling(8.0, 1.0, 1.0, 8192)
