"""What a model is made of: one frozen dataclass for each kind of model, and what they share."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from fastformer.nn.positional_encoding import KINDS as POSITIONS

NORMS = ("layer_norm", "rms_norm")

#: The name in a configuration: (activation of the feed-forward layer, whether it is gated).
ACTIVATIONS = {
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "relu": ("relu", False),
    "silu": ("silu", False),
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
}


@dataclass(frozen=True)
class RotaryScaling:
    """How Llama 3.1 stretches rotary positions to a longer context (arXiv 2407.21783, section 3.4.2).

    A pair of features that turns once in more than ``original_context_length / low_freq_factor`` tokens turns
    ``factor`` times slower; once in fewer than ``original_context_length / high_freq_factor``, as before; between the
    two, in between.

    Raises:
        ValueError: a number that is not positive, or ``high_freq_factor`` not above ``low_freq_factor``.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_number(f"rotary_scaling.{field.name}", getattr(self, field.name), above=0.0)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rotary_scaling.high_freq_factor is {self.high_freq_factor}, must be above low_freq_factor,"
                f" {self.low_freq_factor}"
            )


@dataclass(frozen=True)
class TransformerConfig:
    """What every model has. The default sizes train in minutes on a laptop.

    Args:
        vocab_size: tokens in the vocabulary.
        context_length: the most tokens in a sequence.
        num_layers: blocks; of Seq2Seq, those of the encoder.
        num_heads: heads of queries, which divide ``d_model``.
        d_model: width of the embeddings and of each block's input and output.
        num_kv_heads: heads of keys and values, each shared by as many heads of queries (GQA, arXiv 2305.13245); None
            for ``num_heads``.
        d_hidden: width of the feed-forward layers; None for 4 ``d_model``.
        positions: "learned", "sinusoidal" (whose token embeddings are multiplied by sqrt(d_model), as in arXiv
            1706.03762) or "rotary" (of self-attention; feature i is paired with i + head_dim / 2).
        norm: "layer_norm" or "rms_norm".
        norm_first: normalise the input of each sublayer (pre-norm), and the output of the last; else each sum.
        norm_eps: added to the variance, or the mean square.
        activation: "gelu", "gelu_tanh", "relu", "silu", or gated "swiglu", "geglu" (arXiv 2002.05202).
        bias: whether linear layers (but for gates and the unembedding) and layer norms have biases.
        rotary_base, rotary_scaling: of "rotary" alone.
        dropout: probability that an element of a sublayer's output is dropped while training.
        embedding_dropout: likewise of the sum of the embeddings.
        attention_dropout: likewise of the attention weights.
        tied_unembedding: whether the unembedding is the token embedding once more.

    Raises:
        ValueError: a field is not what it must be; names the field.
    """

    vocab_size: int
    context_length: int = 256
    num_layers: int = 6
    num_heads: int = 6
    d_model: int = 384
    num_kv_heads: int | None = None
    d_hidden: int | None = None
    positions: str = "learned"
    norm: str = "layer_norm"
    norm_first: bool = True
    norm_eps: float = 1e-5
    activation: str = "gelu"
    bias: bool = True
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    tied_unembedding: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "num_layers", "num_heads", "d_model"):
            _check_size(name, getattr(self, name), least=2 if name == "context_length" else 1)
        for name in ("num_kv_heads", "d_hidden"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model is {self.d_model}, must be a multiple of num_heads, {self.num_heads}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}, must divide num_heads, {self.num_heads}")
        _check_choice("positions", self.positions, POSITIONS)
        _check_choice("norm", self.norm, NORMS)
        _check_choice("activation", self.activation, ACTIVATIONS)
        for name in ("norm_first", "bias", "tied_unembedding"):
            _check_flag(name, getattr(self, name))
        for name in ("norm_eps", "rotary_base"):
            _check_number(name, getattr(self, name), above=0.0)
        for name in ("dropout", "embedding_dropout", "attention_dropout"):
            _check_probability(name, getattr(self, name))
        if isinstance(self.rotary_scaling, dict):  # from JSON
            object.__setattr__(self, "rotary_scaling", RotaryScaling(**self.rotary_scaling))
        if self.rotary_scaling is not None and not isinstance(self.rotary_scaling, RotaryScaling):
            raise ValueError(f"rotary_scaling is {self.rotary_scaling!r}, must be a RotaryScaling or None")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"num_heads is {self.num_heads}, must give an even head_dim for rotary positions, not {self.head_dim}"
            )
        if self.positions != "rotary":
            for name, default in (("rotary_base", 10000.0), ("rotary_scaling", None)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} is {getattr(self, name)!r}, must be {default!r} without rotary positions")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """``num_kv_heads``, or what None stands for."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def hidden_width(self) -> int:
        """``d_hidden``, or what None stands for."""
        return 4 * self.d_model if self.d_hidden is None else self.d_hidden


@dataclass(frozen=True)
class GPTConfig(TransformerConfig):
    """A decoder-only transformer; see TransformerConfig."""


@dataclass(frozen=True)
class BERTConfig(TransformerConfig):
    """An encoder-only transformer; see TransformerConfig for the fields that all have, whose defaults are BERT's here.

    Args:
        num_segments: kinds of segment, each with an embedding; 0 for none.
        masked_language_head: whether there is a head that gives logits for every token.
        pooler: whether there is a layer over the first token, ``tanh(linear(x))``, which the other two heads want.
        num_classes: classes of the classification head; None for no such head.
        next_sentence_head: whether there is a head that gives the two logits of "is the second segment the next?".
        classifier_dropout: of the classification head's input while training; None for ``dropout``.
    """

    norm_first: bool = False
    norm_eps: float = 1e-12
    num_segments: int = 2
    masked_language_head: bool = True
    pooler: bool = False
    num_classes: int | None = None
    next_sentence_head: bool = False
    classifier_dropout: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size("num_segments", self.num_segments, least=0)
        if self.num_classes is not None:
            _check_size("num_classes", self.num_classes)
        for name in ("masked_language_head", "pooler", "next_sentence_head"):
            _check_flag(name, getattr(self, name))
        if self.classifier_dropout is not None:
            _check_probability("classifier_dropout", self.classifier_dropout)
        if not self.pooler and (self.num_classes is not None or self.next_sentence_head):
            raise ValueError("pooler is False, must be True for num_classes or next_sentence_head")
        if not (self.tied_unembedding or self.masked_language_head):
            raise ValueError("tied_unembedding is False, must be True without masked_language_head")


@dataclass(frozen=True)
class Seq2SeqConfig(TransformerConfig):
    """An encoder and a decoder with one vocabulary; see TransformerConfig.

    Args:
        context_length: the most tokens of a source, and of a target.
        num_decoder_layers: blocks of the decoder; None for ``num_layers``.
        start_token: what the decoder sees in place of the token before the first.
    """

    num_decoder_layers: int | None = None
    start_token: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_decoder_layers is not None:
            _check_size("num_decoder_layers", self.num_decoder_layers)
        _check_size("start_token", self.start_token, least=0)
        if self.start_token >= self.vocab_size:
            raise ValueError(f"start_token is {self.start_token}, must be below vocab_size, {self.vocab_size}")

    @property
    def decoder_layers(self) -> int:
        """``num_decoder_layers``, or what None stands for."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers


def _check_size(name: str, size: object, least: int = 1) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < least:
        raise ValueError(f"{name} is {size!r}, must be an integer of at least {least}")


def _check_number(name: str, number: object, above: float) -> None:
    if not isinstance(number, int | float) or isinstance(number, bool) or not above < number < math.inf:
        raise ValueError(f"{name} is {number!r}, must be finite and above {above:g}")


def _check_probability(name: str, number: object) -> None:
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number <= 1:
        raise ValueError(f"{name} is {number!r}, must be in [0, 1]")


def _check_flag(name: str, flag: object) -> None:
    if not isinstance(flag, bool):
        raise ValueError(f"{name} is {flag!r}, must be True or False")


def _check_choice(name: str, choice: object, choices: tuple[str, ...] | dict[str, object]) -> None:
    if choice not in tuple(choices):
        raise ValueError(f"{name} is {choice!r}, must be one of {', '.join(choices)}")
