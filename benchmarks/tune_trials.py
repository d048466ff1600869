"""What ``fastformer tune`` runs: every operation at the widths of a model, over sizes from small to large."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional
from fastformer.models import checkpoint
from fastformer.models.config import ACTIVATIONS, BERTConfig, GPTConfig, TransformerConfig
from fastformer.ops.linear import FEW_ROWS

from .bench_layer_norm import add_and_norm
from .case import FORWARD, TRAINING, Case, Function, Work

Shapes = dict[str, tuple[int, ...]]  # of the tensors that a function takes, by name


class Widths(NamedTuple):
    """The sizes of a model that the shapes of its operations come from."""

    columns: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    length: int  # the most tokens of a sequence
    norms: tuple[str, ...] = ("layer_norm", "add_layer_norm")
    activation: str = "gelu"
    gated: bool = False
    rotary: bool = False

    @classmethod
    def of(cls, config: TransformerConfig) -> Widths:
        """Those of one of our models."""
        activation, gated = ACTIVATIONS[config.activation]
        return cls(
            columns=config.d_model,
            heads=config.num_heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            hidden=config.hidden_width,
            vocabulary=config.vocab_size,
            length=config.context_length,
            norms=("rms_norm",) if config.norm == "rms_norm" else ("layer_norm", "add_layer_norm"),
            activation=activation,
            gated=gated,
            rotary=config.positions == "rotary",
        )


_EVERY = {"norms": ("layer_norm", "add_layer_norm", "rms_norm"), "rotary": True}
#: A toy, the GPT that ``fastformer train`` makes, and GPT-2, which is as wide as BERT.
STANDARD = (
    Widths(64, 4, 4, 16, 256, 1000, 256, **_EVERY),
    Widths(384, 6, 6, 64, 1536, 4096, 256, **_EVERY),
    Widths(768, 12, 12, 64, 3072, 50257, 1024, **_EVERY),
)
MODELS: dict[str, TransformerConfig] = {
    "gpt2": GPTConfig(50257, context_length=1024, num_heads=12, d_model=768, activation="gelu_tanh"),
    "bert": BERTConfig(30522, context_length=512, num_heads=12, d_model=768),
    "llama": GPTConfig(  # Llama 3.2 1B
        128256,
        context_length=8192,
        num_heads=32,
        d_model=2048,
        num_kv_heads=8,
        d_hidden=8192,
        positions="rotary",
        norm="rms_norm",
        activation="swiglu",
    ),
}


def widths_of(model: str) -> Widths:
    """Of one of MODELS, or of the model in a folder: one of ``fastformer train``, or one with a config.json.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: the file doesn't give the widths.
    """
    if model in MODELS:
        return Widths.of(MODELS[model])
    config, weights = Path(model) / "config.json", Path(model) / checkpoint.MODEL_FILE
    if config.exists():
        return read_config(config)
    if weights.exists():
        return Widths.of(checkpoint.load(weights).config)
    names = ", ".join(MODELS)
    raise FileNotFoundError(
        f"--model is {model}, must be one of {names} or a folder with {config.name} or {weights.name}"
    )


#: The names that Hugging Face's configurations have for a width.
_KEYS = {
    "columns": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "d_kv"),
    "hidden": ("intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim"),
    "vocabulary": ("vocab_size",),
    "length": ("max_position_embeddings", "n_positions"),
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def read_config(file: Path) -> Widths:
    """The widths in a config.json of Hugging Face's. What has an rms_norm_eps is taken for a Llama: gated and rotary.

    Raises:
        ValueError: it is none, or lacks a width.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        found = {name: next((settings[key] for key in keys if settings.get(key)), None) for name, keys in _KEYS.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not the configuration of a model ({error})") from error
    for name, width in found.items():
        if width is None and name in ("columns", "heads", "vocabulary"):
            raise ValueError(f"{file} lacks {' or '.join(_KEYS[name])}")
        if width is not None and (type(width) is not int or width < 1):
            raise ValueError(f"{file}: {' or '.join(_KEYS[name])} is {width!r}, must be a positive integer")
    defaults = {
        "kv_heads": found["heads"],
        "head_dim": found["columns"] // found["heads"],
        "hidden": 4 * found["columns"],
        "length": 1024,
    }
    llama = "rms_norm_eps" in settings
    activation = settings.get("hidden_act") or settings.get("activation_function")
    return Widths(
        **{name: width or defaults[name] for name, width in found.items()},
        norms=("rms_norm",) if llama else ("layer_norm", "add_layer_norm"),
        activation=_ACTIVATIONS.get(activation, "gelu"),
        gated=llama,
        rotary=llama,
    )


class Trial(NamedTuple):
    """One call, of ours and of torch's."""

    operation: str  # as backends.EVIDENCE has it; of what is measured in several forms, the form
    elements: int  # as backends.choose counts them
    shapes: Shapes
    ours: Function
    torchs: Function  # torch's own function; where there is none, ours, which then runs several of torch's
    trained: bool = True

    def case(self, device: torch.device, dtype: torch.dtype) -> Case:
        """What is judged and timed, under the backend of each function: torch's is its own reference in float64."""
        return Case(
            operation=self.operation,
            shape=", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.shapes.items()),
            dtype=dtype,
            inputs=partial(self.inputs, device, dtype),
            ours=self.ours,
            reference=self.torchs,
            peers={"eager": self.torchs},
            # of which nothing but the modes is asked
            work=dict.fromkeys((FORWARD, TRAINING) if self.trained else (FORWARD,), Work(bytes=0, flops=0)),
        )

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Drawn anew; those that a model differentiates require a gradient if this is trained."""
        drawn: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            if name == "target":
                drawn[name] = torch.randint(len(drawn["linear_weight"]), shape, device=device)
                continue
            scale = shape[-1] ** -0.5 if "weight" in name and len(shape) == 2 else 1.0  # products are of order one
            x = scale * torch.randn(shape, device=device, dtype=dtype)
            drawn[name] = x.requires_grad_(self.trained and name not in ("cos", "sin"))
        return drawn


class Sizes(NamedTuple):
    """How many rows and positions are tried on a kind of device."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    products: tuple[int, ...]  # rows of products


SIZES = {
    "cpu": Sizes((1, 8, 64, 512, 4096), (16, 64, 128, 256, 512, 1024), (1, 8, 32, 64, 512)),
    "cuda": Sizes((1, 64, 512, 4096, 32768), (64, 256, 1024, 2048, 4096, 8192), (1, 64, 512, 4096, 16384)),
}


def trials(operation: str, widths: Widths, kind: str) -> Iterator[Trial]:
    """The calls of one of OPERATIONS, in all its forms, in a model of these widths on a kind of device."""
    sizes = SIZES[kind]
    lengths = tuple(length for length in sizes.lengths if length <= widths.length)
    sizes = sizes._replace(lengths=lengths or (widths.length,))
    return OPERATIONS[operation](widths, sizes, kind)


def _softmax(widths: Widths, sizes: Sizes, kind: str) -> Iterator[Trial]:
    longest = 2048 if kind == "cuda" else 512  # the scores of longer sequences fill the memory
    shapes = [(widths.heads * length, length) for length in sizes.lengths if length <= longest]
    for shape in (*shapes, *((rows, widths.vocabulary) for rows in sizes.rows[:3])):
        functions = [partial(module.softmax, dim=-1) for module in (functional, torch_functional)]
        yield Trial("softmax", math.prod(shape), {"input": shape}, *functions)


def _norms(widths: Widths, sizes: Sizes, kind: str) -> Iterator[Trial]:
    row = {"normalized_shape": (widths.columns,)}
    for form in widths.norms:
        added = form == "add_layer_norm"
        torchs = partial(add_and_norm, torch_functional.layer_norm) if added else getattr(torch_functional, form)
        functions = partial(getattr(functional, form), **row), partial(torchs, **row)
        names = ("residual",) if added else ()
        vectors = ("weight",) if form == "rms_norm" else ("weight", "bias")
        for rows in sizes.rows:
            shapes = dict.fromkeys(("input", *names), (rows, widths.columns)) | dict.fromkeys(
                vectors, (widths.columns,)
            )
            yield Trial(form, rows * widths.columns, shapes, *functions)


def _attention(widths: Widths, sizes: Sizes, kind: str) -> Iterator[Trial]:
    """Causal, as in training; then one query over a cache."""
    for queries, keys in (*((n, n) for n in sizes.lengths), *((1, n) for n in sizes.lengths)):
        cache = (1, widths.kv_heads, keys, widths.head_dim)
        shapes = {"query": (1, widths.heads, queries, widths.head_dim), "key": cache, "value": cache}
        options = {"is_causal": queries > 1, "enable_gqa": widths.kv_heads != widths.heads}
        modules = functional, torch_functional
        functions = [partial(module.scaled_dot_product_attention, **options) for module in modules]
        yield Trial("attention", math.prod(cache), shapes, *functions, trained=queries > 1)


def _linear(widths: Widths, sizes: Sizes, kind: str) -> Iterator[Trial]:
    columns, hidden = widths.columns, widths.hidden
    unembedding = (widths.vocabulary, columns)  # of new tokens; training has linear_cross_entropy
    for rows in sizes.products:
        form = "linear_few_rows" if rows <= FEW_ROWS else "linear"
        for weight in dict.fromkeys([(columns, columns), (hidden, columns), (columns, hidden), unembedding]):
            if weight == unembedding and rows > 64:
                continue
            shapes = {"input": (rows, weight[1]), "weight": weight, "bias": weight[:1]}
            trained = rows > 1 and weight != unembedding
            yield Trial(form, math.prod(weight), shapes, functional.linear, torch_functional.linear, trained)


def _feed_forward(widths: Widths, sizes: Sizes, kind: str) -> Iterator[Trial]:
    columns, hidden = widths.columns, widths.hidden
    weights: Shapes = {
        "weight1": (hidden, columns),
        "bias1": (hidden,),
        "weight2": (columns, hidden),
        "bias2": (columns,),
    }
    if widths.gated:
        weights["weight_gate"] = (hidden, columns)
    run = partial(functional.feed_forward, activation=widths.activation)
    for rows in sizes.products:
        few = kind == "cpu" and rows <= FEW_ROWS  # where the form for few rows has a kernel
        form, elements = ("feed_forward_few_rows", hidden * columns) if few else ("feed_forward", rows * columns)
        yield Trial(form, elements, {"input": (rows, columns), **weights}, run, run, trained=rows > 1)


def _linear_cross_entropy(widths: Widths, sizes: Sizes, kind: str) -> Iterator[Trial]:
    run = functional.linear_cross_entropy
    for rows in sizes.products[1:]:
        shapes = {
            "input": (rows, widths.columns),
            "linear_weight": (widths.vocabulary, widths.columns),
            "target": (rows,),
        }
        yield Trial("linear_cross_entropy", rows * widths.columns, shapes, run, run)


def _rotary(widths: Widths, sizes: Sizes, kind: str) -> Iterator[Trial]:
    for length in (1, *sizes.lengths) if widths.rotary else ():
        shapes = {
            name: (1, heads, length, widths.head_dim)
            for name, heads in (("query", widths.heads), ("key", widths.kv_heads))
        }
        shapes |= dict.fromkeys(("cos", "sin"), (length, widths.head_dim // 2))
        yield Trial("rotary", math.prod(shapes["query"]), shapes, functional.rotary, functional.rotary)


OPERATIONS: dict[str, Callable[[Widths, Sizes, str], Iterator[Trial]]] = {
    "softmax": _softmax,
    "layer_norm": _norms,
    "attention": _attention,
    "linear": _linear,
    "feed_forward": _feed_forward,
    "linear_cross_entropy": _linear_cross_entropy,
    "rotary": _rotary,
}
