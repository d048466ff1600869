"""What Hugging Face's config.json of a GPT-2, a Llama and a BERT says, as our configurations, and back.

What a config.json says and we don't compute is refused: each reader checks every key that changes what transformers'
model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastformer.models.config import (
    BERTConfig,
    GPTConfig,
    RotaryScaling,
    TransformerConfig,
    _check_flag,
    _check_number,
    _check_probability,
    _check_size,
)

Settings = Mapping[str, Any]  # what config.json holds
Shapes = Mapping[str, tuple[int, ...]]  # of the tensors in the checkpoint

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
#: Their name for each of ours: the first that means it.
_ACTIVATION_NAMES = {ours: theirs for names in (_ACTIVATIONS, _GATED) for theirs, ours in reversed(names.items())}

#: Kinds of BERT whose heads are built.
_BERTS = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertLMHeadModel",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
)

#: What changes nothing that the model computes: a model that was read keeps it, and writes it back.
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id")

_REQUIRED = object()


class _Reader:
    """Values of a config.json, checked."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.only("quantization_config", None)

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        if key not in self.settings and default is _REQUIRED:
            raise ValueError(f"config.json lacks {key}")
        return self.settings.get(key, default)

    def only(self, key: str, *values: Any) -> None:
        """ValueError unless the key has one of the values, the first of which is the default."""
        if self.get(key, values[0]) not in values:
            wanted = " or ".join(map(repr, values))
            raise ValueError(f"config.json: {key} is {self.settings[key]!r}, must be {wanted}: nothing else is built")

    def name(self, key: str, names: Mapping[str, str], default: str) -> str:
        """Our name for the value."""
        value = self.get(key, default)
        if value not in tuple(names):
            raise ValueError(f"config.json: {key} is {value!r}, must be one of {', '.join(names)}")
        return names[value]

    def size(self, key: str, default: Any = _REQUIRED, *, least: int = 1) -> Any:
        """An integer of at least ``least``, or the default."""
        return self._checked(_check_size, key, default, least)

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A positive number, or the default."""
        return self._checked(_check_number, key, default, 0.0)

    def probability(self, key: str, default: Any = _REQUIRED) -> Any:
        """A number in [0, 1], or the default."""
        return self._checked(_check_probability, key, default)

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """True or False, or the default."""
        return self._checked(_check_flag, key, default)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A JSON object, empty where there is none."""
        value = self.get(key, None)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"config.json: {key} is {value!r}, must be a JSON object")
        return value or {}

    def _checked(self, check: Callable[..., None], key: str, default: Any, *limits: float) -> Any:
        value = self.get(key, default)
        if value is not default:
            check(f"config.json: {key}", value, *limits)
        return value


def read_gpt2(settings: Settings, shapes: Shapes) -> GPTConfig:
    """The configuration of a GPT-2."""
    reader = _Reader(settings)
    reader.only("is_causal", True)
    reader.only("scale_attn_weights", True)
    reader.only("scale_attn_by_inverse_layer_idx", False)
    reader.only("reorder_and_upcast_attn", False, True)  # rounds elsewhere in half precision, no more
    reader.only("add_cross_attention", False)
    return GPTConfig(
        vocab_size=reader.size("vocab_size"),
        context_length=reader.size("n_positions", least=2),
        num_layers=reader.size("n_layer"),
        num_heads=reader.size("n_head"),
        d_model=reader.size("n_embd"),
        d_hidden=reader.size("n_inner", None),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5),
        activation=reader.name("activation_function", _ACTIVATIONS, "gelu_new"),
        dropout=reader.probability("resid_pdrop", 0.1),
        embedding_dropout=reader.probability("embd_pdrop", 0.1),
        attention_dropout=reader.probability("attn_pdrop", 0.1),
        tied_unembedding=reader.flag("tie_word_embeddings", True),
    )


def write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    """Its config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.d_model,
        "n_inner": config.d_hidden,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": _ACTIVATION_NAMES[config.activation],
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.embedding_dropout,
        "attn_pdrop": config.attention_dropout,
        "tie_word_embeddings": config.tied_unembedding,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def read_llama(settings: Settings, shapes: Shapes) -> GPTConfig:
    """The configuration of a Llama."""
    reader = _Reader(settings)
    reader.only("is_causal", True)
    reader.only("attention_bias", False)
    reader.only("mlp_bias", False)
    d_model, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    reader.only("head_dim", None, d_model // num_heads)
    base, scaling = _read_rotary(reader)
    return GPTConfig(
        vocab_size=reader.size("vocab_size"),
        context_length=reader.size("max_position_embeddings", least=2),
        num_layers=reader.size("num_hidden_layers"),
        num_heads=num_heads,
        d_model=d_model,
        num_kv_heads=reader.size("num_key_value_heads", None),
        d_hidden=reader.size("intermediate_size"),
        positions="rotary",
        norm="rms_norm",
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        activation=reader.name("hidden_act", _GATED, "silu"),
        bias=False,
        rotary_base=base,
        rotary_scaling=scaling,
        attention_dropout=reader.probability("attention_dropout", 0.0),
        tied_unembedding=reader.flag("tie_word_embeddings", False),
    )


def _read_rotary(reader: _Reader) -> tuple[float, RotaryScaling | None]:
    """Base and scaling. Before transformers 5 they were the keys rope_theta and rope_scaling."""
    old = {"rope_theta": reader.get("rope_theta", 10000.0), **reader.mapping("rope_scaling")}
    rotary = old | reader.mapping("rope_parameters")
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if rotary.get("partial_rotary_factor", reader.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor is not 1.0: nothing else is built")
    _check_number("config.json: rope_theta", rotary["rope_theta"], 0.0)
    if kind == "default":
        return float(rotary["rope_theta"]), None
    if kind != "llama3":
        raise ValueError(f"config.json: rope_type is {kind!r}, must be 'default' or 'llama3': nothing else is built")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for name in names:
        if name not in rotary:
            raise ValueError(f"config.json lacks {name} of the rotary positions")
        _check_number(f"config.json: {name}", rotary[name], 0.0)
    return float(rotary["rope_theta"]), RotaryScaling(*(rotary[name] for name in names))


def write_llama(config: TransformerConfig) -> dict[str, Any]:
    """Its config.json."""
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if (scaling := config.rotary_scaling) is not None:
        rotary |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context_length,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.d_model,
        "intermediate_size": config.hidden_width,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": _ACTIVATION_NAMES[config.activation],
        "rope_parameters": rotary,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tied_unembedding,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def read_bert(settings: Settings, shapes: Shapes) -> BERTConfig:
    """The configuration of a BERT, with the heads that the checkpoint has tensors of."""
    reader = _Reader(settings)
    reader.only("is_decoder", False)
    reader.only("add_cross_attention", False)
    reader.only("position_embedding_type", "absolute")
    reader.only("problem_type", None, "single_label_classification")
    reader.only("tie_word_embeddings", True)  # else transformers has two biases of the unembedding
    for kind in reader.get("architectures", None) or ():
        if kind not in _BERTS:
            raise ValueError(
                f"config.json: architectures has {kind!r}, must be of {', '.join(_BERTS)}: nothing else is built"
            )
    return BERTConfig(
        vocab_size=reader.size("vocab_size"),
        context_length=reader.size("max_position_embeddings", least=2),
        num_layers=reader.size("num_hidden_layers"),
        num_heads=reader.size("num_attention_heads"),
        d_model=reader.size("hidden_size"),
        d_hidden=reader.size("intermediate_size"),
        norm_eps=reader.number("layer_norm_eps", 1e-12),
        activation=reader.name("hidden_act", _ACTIVATIONS, "gelu"),
        dropout=reader.probability("hidden_dropout_prob", 0.1),
        embedding_dropout=reader.probability("hidden_dropout_prob", 0.1),
        attention_dropout=reader.probability("attention_probs_dropout_prob", 0.1),
        num_segments=reader.size("type_vocab_size", 2),
        masked_language_head="cls.predictions.bias" in shapes,
        pooler="bert.pooler.dense.weight" in shapes,
        num_classes=shapes["classifier.weight"][0] if "classifier.weight" in shapes else None,
        next_sentence_head="cls.seq_relationship.weight" in shapes,
        classifier_dropout=reader.probability("classifier_dropout", None),
    )


def write_bert(config: TransformerConfig) -> dict[str, Any]:
    """Its config.json."""
    if config.num_classes is not None:
        kind = "BertForSequenceClassification"
    elif config.masked_language_head:
        kind = "BertForPreTraining" if config.next_sentence_head else "BertForMaskedLM"
    else:
        kind = "BertForNextSentencePrediction" if config.next_sentence_head else "BertModel"
    settings: dict[str, Any] = {
        "architectures": [kind],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_size": config.d_model,
        "intermediate_size": config.hidden_width,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": _ACTIVATION_NAMES[config.activation],
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "tie_word_embeddings": True,
        "type_vocab_size": config.num_segments,
        "classifier_dropout": config.classifier_dropout,
    }
    if config.num_classes is not None:
        settings["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_classes)}
        settings["label2id"] = {f"LABEL_{i}": i for i in range(config.num_classes)}
    return settings
