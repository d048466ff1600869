"""How Hugging Face names and shapes the tensors that GPT-2, Llama and BERT are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastformer.models.config import BERTConfig, GPTConfig, TransformerConfig
from fastformer.models.hf_config import (
    Settings,
    Shapes,
    read_bert,
    read_gpt2,
    read_llama,
    write_bert,
    write_gpt2,
    write_llama,
)


class Piece(NamedTuple):
    """One of our parameters, and the tensors of theirs that it is made of, one below the other."""

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...] | None = None  # rows of each of theirs, if they are several
    transposed: bool = False  # they have it [in, out], as GPT-2's Conv1D


@dataclass(frozen=True)
class Layout:
    """A family of checkpoints."""

    model_type: str
    prefix: str  # of the names of all but the heads; a checkpoint without heads lacks it
    ignored: re.Pattern[str]  # names of constants that older versions of transformers stored
    read_config: Callable[[Settings, Shapes], TransformerConfig]
    write_config: Callable[[TransformerConfig], dict[str, Any]]
    pieces: Callable[[Any], list[Piece]]
    copies: Mapping[str, str]  # names under which a tied tensor may be stored again: our parameter
    fixed: Callable[[Any], Mapping[str, tuple[Any, ...]]]  # fields of a configuration: what they must be


def current_name(name: str) -> str:
    """The name today of a tensor that TensorFlow's first BERT named."""
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def _both(ours: str, *theirs: str, sizes: tuple[int, ...] | None = None, transposed: bool = False) -> list[Piece]:
    """Weight and bias of a layer."""
    return [
        Piece(f"{ours}.{end}", tuple(f"{name}.{end}" for name in theirs), sizes, transposed and end == "weight")
        for end in ("weight", "bias")
    ]


def _gpt2_pieces(config: GPTConfig) -> list[Piece]:
    pieces = [
        Piece("token_embedding.weight", ("transformer.wte.weight",)),
        Piece("position_embedding.weight", ("transformer.wpe.weight",)),
    ]
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        pieces += _both(f"{ours}.norm1", f"{theirs}.ln_1")
        pieces += _both(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", transposed=True)
        pieces += _both(f"{ours}.attention.out", f"{theirs}.attn.c_proj", transposed=True)
        pieces += _both(f"{ours}.norm2", f"{theirs}.ln_2")
        pieces += _both(f"{ours}.feed_forward.linear1", f"{theirs}.mlp.c_fc", transposed=True)
        pieces += _both(f"{ours}.feed_forward.linear2", f"{theirs}.mlp.c_proj", transposed=True)
    pieces += _both("norm", "transformer.ln_f")
    if not config.tied_unembedding:
        pieces.append(Piece("unembedding.weight", ("lm_head.weight",)))
    return pieces


def _llama_pieces(config: GPTConfig) -> list[Piece]:
    keys = config.kv_heads * config.head_dim
    pieces = [Piece("token_embedding.weight", ("model.embed_tokens.weight",))]
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        projections = tuple(f"{theirs}.self_attn.{x}_proj.weight" for x in "qkv")
        pieces += [
            Piece(f"{ours}.norm1.weight", (f"{theirs}.input_layernorm.weight",)),
            Piece(f"{ours}.attention.qkv.weight", projections, (config.d_model, keys, keys)),
            Piece(f"{ours}.attention.out.weight", (f"{theirs}.self_attn.o_proj.weight",)),
            Piece(f"{ours}.norm2.weight", (f"{theirs}.post_attention_layernorm.weight",)),
            Piece(f"{ours}.feed_forward.linear1.weight", (f"{theirs}.mlp.up_proj.weight",)),
            Piece(f"{ours}.feed_forward.linear_gate.weight", (f"{theirs}.mlp.gate_proj.weight",)),
            Piece(f"{ours}.feed_forward.linear2.weight", (f"{theirs}.mlp.down_proj.weight",)),
        ]
    pieces.append(Piece("norm.weight", ("model.norm.weight",)))
    if not config.tied_unembedding:
        pieces.append(Piece("unembedding.weight", ("lm_head.weight",)))
    return pieces


def _bert_pieces(config: BERTConfig) -> list[Piece]:
    embeddings = "bert.embeddings"
    pieces = [
        Piece("token_embedding.weight", (f"{embeddings}.word_embeddings.weight",)),
        Piece("position_embedding.weight", (f"{embeddings}.position_embeddings.weight",)),
        Piece("segment_embedding.weight", (f"{embeddings}.token_type_embeddings.weight",)),
        *_both("embedding_norm", f"{embeddings}.LayerNorm"),
    ]
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"bert.encoder.layer.{i}"
        projections = tuple(f"{theirs}.attention.self.{x}" for x in ("query", "key", "value"))
        pieces += _both(f"{ours}.attention.qkv", *projections, sizes=(config.d_model,) * 3)
        pieces += _both(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
        pieces += _both(f"{ours}.norm1", f"{theirs}.attention.output.LayerNorm")
        pieces += _both(f"{ours}.feed_forward.linear1", f"{theirs}.intermediate.dense")
        pieces += _both(f"{ours}.feed_forward.linear2", f"{theirs}.output.dense")
        pieces += _both(f"{ours}.norm2", f"{theirs}.output.LayerNorm")
    if config.pooler:
        pieces += _both("pooler", "bert.pooler.dense")
    if config.masked_language_head:
        pieces.append(Piece("masked_language_head.bias", ("cls.predictions.bias",)))
        pieces += _both("masked_language_head.linear", "cls.predictions.transform.dense")
        pieces += _both("masked_language_head.norm", "cls.predictions.transform.LayerNorm")
    if config.num_classes is not None:
        pieces += _both("classifier", "classifier")
    if config.next_sentence_head:
        pieces += _both("next_sentence", "cls.seq_relationship")
    return pieces


def _gpt2_fixed(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    return {
        "positions": ("learned",),
        "norm": ("layer_norm",),
        "norm_first": (True,),
        "bias": (True,),
        "activation": ("gelu", "gelu_tanh", "relu", "silu"),
        "kv_heads": (config.num_heads,),
    }


def _llama_fixed(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    return {
        "positions": ("rotary",),
        "norm": ("rms_norm",),
        "norm_first": (True,),
        "bias": (False,),
        "activation": ("swiglu", "geglu"),
        "dropout": (0.0,),
        "embedding_dropout": (0.0,),
    }


def _bert_fixed(config: BERTConfig) -> dict[str, tuple[Any, ...]]:
    return {
        "positions": ("learned",),
        "norm": ("layer_norm",),
        "norm_first": (False,),
        "bias": (True,),
        "activation": ("gelu", "gelu_tanh", "relu", "silu"),
        "tied_unembedding": (True,),
        "kv_heads": (config.num_heads,),
        "num_segments": (max(1, config.num_segments),),
        "embedding_dropout": (config.dropout,),
    }


_TIED = {"lm_head.weight": "token_embedding.weight"}

LAYOUTS: dict[type[TransformerConfig], list[Layout]] = {
    GPTConfig: [
        Layout(
            "gpt2",
            "transformer.",
            re.compile(r"\.attn\.(masked_)?bias$"),
            read_gpt2,
            write_gpt2,
            _gpt2_pieces,
            _TIED,
            _gpt2_fixed,
        ),
        Layout(
            "llama",
            "model.",
            re.compile(r"rotary_emb\.inv_freq$"),
            read_llama,
            write_llama,
            _llama_pieces,
            _TIED,
            _llama_fixed,
        ),
    ],
    BERTConfig: [
        Layout(
            "bert",
            "bert.",
            re.compile(r"embeddings\.position_ids$"),
            read_bert,
            write_bert,
            _bert_pieces,
            {
                "cls.predictions.decoder.weight": "token_embedding.weight",
                "cls.predictions.decoder.bias": "masked_language_head.bias",
            },
            _bert_fixed,
        ),
    ],
}


def layout_to_read(kind: type[TransformerConfig], model_type: object) -> Layout:
    """The layout of a checkpoint for models with configurations of that kind.

    Raises:
        ValueError: they have none for that model_type.
    """
    for layout in LAYOUTS[kind]:
        if layout.model_type == model_type:
            return layout
    wanted = " or ".join(repr(layout.model_type) for layout in LAYOUTS[kind])
    raise ValueError(f"config.json: model_type is {model_type!r}, must be {wanted}")


def layout_to_write(config: TransformerConfig) -> Layout:
    """The layout that a model of that configuration can be saved in.

    Raises:
        ValueError: there is none; names, for each layout, a field that is in the way.
    """
    problems = []
    for layout in LAYOUTS[type(config)]:
        fixed = layout.fixed(config)
        wrong = [name for name, values in fixed.items() if getattr(config, name) not in values]
        if not wrong:
            return layout
        name = wrong[0]
        wanted = " or ".join(map(repr, fixed[name]))
        problems.append(f"{name} is {getattr(config, name)!r}, must be {wanted} for {layout.model_type}")
    raise ValueError("config can't be saved in Hugging Face's layout: " + "; ".join(problems))
