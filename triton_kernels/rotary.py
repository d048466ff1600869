"""Rotary position embedding of query and key in one launch, forward and backward.

Feature pairs (first, second) are turned by an angle (Su et al., "RoFormer", 2021)::

    first' = first * cos - second * sin
    second' = second * cos + first * sin

Shapes: B batch, S length, D head_dim, R angles (2R <= D). Query and key may have different numbers of heads. A row is
one head at one position; rows are numbered over [B, S, heads], the order in which the results lie in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import power_of_two, unit_stride

# (angles up to, rows a program, warps): 16 pairs a thread. Narrower heads share a program so that its 4 warps have
# that much to do and so that rows of one position find their cos and sin in cache.
CONFIGS = (
    (16, 128, 4),
    (32, 64, 4),
    (64, 32, 4),
    (128, 16, 4),
    (256, 8, 4),
    (512, 4, 4),
    (1024, 2, 4),
)
# Beyond the table's last: one row a program and its warps.
WIDE_WARPS = 8


@triton.jit
def _turn(
    input,  # [B, heads, S, D], unit stride in D
    output,  # [B, S, heads, D], contiguous
    cos,  # [(B,) S, R], unit stride in R
    sin,
    program,
    row_count,  # B * S * heads
    heads,
    seqlen,
    head_dim,
    angles,  # R
    stride_batch,
    stride_head,
    stride_position,
    stride_cos_batch,
    stride_cos_position,
    stride_sin_batch,
    stride_sin_position,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least R
    REST: tl.constexpr,  # at least D - 2R, 0 if that is 0
):
    row = (program.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    row_exists = row < row_count
    head = row % heads
    position = (row // heads) % seqlen
    batch = row // heads // seqlen
    from_row = input + batch * stride_batch + head * stride_head + position * stride_position
    to_row = output + row * head_dim

    angle = tl.arange(0, BLOCK)[None, :]
    keep = row_exists & (angle < angles)
    c = tl.load(cos + batch * stride_cos_batch + position * stride_cos_position + angle, mask=keep, other=0.0)
    s = tl.load(sin + batch * stride_sin_batch + position * stride_sin_position + angle, mask=keep, other=0.0)
    c, s = c.to(tl.float32), s.to(tl.float32)
    if INVERSE:
        s = -s
    dtype: tl.constexpr = output.dtype.element_ty
    if INTERLEAVED:
        # Pairs are neighbours: read both at once and take them apart in registers.
        columns = tl.arange(0, 2 * BLOCK)[None, :]
        keep = row_exists & (columns < 2 * angles)
        pairs = tl.load(from_row + columns, mask=keep, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pairs, (ROWS, BLOCK, 2)))
        turned = tl.join(first * c - second * s, second * c + first * s)
        tl.store(to_row + columns, tl.reshape(turned, (ROWS, 2 * BLOCK)).to(dtype), mask=keep)
    else:
        first = tl.load(from_row + angle, mask=keep, other=0.0).to(tl.float32)
        second = tl.load(from_row + angles + angle, mask=keep, other=0.0).to(tl.float32)
        tl.store(to_row + angle, (first * c - second * s).to(dtype), mask=keep)
        tl.store(to_row + angles + angle, (second * c + first * s).to(dtype), mask=keep)
    if REST > 0:
        columns = 2 * angles + tl.arange(0, REST)[None, :]
        keep = row_exists & (columns < head_dim)
        tl.store(to_row + columns, tl.load(from_row + columns, mask=keep, other=0.0), mask=keep)


@triton.jit
def _rotate(
    query,  # [B, query_heads, S, D], unit stride in D
    key,  # [B, key_heads, S, D], likewise
    query_out,  # [B, S, query_heads, D], contiguous
    key_out,
    cos,  # [(B,) S, R], unit stride in R
    sin,
    query_programs,  # the programs that turn query; those behind them turn key
    query_rows,  # B * S * query_heads
    key_rows,
    query_heads,
    key_heads,
    seqlen,
    head_dim,
    angles,  # R
    stride_query_batch,
    stride_query_head,
    stride_query_position,
    stride_key_batch,
    stride_key_head,
    stride_key_position,
    stride_cos_batch,  # 0 where one table serves every batch
    stride_cos_position,
    stride_sin_batch,
    stride_sin_position,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,  # turn back: by the negative angle
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    program = tl.program_id(0)
    if program < query_programs:
        _turn(
            query, query_out, cos, sin, program, query_rows, query_heads, seqlen, head_dim, angles,
            stride_query_batch, stride_query_head, stride_query_position,
            stride_cos_batch, stride_cos_position, stride_sin_batch, stride_sin_position,
            INTERLEAVED, INVERSE, ROWS, BLOCK, REST,
        )  # fmt: skip
    else:
        _turn(
            key, key_out, cos, sin, program - query_programs, key_rows, key_heads, seqlen, head_dim, angles,
            stride_key_batch, stride_key_head, stride_key_position,
            stride_cos_batch, stride_cos_position, stride_sin_batch, stride_sin_position,
            INTERLEAVED, INVERSE, ROWS, BLOCK, REST,
        )  # fmt: skip


def configuration(angles: int) -> tuple[int, int, int]:
    """(rows a program, block, warps) for that many angles."""
    block = power_of_two(max(angles, 1))
    for widest, rows, warps in CONFIGS:
        if angles <= widest:
            return rows, block, warps
    return 1, block, WIDE_WARPS


def _launch(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    batch, query_heads, seqlen, head_dim = query.shape
    key_heads, angles = key.shape[1], cos.shape[-1]
    query_out = torch.empty(batch, seqlen, query_heads, head_dim, dtype=query.dtype, device=query.device)
    key_out = torch.empty(batch, seqlen, key_heads, head_dim, dtype=key.dtype, device=key.device)
    query_rows, key_rows = batch * seqlen * query_heads, batch * seqlen * key_heads
    if query_out.numel() + key_out.numel() > 0:
        query, key, cos, sin = (unit_stride(x) for x in (query, key, cos, sin))
        table_strides = [(x.stride(0) if x.dim() == 3 else 0, x.stride(-2)) for x in (cos, sin)]
        rows, block, warps = configuration(angles)
        rest = head_dim - 2 * angles
        query_programs = triton.cdiv(query_rows, rows)
        with torch.cuda.device_of(query):
            _rotate[(query_programs + triton.cdiv(key_rows, rows),)](
                query,
                key,
                query_out,
                key_out,
                cos,
                sin,
                query_programs,
                query_rows,
                key_rows,
                query_heads,
                key_heads,
                seqlen,
                head_dim,
                angles,
                *query.stride()[:3],
                *key.stride()[:3],
                *table_strides[0],
                *table_strides[1],
                interleaved,
                inverse,
                rows,
                block,
                power_of_two(rest) if rest else 0,
                num_warps=warps,
            )
    return query_out.transpose(1, 2), key_out.transpose(1, 2)


def rotary_forward(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(query_out, key_out), shaped like query and key. Shapes and meaning: csrc/ops.cpp."""
    return _launch(query, key, cos, sin, interleaved, inverse=False)


def rotary_backward(
    grad_query: Tensor, grad_key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """(grad_query_in, grad_key_in): the gradients turned back, shaped like their arguments."""
    return _launch(grad_query, grad_key, cos, sin, interleaved, inverse=True)
