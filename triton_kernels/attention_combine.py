"""The last step of attention whose keys were split into parts: unfinished results of the parts become the output.

Each part leaves, for every row, its largest score (peak), and of the weights exp(score - peak) the sum (total) and the
product with the values. Shapes: attention_tiles.py; N = lse.numel() rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_arguments import stride_arguments
from .attention_tiles import LOG2E, padded_width
from .common import finite_peak

# Parts that the kernel takes at a time.
PARTS_AT_ONCE = 16


@triton.jit
def row_offsets(batch, row_heads, rows, strides):
    """int64: of rows of [batch, heads, S, ...]."""
    return batch * strides[0] + row_heads.to(tl.int64) * strides[1] + rows.to(tl.int64) * strides[2]


@triton.jit
def finish_rows(peak, total, sink, kept_scale):
    """(factor, lse): what makes an accumulator the output, and the log-sum-exp, sink (or None) included."""
    factor = 1.0
    if sink is not None:  # one more score, whose value is 0
        new_peak = tl.maximum(peak, sink)
        shift = finite_peak(new_peak)
        factor = tl.exp2((peak - shift) * LOG2E)
        total = total * factor + tl.exp2((sink - shift) * LOG2E)
        peak = new_peak
    if kept_scale is not None:
        factor *= kept_scale
    # A row that saw no key has total 0 and peak -inf: its output is 0 and its lse -inf + log(0) = -inf.
    return factor / tl.where(total == 0.0, 1.0, total), peak + tl.log(total)


@triton.jit(do_not_specialize=["batches", "query_rows", "parts"])
def attention_combine_kernel(
    partial_output,  # [parts, N, Dv] float32; rows whose peak is -inf were not written
    partial_peak,  # [parts, N] float32
    partial_total,  # [parts, N] float32
    output,  # [B, H, Sq, Dv], or [1, H, Tq, Dv]
    lse,  # [B, H, Sq], or [1, H, Tq], float32, contiguous
    sinks,  # [H] float32, or None
    cu_seqlens_q,  # [B + 1] int32, or None
    output_stride_b,
    output_stride_h,
    output_stride_s,
    batches,
    heads,
    query_rows,  # Sq, or Tq
    parts,
    kept_scale,  # of dropout, or None
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """One program: one row of the output, its parts in their order, BLOCK_PARTS at a time."""
    result = tl.program_id(0)
    results = tl.num_programs(0)
    row = result % query_rows
    head = result // query_rows % heads
    batch = (result // query_rows // heads).to(tl.int64)
    claimed = query_rows
    if cu_seqlens_q is not None:
        claimed = tl.load(cu_seqlens_q + batches)
    parts = tl.where(row < claimed, parts, 0)  # nothing was written for rows that belong to no sequence
    sink = None
    if sinks is not None:
        sink = tl.where(row < claimed, tl.load(sinks + head), float("-inf"))

    columns = tl.arange(0, BLOCK_DV)
    accumulator = tl.zeros([BLOCK_DV], tl.float32)
    peak = float("-inf")
    total = 0.0
    for start in range(0, parts, BLOCK_PARTS):
        taken = start + tl.arange(0, BLOCK_PARTS)
        places = taken.to(tl.int64) * results + result
        peaks = tl.load(partial_peak + places, mask=taken < parts, other=float("-inf"))
        totals = tl.load(partial_total + places, mask=taken < parts, other=0.0)
        tile = tl.load(
            partial_output + places[:, None] * VALUE_DIM + columns[None, :],
            mask=(peaks != float("-inf"))[:, None] & (columns < VALUE_DIM)[None, :],
            other=0.0,
        )
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        shift = finite_peak(new_peak)
        decay = tl.exp2((peak - shift) * LOG2E)
        weights = tl.exp2((peaks - shift) * LOG2E)
        accumulator = accumulator * decay + tl.sum(weights[:, None] * tile, 0)
        total = total * decay + tl.sum(weights * totals, 0)
        peak = new_peak

    factor, row_lse = finish_rows(peak, total, sink, kept_scale)
    offset = row_offsets(batch, head, row, (output_stride_b, output_stride_h, output_stride_s))
    tl.store(output + offset + columns, (accumulator * factor).to(output.dtype.element_ty), mask=columns < VALUE_DIM)
    tl.store(lse + result, row_lse)


def combine_parts(
    partial_output: Tensor,
    partial_peak: Tensor,
    partial_total: Tensor,
    output: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    batches: int,
    kept_scale: float | None,
) -> None:
    """Fills output and lse from the parts, shaped as the kernel says."""
    heads, query_rows, value_dim = output.shape[1:]
    with torch.cuda.device_of(output):
        attention_combine_kernel[(lse.numel(),)](
            partial_output=partial_output,
            partial_peak=partial_peak,
            partial_total=partial_total,
            output=output,
            lse=lse,
            sinks=sinks,
            cu_seqlens_q=cu_seqlens_q,
            **stride_arguments(output=output),
            batches=batches,
            heads=heads,
            query_rows=query_rows,
            parts=partial_output.shape[0],
            kept_scale=kept_scale,
            VALUE_DIM=value_dim,
            BLOCK_DV=padded_width(value_dim),
            BLOCK_PARTS=PARTS_AT_ONCE,
        )
