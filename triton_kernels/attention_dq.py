"""The gradients of queries and of an additive mask: a program keeps a tile of queries and walks over the keys it sees.

The formulas: attention_backward.py. Legend of shapes: attention_tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_dkdv import load_lse, recompute_weights
from .attention_tiles import add_biases, cap_scores, load_rows, store_rows
from .attention_visible import mask_end, places, sequence, tile_range, tiles_row, visible_places
from .philox import kept_weights


@triton.jit
def _sum_over_keys(
    grad_query,  # [BLOCK_Q, BLOCK_D] float32: sum of dS K so far
    query_tile,  # [BLOCK_Q, BLOCK_D]
    grad_tile,  # [BLOCK_Q, BLOCK_DV]
    row_lse,  # [BLOCK_Q, 1]
    row_delta,  # [BLOCK_Q, 1]
    first_query,
    key,
    key_strides,  # of batch, head and row
    value,
    value_strides,
    mask,  # of this batch and head
    mask_strides,  # of query and key
    grad_mask,  # [Sq, mask_end(Sk)] of this batch and head, or None
    slope,  # of ALiBi, or None
    dropout_state,
    threshold,
    kept_scale,
    row_sequence,  # batch * heads + head, for dropout
    keys,  # (entry, first, length) of the sequence
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
    DESCRIPTORS: tl.constexpr,
):
    """Adds what the tiles of keys from begin to end give to grad_query, and stores their part of grad_mask."""
    row, column = places(BLOCK_Q, BLOCK_K, False)
    entry, first_row, seqlen_k = keys
    for number in range(begin, end):
        start = number * BLOCK_K
        if listed is not None:
            start = tl.load(listed + number) * BLOCK_K
        first, last = first_row + start, first_row + seqlen_k
        key_tile = load_rows(key, key_strides, entry, kv_head, first, last, HEAD_DIM, BLOCK_K, BLOCK_D, DESCRIPTORS)
        scores = tl.dot(query_tile, key_tile.T, input_precision="ieee")
        scores, factor = cap_scores(scores, scale, softcap)
        terms, factor = add_biases(
            scores, factor, row, column, first_query, start, lengths, band[0], slope, mask, mask_strides, MASK
        )
        exact: tl.constexpr = query_tile.dtype == tl.float32 or MASK == "additive"
        weights = recompute_weights(terms, factor, row_lse, exact)
        if EDGE:
            visible = visible_places(row, column, first_query, start, lengths, band, mask, mask_strides, MASK)
            weights = tl.where(visible, weights, 0.0)
        value_tile = load_rows(
            value, value_strides, entry, kv_head, first, last, VALUE_DIM, BLOCK_K, BLOCK_DV, DESCRIPTORS
        )
        grad_weights = tl.dot(grad_tile, value_tile.T, input_precision="ieee")
        if dropout_state is not None:
            queries = first_query + tl.arange(0, BLOCK_Q)
            keep = kept_weights(dropout_state, threshold, row_sequence, queries, start, BLOCK_K)
            grad_weights = tl.where(keep, grad_weights * kept_scale, 0.0)
        grad_scores = weights * (grad_weights - row_delta)
        if grad_mask is not None:
            queries = first_query + row
            places_k = start + column
            pointers = grad_mask + queries.to(tl.int64) * mask_end(seqlen_k) + places_k
            tl.store(pointers, grad_scores, mask=(queries < lengths[0]) & (places_k < mask_end(seqlen_k)))
        if softcap is not None:
            grad_scores *= 1 - scores * scores
        grad_query = tl.dot(grad_scores.to(key_tile.dtype), key_tile, grad_query, input_precision="ieee")
    return grad_query


@triton.jit
def attention_dq_kernel(
    grad_output,  # [B, H, Sq, Dv], or [1, H, Tq, Dv] if packed; like query, key and value a pointer or a descriptor
    query,  # [B, H, Sq, D], or [1, H, Tq, D]
    key,  # [B, G, Sk, D], or [1, G, Tk, D]
    value,  # [B, G, Sk, Dv], or [1, G, Tk, Dv]
    mask,  # of [B, H, Sq, Sk] by its strides, uint8 (0: hidden) or added, or None
    tiles,  # of list_tiles, if the mask is boolean
    lse,  # [B, H, Sq], or [1, H, Tq], float32, contiguous
    delta,  # like lse
    grad_query,  # [B, H, Sq, D], or [1, H, Tq, D]
    grad_mask,  # [B, H, Sq, mask_end(Sk)] float32, contiguous, zeros, or None
    alibi_slopes,  # [H] or [B, H] float32, contiguous, or None
    dropout_state,  # [2] int64: seed and offset, or None
    cu_seqlens_q,  # [B + 1] int32, or None
    cu_seqlens_k,  # [B + 1] int32, or None
    seqused_k,  # [B] int32, or None
    grad_output_stride_b,
    grad_output_stride_h,
    grad_output_stride_s,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
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
    grad_query_stride_b,
    grad_query_stride_h,
    grad_query_stride_s,
    alibi_stride_b,
    heads,
    kv_heads,
    query_rows,  # Sq, or Tq
    seqlen_q,  # of the longest sequence
    seqlen_k,
    window_left,  # None: no bound
    window_right,
    scale,
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
    DESCRIPTORS: tl.constexpr,
):
    """One program: BLOCK_Q queries of one head, the longest causal rows first."""
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
    slope = alibi_slopes
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + batch.to(tl.int64) * alibi_stride_b + head)
    if MASK != "none":
        mask += batch.to(tl.int64) * mask_stride_b + head.to(tl.int64) * mask_stride_h
    if grad_mask is not None:
        grad_mask += batch_head.to(tl.int64) * seqlen_q * mask_end(seqlen_k)

    grad_strides = (grad_output_stride_b, grad_output_stride_h, grad_output_stride_s)
    query_strides = (query_stride_b, query_stride_h, query_stride_s)
    start, end = first_row + first_query, first_row + seqlen_q
    grad_tile = load_rows(grad_output, grad_strides, entry, head, start, end, VALUE_DIM, BLOCK_Q, BLOCK_DV, DESCRIPTORS)
    query_tile = load_rows(query, query_strides, entry, head, start, end, HEAD_DIM, BLOCK_Q, BLOCK_D, DESCRIPTORS)
    queries = first_query + tl.arange(0, BLOCK_Q)
    first_lse = tl.cast(entry * heads + head, tl.int64) * query_rows + first_row
    row_lse = load_lse(lse + first_lse, queries, seqlen_q)
    row_delta = tl.load(delta + first_lse + queries, mask=queries < seqlen_q, other=0.0)
    grad_query_tile = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

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
        grad_query_tile = _sum_over_keys(
            grad_query_tile, query_tile, grad_tile, row_lse[:, None], row_delta[:, None], first_query,
            key, key_strides, value, value_strides, mask, (mask_stride_q, mask_stride_k), grad_mask, slope,
            dropout_state, threshold, kept_scale, batch_head, keys, kv_head,
            listed, lower if PHASE == 0 else full if PHASE == 1 else upper,
            full if PHASE == 0 else full_end if PHASE == 1 else end_tile,
            lengths, band, scale, softcap,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, MASK, PHASE != 1, DESCRIPTORS,
        )  # fmt: skip

    grad_query_strides = (grad_query_stride_b, grad_query_stride_h, grad_query_stride_s)
    store_rows(grad_query, grad_query_strides, grad_query_tile * scale, entry, head, start, end, HEAD_DIM)
