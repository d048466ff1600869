"""The backward pass of attention.py: FlashAttention-2 (arXiv 2307.08691), section 3.1.2.

With P = exp(scale * Q K^T + mask - lse), recomputed tile by tile, and dP = dO V^T:

    delta = rowsum(dO * O) - dlse      dS = P * (dP - delta)
    dV = P^T dO      dK = scale * dS^T Q      dQ = scale * dS K      dmask = dS

With softcap, P = exp(softcap * T + mask - lse), T = tanh(scale * Q K^T / softcap), and dK and dQ have dS * (1 - T^2)
for dS.

Every gradient is summed by one program in a fixed order, so that the result is the same bits each time. Legend of
shapes: attention_tiles.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_tiles import (
    LOG2E,
    Tile,
    architecture,
    cap_scores,
    describe,
    empty_heads,
    launch_options,
    load_rows,
    mask_arguments,
    mask_scores,
    padded_width,
    select_tiles,
    softcap_argument,
    store_rows,
    use_descriptors,
    visible_keys,
    within_reach,
)

DELTA_ROWS = 64  # queries a program of attention_delta_kernel takes


@triton.jit
def attention_delta_kernel(
    grad_output,  # [B, H, Sq, Dv]
    output,  # [B, H, Sq, Dv]
    grad_lse,  # [B, H, Sq] float32, contiguous, or None
    lse,  # [B, H, Sq] float32, contiguous
    delta,  # [B, H, Sq] float32, contiguous: rowsum(grad_output * output) - grad_lse
    grad_output_stride_b,
    grad_output_stride_h,
    grad_output_stride_s,
    output_stride_b,
    output_stride_h,
    output_stride_s,
    heads,
    seqlen_q,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One program: BLOCK_Q queries of one head."""
    tiles = tl.cdiv(seqlen_q, BLOCK_Q)
    batch_head = tl.program_id(0) // tiles
    batch = batch_head // heads
    head = batch_head % heads
    first_query = tl.program_id(0) % tiles * BLOCK_Q

    grad_strides = (grad_output_stride_b, grad_output_stride_h, grad_output_stride_s)
    output_strides = (output_stride_b, output_stride_h, output_stride_s)
    grad_tile = load_rows(
        grad_output, grad_strides, batch, head, first_query, seqlen_q, VALUE_DIM, BLOCK_Q, BLOCK_DV, False
    )
    output_tile = load_rows(
        output, output_strides, batch, head, first_query, seqlen_q, VALUE_DIM, BLOCK_Q, BLOCK_DV, False
    )
    row_delta = tl.sum(grad_tile.to(tl.float32) * output_tile.to(tl.float32), 1)  # [BLOCK_Q]

    queries = first_query + tl.arange(0, BLOCK_Q)
    inside = queries < seqlen_q
    rows = batch_head.to(tl.int64) * seqlen_q + queries
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + rows, mask=inside, other=0.0)
    # Nothing flows back through a row that saw no key, whatever came in.
    row_delta = tl.where(tl.load(lse + rows, mask=inside, other=0.0) == float("-inf"), 0.0, row_delta)
    tl.store(delta + rows, row_delta, mask=inside)


@triton.jit
def _load_lse(lse, queries, seqlen_q):
    """lse of some queries; +inf, so that all weights are 0, for rows that saw no key or don't exist."""
    row_lse = tl.load(lse + queries, mask=queries < seqlen_q, other=float("inf"))
    return tl.where(row_lse == float("-inf"), float("inf"), row_lse)


@triton.jit
def _recompute_weights(
    scores,  # float32 tile of query key^T, or its transpose
    row_lse,  # broadcasting to scores
    first_query,
    first_key,
    mask,
    mask_strides,
    seqlen_q,
    seqlen_k,
    causal_offset,
    scale,
    MASK: tl.constexpr,
    EDGE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """P = exp(scale * scores + mask - lse); EXACT, for float32, takes log2(e) last and so rounds least."""
    if EDGE or MASK != "none" or EXACT:
        scores = mask_scores(
            scores * scale, first_query, first_key, mask, mask_strides, seqlen_q, seqlen_k, causal_offset,
            MASK, EDGE, IS_CAUSAL, TRANSPOSED,
        )  # fmt: skip
        return tl.exp2((scores - row_lse) * LOG2E)
    return tl.exp2(scores * (scale * LOG2E) - row_lse * LOG2E)  # one fused multiply-add each


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
    lse,  # [Sq] of this batch and head, like delta
    delta,
    batch,
    head,
    begin,
    end,
    seqlen_q,
    seqlen_k,
    causal_offset,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MASK: tl.constexpr,
    EDGE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Adds what the queries from begin to end of one head give to (grad_key, grad_value).

    Scores are held transposed, [BLOCK_K, BLOCK_Q], so that P^T and dS^T enter their products from registers.
    """
    for start in range(begin, end, BLOCK_Q):
        queries = start + tl.arange(0, BLOCK_Q)
        query_tile = load_rows(
            query, query_strides, batch, head, start, seqlen_q, HEAD_DIM, BLOCK_Q, BLOCK_D, DESCRIPTORS
        )
        scores = tl.dot(key_tile, query_tile.T, input_precision="ieee")
        scores, factor = cap_scores(scores, scale, softcap)
        row_lse = _load_lse(lse, queries, seqlen_q)
        weights = _recompute_weights(
            scores, row_lse[None, :], start, first_key, mask, mask_strides, seqlen_q, seqlen_k, causal_offset,
            factor, MASK, EDGE, IS_CAUSAL, True, query_tile.dtype == tl.float32,
        )  # fmt: skip
        grad_tile = load_rows(
            grad_output, grad_strides, batch, head, start, seqlen_q, VALUE_DIM, BLOCK_Q, BLOCK_DV, DESCRIPTORS
        )
        grad_value = tl.dot(weights.to(grad_tile.dtype), grad_tile, grad_value, input_precision="ieee")
        grad_weights = tl.dot(value_tile, grad_tile.T, input_precision="ieee")
        row_delta = tl.load(delta + queries, mask=queries < seqlen_q, other=0.0)
        grad_scores = weights * (grad_weights - row_delta[None, :])
        if softcap is not None:
            grad_scores *= 1 - scores * scores
        grad_key = tl.dot(grad_scores.to(query_tile.dtype), query_tile, grad_key, input_precision="ieee")
    return grad_key, grad_value


@triton.jit
def attention_dkdv_kernel(
    grad_output,  # [B, H, Sq, Dv]; like query, key and value a pointer or a tensor descriptor
    query,  # [B, H, Sq, D]
    key,  # [B, G, Sk, D]
    value,  # [B, G, Sk, Dv]
    mask,  # broadcasting to [B, H, Sq, Sk], or None
    lse,  # [B, H, Sq] float32, contiguous
    delta,  # [B, H, Sq] float32, contiguous
    grad_key,  # [B, G, Sk, D]
    grad_value,  # [B, G, Sk, Dv]
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
    grad_key_stride_b,
    grad_key_stride_h,
    grad_key_stride_s,
    grad_value_stride_b,
    grad_value_stride_h,
    grad_value_stride_s,
    heads,
    kv_heads,
    seqlen_q,
    seqlen_k,
    causal_offset,  # query i sees keys up to i + causal_offset
    scale,
    softcap,  # positive, or None
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK: tl.constexpr,  # none, bool or additive
    IS_CAUSAL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One program: BLOCK_K keys of one key/value head, against all queries of all heads that share it."""
    tiles = tl.cdiv(seqlen_k, BLOCK_K)
    batch_kv_head = tl.program_id(0) // tiles
    batch = batch_kv_head // kv_heads
    kv_head = batch_kv_head % kv_heads
    first_key = tl.program_id(0) % tiles * BLOCK_K
    group = heads // kv_heads

    key_strides = (key_stride_b, key_stride_h, key_stride_s)
    value_strides = (value_stride_b, value_stride_h, value_stride_s)
    key_tile = load_rows(key, key_strides, batch, kv_head, first_key, seqlen_k, HEAD_DIM, BLOCK_K, BLOCK_D, DESCRIPTORS)
    value_tile = load_rows(
        value, value_strides, batch, kv_head, first_key, seqlen_k, VALUE_DIM, BLOCK_K, BLOCK_DV, DESCRIPTORS
    )
    grad_key_tile = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_value_tile = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)

    # Queries before begin see none of these keys, tiles of queries from full on see all of them. Keys beyond seqlen_k
    # need no mask: what they gather stays in rows that are not stored.
    begin = 0
    full = 0
    if IS_CAUSAL:
        begin = tl.maximum(first_key - causal_offset, 0) // BLOCK_Q * BLOCK_Q
        full = tl.cdiv(tl.maximum(first_key + BLOCK_K - 1 - causal_offset, 0), BLOCK_Q) * BLOCK_Q
        full = tl.minimum(full, tl.cdiv(seqlen_q, BLOCK_Q) * BLOCK_Q)

    grad_strides = (grad_output_stride_b, grad_output_stride_h, grad_output_stride_s)
    query_strides = (query_stride_b, query_stride_h, query_stride_s)
    for head in range(kv_head * group, (kv_head + 1) * group):
        first_row = tl.cast(batch * heads + head, tl.int64) * seqlen_q
        head_mask = mask
        if MASK != "none":
            head_mask += tl.cast(batch, tl.int64) * mask_stride_b + tl.cast(head, tl.int64) * mask_stride_h
        for EDGE in tl.static_range(1 if IS_CAUSAL else 0, -1, -1):
            grad_key_tile, grad_value_tile = _sum_over_queries(
                grad_key_tile, grad_value_tile, key_tile, value_tile, first_key,
                grad_output, grad_strides, query, query_strides, head_mask, (mask_stride_q, mask_stride_k),
                lse + first_row, delta + first_row, batch, head, begin if EDGE else full, full if EDGE else seqlen_q,
                seqlen_q, seqlen_k, causal_offset, scale, softcap,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_Q, MASK, EDGE, IS_CAUSAL, DESCRIPTORS,
            )  # fmt: skip

    grad_key_strides = (grad_key_stride_b, grad_key_stride_h, grad_key_stride_s)
    grad_value_strides = (grad_value_stride_b, grad_value_stride_h, grad_value_stride_s)
    store_rows(grad_key, grad_key_strides, grad_key_tile * scale, batch, kv_head, first_key, seqlen_k, HEAD_DIM)
    store_rows(grad_value, grad_value_strides, grad_value_tile, batch, kv_head, first_key, seqlen_k, VALUE_DIM)


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
    grad_mask,  # [Sq, Sk] of this batch and head, or None
    batch,
    kv_head,
    begin,
    end,
    seqlen_q,
    seqlen_k,
    causal_offset,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK: tl.constexpr,
    EDGE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Adds what the keys from begin to end give to grad_query, and stores their part of grad_mask."""
    for start in range(begin, end, BLOCK_K):
        key_tile = load_rows(key, key_strides, batch, kv_head, start, seqlen_k, HEAD_DIM, BLOCK_K, BLOCK_D, DESCRIPTORS)
        scores = tl.dot(query_tile, key_tile.T, input_precision="ieee")
        scores, factor = cap_scores(scores, scale, softcap)
        weights = _recompute_weights(
            scores, row_lse, first_query, start, mask, mask_strides, seqlen_q, seqlen_k, causal_offset, factor,
            MASK, EDGE, IS_CAUSAL, False, query_tile.dtype == tl.float32,
        )  # fmt: skip
        value_tile = load_rows(
            value, value_strides, batch, kv_head, start, seqlen_k, VALUE_DIM, BLOCK_K, BLOCK_DV, DESCRIPTORS
        )
        grad_weights = tl.dot(grad_tile, value_tile.T, input_precision="ieee")
        grad_scores = weights * (grad_weights - row_delta)
        if grad_mask is not None:
            queries = first_query + tl.arange(0, grad_scores.shape[0])[:, None]
            keys = start + tl.arange(0, BLOCK_K)[None, :]
            pointers = grad_mask + queries.to(tl.int64) * seqlen_k + keys
            tl.store(pointers, grad_scores, mask=(queries < seqlen_q) & (keys < seqlen_k))
        if softcap is not None:
            grad_scores *= 1 - scores * scores
        grad_query = tl.dot(grad_scores.to(key_tile.dtype), key_tile, grad_query, input_precision="ieee")
    return grad_query


@triton.jit
def attention_dq_kernel(
    grad_output,  # [B, H, Sq, Dv]; like query, key and value a pointer or a tensor descriptor
    query,  # [B, H, Sq, D]
    key,  # [B, G, Sk, D]
    value,  # [B, G, Sk, Dv]
    mask,  # broadcasting to [B, H, Sq, Sk], or None
    lse,  # [B, H, Sq] float32, contiguous
    delta,  # [B, H, Sq] float32, contiguous
    grad_query,  # [B, H, Sq, D]
    grad_mask,  # [B, H, Sq, Sk] float32, contiguous, zeros, or None
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
    grad_query_stride_b,
    grad_query_stride_h,
    grad_query_stride_s,
    heads,
    kv_heads,
    seqlen_q,
    seqlen_k,
    causal_offset,  # query i sees keys up to i + causal_offset
    scale,
    softcap,  # positive, or None
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK: tl.constexpr,  # none, bool or additive
    IS_CAUSAL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One program: BLOCK_Q queries of one head, the longest causal rows first."""
    tiles = tl.cdiv(seqlen_q, BLOCK_Q)
    program = tl.program_id(0)
    batch_head = program // tiles
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = head // (heads // kv_heads)
    first_query = (tiles - 1 - program % tiles) * BLOCK_Q

    grad_strides = (grad_output_stride_b, grad_output_stride_h, grad_output_stride_s)
    query_strides = (query_stride_b, query_stride_h, query_stride_s)
    grad_tile = load_rows(
        grad_output, grad_strides, batch, head, first_query, seqlen_q, VALUE_DIM, BLOCK_Q, BLOCK_DV, DESCRIPTORS
    )
    query_tile = load_rows(
        query, query_strides, batch, head, first_query, seqlen_q, HEAD_DIM, BLOCK_Q, BLOCK_D, DESCRIPTORS
    )
    queries = first_query + tl.arange(0, BLOCK_Q)
    first_row = batch_head.to(tl.int64) * seqlen_q
    row_lse = _load_lse(lse + first_row, queries, seqlen_q)
    row_delta = tl.load(delta + first_row + queries, mask=queries < seqlen_q, other=0.0)
    if MASK != "none":
        mask += batch.to(tl.int64) * mask_stride_b + head.to(tl.int64) * mask_stride_h
    if grad_mask is not None:
        grad_mask += batch_head.to(tl.int64) * seqlen_q * seqlen_k
    grad_query_tile = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    full, end = visible_keys(first_query, seqlen_q, seqlen_k, causal_offset, BLOCK_Q, BLOCK_K, IS_CAUSAL)
    key_strides = (key_stride_b, key_stride_h, key_stride_s)
    value_strides = (value_stride_b, value_stride_h, value_stride_s)
    for EDGE in tl.static_range(2):
        grad_query_tile = _sum_over_keys(
            grad_query_tile, query_tile, grad_tile, row_lse[:, None], row_delta[:, None], first_query,
            key, key_strides, value, value_strides, mask, (mask_stride_q, mask_stride_k), grad_mask, batch, kv_head,
            full if EDGE else 0, end if EDGE else full, seqlen_q, seqlen_k, causal_offset, scale, softcap,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_K, MASK, EDGE, IS_CAUSAL, DESCRIPTORS,
        )  # fmt: skip

    grad_query_strides = (grad_query_stride_b, grad_query_stride_h, grad_query_stride_s)
    store_rows(grad_query, grad_query_strides, grad_query_tile * scale, batch, head, first_query, seqlen_q, HEAD_DIM)


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    softcap: float | None,
    needs_grad_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_query, grad_key, grad_value, grad_mask) in the shapes of attention_forward's arguments.

    grad_mask is [B, H, Sq, Sk] float32, not yet summed to the mask's own shape; empty unless needs_grad_mask.
    """
    batch, heads, seqlen_q, head_dim = query.shape
    kv_heads, seqlen_k, value_dim = key.shape[1], key.shape[2], value.shape[3]
    grad_query = empty_heads(batch, heads, seqlen_q, head_dim, query)
    grad_key = empty_heads(batch, kv_heads, seqlen_k, head_dim, key)
    grad_value = empty_heads(batch, kv_heads, seqlen_k, value_dim, value)
    shape = (batch, heads, seqlen_q, seqlen_k)
    # Zeros, because tiles beyond the causal diagonal are never visited.
    grad_mask = query.new_zeros(shape if needs_grad_mask else 0, dtype=torch.float32)
    if query.numel() == 0 or key.numel() == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_(), grad_mask

    grad_output, query, key, value, output = (within_reach(x) for x in (grad_output, query, key, value, output))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(query):
        attention_delta_kernel[(triton.cdiv(seqlen_q, DELTA_ROWS) * batch * heads,)](
            grad_output,
            output,
            None if grad_lse is None else grad_lse.contiguous(),
            lse,
            delta,
            *grad_output.stride()[:3],
            *output.stride()[:3],
            heads,
            seqlen_q,
            VALUE_DIM=value_dim,
            BLOCK_DV=padded_width(value_dim),
            BLOCK_Q=DELTA_ROWS,
        )

    crowded = mask is not None or softcap is not None
    tiles = select_tiles(architecture(query.device), head_dim, value_dim, query.element_size(), crowded)
    mask, mask_strides, mask_kind = mask_arguments(mask, shape)
    strides = [*grad_output.stride()[:3], *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides]
    offset = seqlen_k - seqlen_q if bottom_right else 0
    sizes = [heads, kv_heads, seqlen_q, seqlen_k, offset, scale, softcap_argument(softcap)]
    descriptors = use_descriptors(grad_output, query, key, value)
    constants = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": padded_width(head_dim),
        "BLOCK_DV": padded_width(value_dim),
        "MASK": mask_kind,
        "IS_CAUSAL": is_causal,
        "DESCRIPTORS": descriptors,
    }

    def inputs(tile: Tile) -> list[Tensor | TensorDescriptor]:
        if not descriptors:
            return [grad_output, query, key, value]
        per_query = [describe(x, tile.block_q) for x in (grad_output, query)]
        per_key = [describe(x, tile.block_k) for x in (key, value)]
        return per_query + per_key

    with torch.cuda.device_of(query):
        attention_dkdv_kernel[(triton.cdiv(seqlen_k, tiles.dkdv.block_k) * batch * kv_heads,)](
            *inputs(tiles.dkdv),
            mask,
            lse,
            delta,
            grad_key,
            grad_value,
            *strides,
            *grad_key.stride()[:3],
            *grad_value.stride()[:3],
            *sizes,
            **constants,
            **launch_options(tiles.dkdv, softcap is not None),
        )
        attention_dq_kernel[(triton.cdiv(seqlen_q, tiles.dq.block_q) * batch * heads,)](
            *inputs(tiles.dq),
            mask,
            lse,
            delta,
            grad_query,
            grad_mask if needs_grad_mask else None,
            *strides,
            *grad_query.stride()[:3],
            *sizes,
            **constants,
            **launch_options(tiles.dq, softcap is not None and max(head_dim, value_dim) <= 64),
        )
    return grad_query, grad_key, grad_value, grad_mask
