"""Modules under torch.compile, whole and for every length, and under autocast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_support import B, E, H, L, added, causal_mask, close, compare, padding_mask, twins
from torch import Tensor

from fastformer import nn

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

#: (tensors, keyword arguments) of a sequence length.
Inputs = Callable[[int], tuple[list[Tensor], dict[str, Any]]]

BATCH = 3
OPTIONS = {"dropout": 0.0, "activation": "gelu", "batch_first": True}


def padding(length: int) -> Tensor:
    return padding_mask(length, length, length - 2, length - 1)


def attention(need_weights: bool) -> tuple[torch.nn.Module, Inputs]:
    def inputs(n: int) -> tuple[list[Tensor], dict[str, Any]]:
        x = torch.randn(BATCH, n, E)
        return [x, x, x], {"key_padding_mask": padding(n), "need_weights": need_weights}

    return nn.MultiheadAttention(E, H, batch_first=True), inputs


def encoder(norm_first: bool) -> tuple[torch.nn.Module, Inputs]:
    def inputs(n: int) -> tuple[list[Tensor], dict[str, Any]]:
        return [torch.randn(BATCH, n, E)], {"src_key_padding_mask": padding(n)}

    layer = nn.TransformerEncoderLayer(E, H, 24, norm_first=norm_first, **OPTIONS)
    return nn.TransformerEncoder(layer, 1, nn.LayerNorm(E)), inputs


def transformer(norm_first: bool) -> tuple[torch.nn.Module, Inputs]:
    def inputs(n: int) -> tuple[list[Tensor], dict[str, Any]]:
        masks = {"tgt_mask": causal_mask(n), "src_mask": causal_mask(n + 3)}  # whose values tracing can't read
        masks |= {"src_key_padding_mask": padding(n + 3) * -1e9, "memory_key_padding_mask": padding(n + 3)}
        return [torch.randn(BATCH, n + 3, E), torch.randn(BATCH, n, E)], masks

    return nn.Transformer(E, H, 1, 1, 24, norm_first=norm_first, **OPTIONS), inputs


def positions(kind: str) -> tuple[torch.nn.Module, Inputs]:
    def inputs(n: int) -> tuple[list[Tensor], dict[str, Any]]:
        x = torch.randn(n, BATCH, E) if kind != "rotary" else torch.randn(BATCH, H, n, E)
        return [x, x + 1] if kind == "rotary" else [x], {"offset": 2 * n}

    return nn.PositionalEncoding(E, 64, kind=kind), inputs


CASES = [
    (attention, True, "dynamic"),
    (encoder, False, "dynamic, without gradients"),  # padded positions are cleared
    (transformer, False, "static"),
    (transformer, True, "dynamic"),
    (positions, "sinusoidal", "dynamic"),
    (positions, "learned", "dynamic"),
    (positions, "rotary", "dynamic"),
]


@pytest.mark.parametrize(("build", "argument", "mode"), CASES)
def test_compiled(build: Callable[[Any], tuple[torch.nn.Module, Inputs]], argument: Any, mode: str) -> None:
    """In one graph, which when dynamic serves every length, the same as without compiling."""
    torch._dynamo.reset()
    module, inputs = build(argument)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=mode != "static")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5,) if mode == "static" else range(5, 15):
            tensors, options = inputs(length)
            if "without gradients" not in mode:
                compare(compiled, module, tensors, **options)
                continue
            module.eval()
            with torch.no_grad():
                close(compiled(*tensors, **options), module(*tensors, **options))


def test_autocast() -> None:
    def check(a: Tensor, b: Tensor) -> None:
        assert (a - b).abs().max() <= 0.03 * b.abs().max() + 1e-6

    query = torch.randn(B, L, E)
    padding = added(padding_mask(L, L, L - 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for options in ({}, {"add_bias_kv": True, "add_zero_attn": True}):
            pair = twins("MultiheadAttention", E, H, batch_first=True, **options)
            for need_weights in (False, True):
                compare(*pair, [query] * 3, check, key_padding_mask=padding, need_weights=need_weights)
        for norm_first in (False, True):
            pair = twins("TransformerEncoderLayer", E, H, 24, 0.0, "gelu", norm_first=norm_first, batch_first=True)
            compare(*pair, [query], check, src_key_padding_mask=padding)
            pair = twins("TransformerDecoderLayer", E, H, 24, 0.0, "gelu", norm_first=norm_first, batch_first=True)
            compare(*pair, [query, query], check, memory_key_padding_mask=padding)
