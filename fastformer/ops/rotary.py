"""Rotary position embedding: its backward is the rotation back, and that one's backward the rotation again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops import _common


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """See functional.rotary for the arguments."""
    if _common.ordinary(query, key, cos, sin):
        try:
            dtypes = cos.dtype == sin.dtype and cos.dtype in (torch.float32, query.dtype)
            if dtypes and not _common.needs_grad(cos, sin) and backends.choose("rotary", query) == "cpu":
                return _forward(_common.needs_grad(query, key), query, key, cos, sin, interleaved)
        except _common.CAUGHT:
            pass  # see _common.ordinary
    _check(query, key, cos, sin)
    unsupported = _common.unsupported(query, key, cos, sin)
    if not unsupported and _common.needs_grad(cos, sin):
        unsupported = "gradients by cos and sin"
    record = _common.needs_grad(query, key)
    kernel = backends.choose("rotary", query, unsupported=unsupported, record=record)
    if kernel == "torch":
        return _torch(query, cos, sin, interleaved), _torch(key, cos, sin, interleaved)
    if kernel == "reference":
        turned_query, turned_key = reference.rotary(query, key, cos, sin, interleaved=interleaved)
        return turned_query.to(query.dtype), turned_key.to(key.dtype)
    return _forward(record, query, key, cos, sin, interleaved)


def _check(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        _common.check_tensor(name, tensor)
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be [batch, heads, length, head_dim]")
    batch, _, length, head_dim = query.shape
    _common.check_shape("key", key, (batch, key.shape[1], length, head_dim))
    _common.check_like("key", key, "query", query)
    width = cos.shape[-1] if cos.dim() > 0 else 0
    if tuple(cos.shape) not in ((length, width), (batch, length, width)):
        raise ValueError(f"cos has shape {tuple(cos.shape)}, must be [{length}, R] or [{batch}, {length}, R]")
    if 2 * width > head_dim:
        raise ValueError(f"cos has {width} columns, must have at most half of head_dim, {head_dim // 2}")
    _common.check_shape("sin", sin, cos.shape)
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.dtype != torch.float32:
            _common.check_like(name, tensor, "query", query)
        _common.check_like(name, tensor, "query", query, dtype=False)
    _common.check_like("sin", sin, "cos", cos)


def _torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    turning, rest = x[..., : 2 * width], x[..., 2 * width :]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning[..., :width], turning[..., width:]
    turned = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def _fake(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    batch, heads, length, head_dim = query.shape
    query_out = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    key_out = key.new_empty(batch, length, key.shape[1], head_dim).transpose(1, 2)
    return query_out, key_out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.interleaved = inputs
    ctx.backend = backends.requested()
    ctx.save_for_backward(cos, sin)


def _turn_by(name: str) -> Any:
    """A backward that turns both gradients with the operator ``name``."""

    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        with _common.forwards_backend(ctx):
            record = _common.needs_grad(grad_query, grad_key)
            turned = _turn[name](record, grad_query, grad_key, *ctx.saved_tensors, ctx.interleaved)
        return *turned, None, None, None

    return backward


_turn = {
    name: _common.differentiable(name, _setup_context, _turn_by(inverse))
    for name, inverse in (("rotary_forward", "rotary_backward"), ("rotary_backward", "rotary_forward"))
}
_forward = _turn["rotary_forward"]
for _name in _turn:
    torch.library.register_fake(f"fastformer::{_name}")(_fake)
_common.register("rotary", ["rotary_forward", "rotary_backward"])
