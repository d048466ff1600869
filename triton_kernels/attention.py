"""Attention, softmax(scale * query key^T + mask) value, without ever holding the Sq x Sk scores.

FlashAttention-2 (arXiv 2307.08691): a program keeps a tile of queries and walks over the keys, with a running maximum
(peak) and sum (total) of each row's softmax; when the peak rises, what was accumulated is scaled down.
Legend of shapes: attention_tiles.py. The backward pass: attention_backward.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_arguments import chosen_tiles, needs_pointers, shared_arguments, stride_arguments, tile_list_arguments
from .attention_backward import attention_backward
from .attention_decode import attention_decode
from .attention_tiles import (
    LOG2E,
    add_biases,
    architecture,
    cap_scores,
    describe,
    empty_heads,
    launch_options,
    load_rows,
    store_rows,
    use_descriptors,
    within_reach,
)
from .attention_visible import places, sequence, tile_range, tiles_row, visible_places
from .common import finite_peak
from .philox import kept_weights

__all__ = ["attention_backward", "attention_forward"]

# With so many rows, queries times the heads that share a key head, attention_decode reads each key once for all.
DECODE_ROWS = 16


@triton.jit
def _load_keys(
    source,  # [B, G, Sk, WIDTH], or [pages, G, PAGE_SIZE, WIDTH]: a pointer, or a descriptor
    strides,  # of batch or page, head and row
    keys,  # (entry, first, length) of the sequence
    pages,  # its numbers of pages, or None
    head,
    start,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """[BLOCK_K, BLOCK_W]: the sequence's keys, or values, from start on, 0 beyond its length."""
    entry, first, length = keys
    if PAGE_SIZE:
        rows = start + tl.arange(0, BLOCK_K)
        page = tl.load(pages + rows // PAGE_SIZE, mask=rows < length, other=0).to(tl.int64)
        offsets = page * strides[0] + (rows % PAGE_SIZE).to(tl.int64) * strides[2]
        columns = tl.arange(0, BLOCK_W)[None, :]
        pointers = source + tl.cast(head, tl.int64) * strides[1] + offsets[:, None] + columns
        return tl.load(pointers, mask=(rows < length)[:, None] & (columns < WIDTH), other=0.0)
    else:
        return load_rows(
            source, strides, entry, head, first + start, first + length, WIDTH, BLOCK_K, BLOCK_W, DESCRIPTORS
        )


@triton.jit
def _attend(
    accumulator,  # [BLOCK_Q, BLOCK_DV] float32: sum of weights * value so far
    peak,  # [BLOCK_Q] float32: largest score so far, before it is multiplied by cap_scores' factor, if there is one
    total,  # [BLOCK_Q] float32: sum of weights so far
    query_tile,  # [BLOCK_Q, BLOCK_D]
    first_query,
    key,
    key_strides,  # of batch, or page, head and row
    value,
    value_strides,
    mask,  # of this batch and head
    mask_strides,  # of query and key
    slope,  # of ALiBi, or None
    dropout_state,
    threshold,
    row_sequence,  # batch * heads + head, for dropout
    keys,  # (entry, first, length) of the sequence
    pages,
    kv_head,
    listed,  # numbers of the tiles, or None: begin to end
    begin,
    end,
    lengths,  # (seqlen_q, seqlen_k)
    band,  # (offset, left, right)
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK: tl.constexpr,
    EDGE: tl.constexpr,  # some queries don't see some of the keys
    PAGE_SIZE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Takes the tiles of keys from begin to end into (accumulator, peak, total)."""
    row, column = places(BLOCK_Q, BLOCK_K, False)
    for number in range(begin, end):
        start = number * BLOCK_K
        if listed is not None:
            start = tl.load(listed + number) * BLOCK_K
        key_tile = _load_keys(
            key, key_strides, keys, pages, kv_head, start, HEAD_DIM, BLOCK_K, BLOCK_D, PAGE_SIZE, DESCRIPTORS
        )
        scores = tl.dot(query_tile, key_tile.T, input_precision="ieee")  # [BLOCK_Q, BLOCK_K]
        scores, factor = cap_scores(scores, scale, softcap)
        scores, factor = add_biases(
            scores, factor, row, column, first_query, start, lengths, band[0], slope, mask, mask_strides, MASK
        )
        if EDGE:
            visible = visible_places(row, column, first_query, start, lengths, band, mask, mask_strides, MASK)
            scores = tl.where(visible, scores, float("-inf"))
        # The peak is one of the scores as they are, and is taken off before they are multiplied: so its own weight is 1
        # however large they are. A fused multiply-add of the scaled ones would round the peak and not the score.
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = finite_peak(new_peak)
        weights = tl.exp2((scores - shift[:, None]) * (factor * LOG2E))
        decay = tl.exp2((peak - shift) * (factor * LOG2E))
        total = total * decay + tl.sum(weights, 1)
        if dropout_state is not None:
            queries = first_query + tl.arange(0, BLOCK_Q)
            kept = kept_weights(dropout_state, threshold, row_sequence, queries, start, BLOCK_K)
            weights = tl.where(kept, weights, 0.0)
        value_tile = _load_keys(
            value, value_strides, keys, pages, kv_head, start, VALUE_DIM, BLOCK_K, BLOCK_DV, PAGE_SIZE, DESCRIPTORS
        )
        accumulator = tl.dot(
            weights.to(value_tile.dtype), value_tile, accumulator * decay[:, None], input_precision="ieee"
        )
        peak = new_peak
    return accumulator, peak, total


@triton.jit
def attention_forward_kernel(
    query,  # [B, H, Sq, D], or [1, H, Tq, D] if packed; like key and value a pointer or a tensor descriptor
    key,  # [B, G, Sk, D], [1, G, Tk, D] if packed, or [pages, G, PAGE_SIZE, D]
    value,  # like key, Dv wide
    mask,  # of [B, H, Sq, Sk] by its strides, uint8 (0: hidden) or added, or None
    tiles,  # of list_tiles, if the mask is boolean
    output,  # [B, H, Sq, Dv], or [1, H, Tq, Dv]
    lse,  # [B, H, Sq], or [1, H, Tq], float32, contiguous
    alibi_slopes,  # [H] or [B, H] float32, contiguous, or None
    sinks,  # [H] float32, or None
    dropout_state,  # [2] int64: seed and offset, or None
    cu_seqlens_q,  # [B + 1] int32, or None
    cu_seqlens_k,  # [B + 1] int32, or None
    seqused_k,  # [B] int32, or None
    block_table,  # [B, pages of a sequence] int32, or None
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,  # of pages, where there are such
    key_stride_h,
    key_stride_s,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    tiles_stride_b,
    tiles_stride_h,
    output_stride_b,
    output_stride_h,
    output_stride_s,
    alibi_stride_b,
    block_table_stride,
    heads,
    kv_heads,
    query_rows,  # Sq, or Tq
    seqlen_q,  # of the longest sequence
    seqlen_k,
    window_left,  # None: no bound
    window_right,
    scale,  # positive
    softcap,  # positive, or None
    threshold,  # dropout_threshold(p)
    kept_scale,  # 1 / (1 - p)
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK: tl.constexpr,  # none, bool or additive
    BOTTOM_RIGHT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0: keys are not paged
    DESCRIPTORS: tl.constexpr,
):
    """One program: BLOCK_Q queries of one head. Programs of a head are neighbours, the longest causal rows first."""
    program_tiles = tl.cdiv(seqlen_q, BLOCK_Q)
    program = tl.program_id(0)
    batch_head = program // program_tiles
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = head // (heads // kv_heads)
    tile = program_tiles - 1 - program % program_tiles
    first_query = tile * BLOCK_Q

    entry, first_row, seqlen_q = sequence(batch, cu_seqlens_q, None, seqlen_q)
    if cu_seqlens_q is not None and first_query >= seqlen_q:
        return
    columns = tl.cdiv(seqlen_k, BLOCK_K)
    keys = sequence(batch, cu_seqlens_k, seqused_k, seqlen_k)
    lengths = (seqlen_q, keys[2])
    band = (keys[2] - seqlen_q if BOTTOM_RIGHT else 0, window_left, window_right)
    pages = block_table
    if block_table is not None:
        pages += batch.to(tl.int64) * block_table_stride
    slope = alibi_slopes
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + batch.to(tl.int64) * alibi_stride_b + head)
    if MASK != "none":
        mask += batch.to(tl.int64) * mask_stride_b + head.to(tl.int64) * mask_stride_h

    query_strides = (query_stride_b, query_stride_h, query_stride_s)
    start, end = first_row + first_query, first_row + seqlen_q
    query_tile = load_rows(query, query_strides, entry, head, start, end, HEAD_DIM, BLOCK_Q, BLOCK_D, DESCRIPTORS)
    accumulator = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    key_strides = (key_stride_b, key_stride_h, key_stride_s)
    value_strides = (value_stride_b, value_stride_h, value_stride_s)
    listed = tiles
    if tiles is not None:
        listed += tiles_row((tiles_stride_b, tiles_stride_h), batch, head, tile, columns)
    lower, full, full_end, upper, end_tile = tile_range(
        listed, columns, first_query, seqlen_q, keys[2], band, BLOCK_Q, BLOCK_K
    )
    # Phase 0 is at the lower edge, which only a window has, 1 is what all queries see, 2 is at the upper edge.
    for PHASE in tl.static_range(1 if window_left is None or tiles is not None else 0, 3):
        accumulator, peak, total = _attend(
            accumulator, peak, total, query_tile, first_query, key, key_strides, value, value_strides,
            mask, (mask_stride_q, mask_stride_k), slope, dropout_state, threshold, batch_head, keys, pages, kv_head,
            listed, lower if PHASE == 0 else full if PHASE == 1 else upper,
            full if PHASE == 0 else full_end if PHASE == 1 else end_tile,
            lengths, band, scale, softcap,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, MASK, PHASE != 1, PAGE_SIZE, DESCRIPTORS,
        )  # fmt: skip

    if alibi_slopes is None and MASK != "additive":  # else the scores were multiplied before the biases were added
        peak *= scale if softcap is None else softcap
    if sinks is not None:  # one more score, whose value is 0
        sink = tl.load(sinks + head)
        new_peak = tl.maximum(peak, sink)
        shift = finite_peak(new_peak)
        decay = tl.exp2((peak - shift) * LOG2E)
        total = total * decay + tl.exp2((sink - shift) * LOG2E)
        accumulator *= decay[:, None]
        peak = new_peak
    # A row that saw no key has total 0: its output is 0 and its lse -inf + log(0) = -inf.
    divisor = tl.where(total == 0.0, 1.0, total)
    if dropout_state is not None:
        divisor /= kept_scale
    accumulator /= divisor[:, None]
    output_strides = (output_stride_b, output_stride_h, output_stride_s)
    store_rows(output, output_strides, accumulator, entry, head, start, end, VALUE_DIM)
    queries = first_query + tl.arange(0, BLOCK_Q)
    rows = tl.cast(entry * heads + head, tl.int64) * query_rows + first_row + queries
    tl.store(lse + rows, peak + tl.log(total), mask=queries < seqlen_q)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    softcap: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_state: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """(output, lse) of the operator of this name in csrc/ops.cpp; num_splits is attention_decode's."""
    packed = cu_seqlens_q is not None
    few = 0 < (max_seqlen_q if packed else query.shape[2]) * query.shape[1] <= DECODE_ROWS * key.shape[1]
    if few or (packed and num_splits == 1):  # the choice must not depend on other sequences then
        return attention_decode(
            query, key, value, mask, scale, is_causal, bottom_right, softcap, window_left, window_right, alibi_slopes,
            sinks, dropout_p, dropout_state, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, max_seqlen_q,
            max_seqlen_k, num_splits,
        )  # fmt: skip
    output = empty_heads(query.shape[0], query.shape[1], query.shape[2], value.shape[3], query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if packed:  # there may be rows of no sequence
        output.zero_()
        lse.fill_(float("-inf"))
    # The kernel takes the peak of the scores before they are multiplied, and hides with -inf, which 0 would make NaN.
    if abs(scale) < torch.finfo(torch.float32).tiny:
        query, scale = query * 0, 1.0
    elif scale < 0:
        query, scale = -query, -scale
    query, key, value = (within_reach(x) for x in (query, key, value))
    block_table = None if block_table is None else block_table.contiguous()
    batch, arguments = shared_arguments(
        query, key, value, mask, scale, is_causal, bottom_right, softcap, window_left, window_right, alibi_slopes,
        dropout_p, dropout_state, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    if lse.numel() == 0 or arguments["seqlen_q"] == 0:
        return output, lse
    if key.shape[2] == 0 and not packed:
        return output.zero_(), lse.fill_(float("-inf")) if sinks is None else lse.copy_(sinks[:, None])

    tile = chosen_tiles(query, arguments, block_table is not None).forward
    descriptors = not needs_pointers(arguments) and use_descriptors(query, key, value)
    with torch.cuda.device_of(query):
        attention_forward_kernel[(triton.cdiv(arguments["seqlen_q"], tile.block_q) * batch * query.shape[1],)](
            query=describe(query, tile.block_q) if descriptors else query,
            key=describe(key, tile.block_k) if descriptors else key,
            value=describe(value, tile.block_k) if descriptors else value,
            output=output,
            lse=lse,
            sinks=None if sinks is None else sinks.contiguous(),
            block_table=block_table,
            **stride_arguments(output=output),
            block_table_stride=0 if block_table is None else block_table.stride(0),
            **arguments,
            **tile_list_arguments(arguments, tile, by_keys=False),
            PAGE_SIZE=0 if block_table is None else key.shape[2],
            DESCRIPTORS=descriptors,
            **launch_options(architecture(query.device), tile, query.element_size(), softcap is not None),
        )
    return output, lse
