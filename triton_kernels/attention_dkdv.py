"""The gradients of keys and values: a program keeps a tile of keys and walks over the queries that see it.

The formulas: attention_backward.py. Legend of shapes: attention_tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import LOG2E, add_biases, cap_scores, load_rows, store_rows
from .attention_visible import places, sequence, tile_range, tiles_row, visible_places
from .philox import kept_weights


@triton.jit
def load_lse(lse, queries, seqlen_q):
    """lse of some queries; +inf, so that all weights are 0, for rows that saw no key or don't exist."""
    row_lse = tl.load(lse + queries, mask=queries < seqlen_q, other=float("inf"))
    return tl.where(row_lse == float("-inf"), float("inf"), row_lse)


@triton.jit
def recompute_weights(
    scores,  # a float32 tile of query key^T, or its transpose, to be multiplied by factor
    factor,
    row_lse,  # broadcasting to scores
    EXACT: tl.constexpr,
):
    """P = exp(factor * scores - lse), at most 1 whatever the rounding of huge scores. EXACT, for float32 and for masks
    as large as float32 has them, takes log2(e) last: that rounds least, and does not overflow.
    """
    power = scores * (factor * LOG2E) - row_lse * LOG2E  # one fused multiply-add each
    if EXACT:
        power = (scores * factor - row_lse) * LOG2E
    return tl.exp2(tl.minimum(power, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _sum_over_queries(
    grad_key,  # [BLOCK_K, BLOCK_D] float32: sum of dS^T Q so far
    grad_value,  # [BLOCK_K, BLOCK_DV] float32: sum of P^T dO so far
    key_tile,  # [BLOCK_K, BLOCK_D]
    value_tile,  # [BLOCK_K, BLOCK_DV]
    first_key,
    grad_output,
    grad_strides,  # of batch, head and row
    query,
    query_strides,
    mask,  # of this batch and head
    mask_strides,  # of query and key
    slope,  # of ALiBi, or None
    dropout_state,
    threshold,
    kept_scale,
    row_sequence,  # batch * heads + head, for dropout
    lse,  # [Sq] of this batch and head, like delta
    delta,
    entry,
    head,
    first_row,  # of the sequence's queries
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
    """Adds what the tiles of queries from begin to end of one head give to (grad_key, grad_value).

    Scores are held transposed, [BLOCK_K, BLOCK_Q], so that P^T and dS^T enter their products from registers.
    """
    row, column = places(BLOCK_Q, BLOCK_K, True)
    seqlen_q = lengths[0]
    for number in range(begin, end):
        start = number * BLOCK_Q
        if listed is not None:
            start = tl.load(listed + number) * BLOCK_Q
        queries = start + tl.arange(0, BLOCK_Q)
        first, last = first_row + start, first_row + seqlen_q
        query_tile = load_rows(query, query_strides, entry, head, first, last, HEAD_DIM, BLOCK_Q, BLOCK_D, DESCRIPTORS)
        scores = tl.dot(key_tile, query_tile.T, input_precision="ieee")
        scores, factor = cap_scores(scores, scale, softcap)
        terms, factor = add_biases(
            scores, factor, row, column, start, first_key, lengths, band[0], slope, mask, mask_strides, MASK
        )
        row_lse = load_lse(lse, queries, seqlen_q)
        weights = recompute_weights(
            terms, factor, row_lse[None, :], query_tile.dtype == tl.float32 or MASK == "additive"
        )
        if EDGE:
            visible = visible_places(row, column, start, first_key, lengths, band, mask, mask_strides, MASK)
            weights = tl.where(visible, weights, 0.0)
        grad_tile = load_rows(
            grad_output, grad_strides, entry, head, first, last, VALUE_DIM, BLOCK_Q, BLOCK_DV, DESCRIPTORS
        )
        kept = weights
        if dropout_state is not None:
            keep = kept_weights(dropout_state, threshold, row_sequence, queries, first_key, BLOCK_K).T
            kept = tl.where(keep, weights, 0.0)
        grad_value = tl.dot(kept.to(grad_tile.dtype), grad_tile, grad_value, input_precision="ieee")
        grad_weights = tl.dot(value_tile, grad_tile.T, input_precision="ieee")
        if dropout_state is not None:
            grad_weights = tl.where(keep, grad_weights * kept_scale, 0.0)
        row_delta = tl.load(delta + queries, mask=queries < seqlen_q, other=0.0)
        grad_scores = weights * (grad_weights - row_delta[None, :])
        if softcap is not None:
            grad_scores *= 1 - scores * scores
        grad_key = tl.dot(grad_scores.to(query_tile.dtype), query_tile, grad_key, input_precision="ieee")
    return grad_key, grad_value


@triton.jit
def attention_dkdv_kernel(
    grad_output,  # [B, H, Sq, Dv], or [1, H, Tq, Dv] if packed; like query, key and value a pointer or a descriptor
    query,  # [B, H, Sq, D], or [1, H, Tq, D]
    key,  # [B, G, Sk, D], or [1, G, Tk, D]
    value,  # [B, G, Sk, Dv], or [1, G, Tk, Dv]
    mask,  # of [B, H, Sq, Sk] by its strides, uint8 (0: hidden) or added, or None
    tiles,  # of list_tiles by keys, if the mask is boolean
    lse,  # [B, H, Sq], or [1, H, Tq], float32, contiguous
    delta,  # like lse
    grad_key,  # [B, G, Sk, D], or [1, G, Tk, D]
    grad_value,  # [B, G, Sk, Dv], or [1, G, Tk, Dv]
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
    grad_key_stride_b,
    grad_key_stride_h,
    grad_key_stride_s,
    grad_value_stride_b,
    grad_value_stride_h,
    grad_value_stride_s,
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
    """One program: BLOCK_K keys of one key/value head, against all queries of all heads that share it."""
    program_tiles = tl.cdiv(seqlen_k, BLOCK_K)
    batch_kv_head = tl.program_id(0) // program_tiles
    batch = batch_kv_head // kv_heads
    kv_head = batch_kv_head % kv_heads
    tile = tl.program_id(0) % program_tiles
    first_key = tile * BLOCK_K
    group = heads // kv_heads

    columns = tl.cdiv(seqlen_q, BLOCK_Q)
    key_entry, first_key_row, seqlen_k = sequence(batch, cu_seqlens_k, seqused_k, seqlen_k)
    if (cu_seqlens_k is not None or seqused_k is not None) and first_key >= seqlen_k:
        return
    entry, first_row, seqlen_q = sequence(batch, cu_seqlens_q, None, seqlen_q)
    lengths = (seqlen_q, seqlen_k)
    offset = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
    band = (offset, window_left, window_right)
    band_of_keys = (-offset, window_right, window_left)

    key_strides = (key_stride_b, key_stride_h, key_stride_s)
    value_strides = (value_stride_b, value_stride_h, value_stride_s)
    start, end = first_key_row + first_key, first_key_row + seqlen_k
    key_tile = load_rows(key, key_strides, key_entry, kv_head, start, end, HEAD_DIM, BLOCK_K, BLOCK_D, DESCRIPTORS)
    value_tile = load_rows(
        value, value_strides, key_entry, kv_head, start, end, VALUE_DIM, BLOCK_K, BLOCK_DV, DESCRIPTORS
    )
    grad_key_tile = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_value_tile = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)

    # The last tile of queries may be full: weights of rows that don't exist are 0. Nor do keys beyond seqlen_k make a
    # tile an edge: what they gather stays in rows that are not stored. So only a band or a boolean mask has edges.
    whole_q = tl.cdiv(seqlen_q, BLOCK_Q) * BLOCK_Q
    grad_strides = (grad_output_stride_b, grad_output_stride_h, grad_output_stride_s)
    query_strides = (query_stride_b, query_stride_h, query_stride_s)
    for head in range(kv_head * group, (kv_head + 1) * group):
        first_lse = tl.cast(entry * heads + head, tl.int64) * query_rows + first_row
        slope = alibi_slopes
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + tl.cast(batch, tl.int64) * alibi_stride_b + head)
        head_mask = mask
        if MASK != "none":
            head_mask += tl.cast(batch, tl.int64) * mask_stride_b + tl.cast(head, tl.int64) * mask_stride_h
        listed = tiles
        if tiles is not None:
            listed += tiles_row((tiles_stride_b, tiles_stride_h), batch, head, tile, columns)
        lower, full, full_end, upper, end_tile = tile_range(
            listed, columns, first_key, seqlen_k, whole_q, band_of_keys, BLOCK_K, BLOCK_Q
        )
        # Phase 0 is at the lower edge, 1 is the queries that see all the keys, 2 is at the upper edge.
        for PHASE in tl.static_range(
            1 if window_right is None or tiles is not None else 0, 2 if window_left is None and tiles is None else 3
        ):
            grad_key_tile, grad_value_tile = _sum_over_queries(
                grad_key_tile, grad_value_tile, key_tile, value_tile, first_key,
                grad_output, grad_strides, query, query_strides, head_mask, (mask_stride_q, mask_stride_k), slope,
                dropout_state, threshold, kept_scale, batch * heads + head,
                lse + first_lse, delta + first_lse, entry, head, first_row,
                listed, lower if PHASE == 0 else full if PHASE == 1 else upper,
                full if PHASE == 0 else full_end if PHASE == 1 else end_tile,
                lengths, band, scale, softcap,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, MASK, PHASE != 1, DESCRIPTORS,
            )  # fmt: skip

    if dropout_state is not None:
        grad_value_tile *= kept_scale
    grad_key_strides = (grad_key_stride_b, grad_key_stride_h, grad_key_stride_s)
    grad_value_strides = (grad_value_stride_b, grad_value_stride_h, grad_value_stride_s)
    store_rows(grad_key, grad_key_strides, grad_key_tile * scale, key_entry, kv_head, start, end, HEAD_DIM)
    store_rows(grad_value, grad_value_strides, grad_value_tile, key_entry, kv_head, start, end, VALUE_DIM)
