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

from .attention_backward import attention_backward
from .attention_tiles import (
    LOG2E,
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

__all__ = ["attention_backward", "attention_forward"]


@triton.jit
def _attend(
    accumulator,  # [BLOCK_Q, BLOCK_DV] float32: sum of weights * value so far
    peak,  # [BLOCK_Q] float32: largest score so far
    total,  # [BLOCK_Q] float32: sum of weights so far
    query_tile,  # [BLOCK_Q, BLOCK_D]
    first_query,
    key,
    key_strides,  # of batch, head and row
    value,
    value_strides,
    mask,  # of this batch and head
    mask_strides,  # of query and key
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
    """Takes the keys from begin to end into (accumulator, peak, total)."""
    for start in range(begin, end, BLOCK_K):
        key_tile = load_rows(key, key_strides, batch, kv_head, start, seqlen_k, HEAD_DIM, BLOCK_K, BLOCK_D, DESCRIPTORS)
        scores = tl.dot(query_tile, key_tile.T, input_precision="ieee")  # [BLOCK_Q, BLOCK_K]
        scores, factor = cap_scores(scores, scale, softcap)
        if EDGE or MASK != "none" or query_tile.dtype == tl.float32:
            scores = mask_scores(
                scores * factor, first_query, start, mask, mask_strides, seqlen_q, seqlen_k, causal_offset,
                MASK, EDGE, IS_CAUSAL, False,
            )  # fmt: skip
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # -inf - -inf would be NaN
            weights = tl.exp2((scores - shift[:, None]) * LOG2E)
        else:
            new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
            shift = new_peak
            weights = tl.exp2(scores * (factor * LOG2E) - (shift * LOG2E)[:, None])  # one fused multiply-add each
        decay = tl.exp2((peak - shift) * LOG2E)
        total = total * decay + tl.sum(weights, 1)
        value_tile = load_rows(
            value, value_strides, batch, kv_head, start, seqlen_k, VALUE_DIM, BLOCK_K, BLOCK_DV, DESCRIPTORS
        )
        accumulator = tl.dot(
            weights.to(value_tile.dtype), value_tile, accumulator * decay[:, None], input_precision="ieee"
        )
        peak = new_peak
    return accumulator, peak, total


@triton.jit
def attention_forward_kernel(
    query,  # [B, H, Sq, D], like key and value a pointer or a tensor descriptor
    key,  # [B, G, Sk, D]
    value,  # [B, G, Sk, Dv]
    mask,  # broadcasting to [B, H, Sq, Sk], or None
    output,  # [B, H, Sq, Dv]
    lse,  # [B, H, Sq] float32, contiguous
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
    output_stride_b,
    output_stride_h,
    output_stride_s,
    heads,
    kv_heads,
    seqlen_q,
    seqlen_k,
    causal_offset,  # query i sees keys up to i + causal_offset
    scale,  # positive or 0
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
    """One program: BLOCK_Q queries of one head. Programs of a head are neighbours, the longest causal rows first."""
    tiles = tl.cdiv(seqlen_q, BLOCK_Q)
    program = tl.program_id(0)
    batch_head = program // tiles
    batch = batch_head // heads
    head = batch_head % heads
    kv_head = head // (heads // kv_heads)
    first_query = (tiles - 1 - program % tiles) * BLOCK_Q

    query_strides = (query_stride_b, query_stride_h, query_stride_s)
    query_tile = load_rows(
        query, query_strides, batch, head, first_query, seqlen_q, HEAD_DIM, BLOCK_Q, BLOCK_D, DESCRIPTORS
    )
    if MASK != "none":
        mask += batch.to(tl.int64) * mask_stride_b + head.to(tl.int64) * mask_stride_h
    queries = first_query + tl.arange(0, BLOCK_Q)
    accumulator = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)

    full, end = visible_keys(first_query, seqlen_q, seqlen_k, causal_offset, BLOCK_Q, BLOCK_K, IS_CAUSAL)
    key_strides = (key_stride_b, key_stride_h, key_stride_s)
    value_strides = (value_stride_b, value_stride_h, value_stride_s)
    for EDGE in tl.static_range(2):
        accumulator, peak, total = _attend(
            accumulator, peak, total, query_tile, first_query, key, key_strides, value, value_strides,
            mask, (mask_stride_q, mask_stride_k), batch, kv_head, full if EDGE else 0, end if EDGE else full,
            seqlen_q, seqlen_k, causal_offset, scale, softcap,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_K, MASK, EDGE, IS_CAUSAL, DESCRIPTORS,
        )  # fmt: skip

    # A row that saw no key has total 0: its output is 0 and its lse -inf + log(0) = -inf.
    accumulator /= tl.where(total == 0.0, 1.0, total)[:, None]
    output_strides = (output_stride_b, output_stride_h, output_stride_s)
    store_rows(output, output_strides, accumulator, batch, head, first_query, seqlen_q, VALUE_DIM)
    tl.store(lse + batch_head.to(tl.int64) * seqlen_q + queries, peak + tl.log(total), mask=queries < seqlen_q)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(output [B, H, Sq, Dv], lse [B, H, Sq] float32) of query [B, H, Sq, D], key [B, G, Sk, D], value [B, G, Sk, Dv].

    mask broadcasts to [B, H, Sq, Sk]: bool (True may attend), or float32 or the query's dtype (added). With softcap the
    scores before the mask are softcap * tanh(scale * query key^T / softcap).
    """
    batch, heads, seqlen_q, head_dim = query.shape
    kv_heads, seqlen_k, value_dim = key.shape[1], key.shape[2], value.shape[3]
    output = empty_heads(batch, heads, seqlen_q, value_dim, query)
    lse = query.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
    if lse.numel() == 0 or seqlen_k == 0:
        return output.zero_(), lse.fill_(float("-inf"))
    if scale < 0:  # the kernel takes the peak of the raw scores times scale
        query, scale = -query, -scale
    query, key, value = (within_reach(x) for x in (query, key, value))
    mask, mask_strides, mask_kind = mask_arguments(mask, (batch, heads, seqlen_q, seqlen_k))
    crowded = mask is not None or softcap is not None
    tile = select_tiles(architecture(query.device), head_dim, value_dim, query.element_size(), crowded).forward
    descriptors = use_descriptors(query, key, value)
    with torch.cuda.device_of(query):
        attention_forward_kernel[(triton.cdiv(seqlen_q, tile.block_q) * batch * heads,)](
            describe(query, tile.block_q) if descriptors else query,
            describe(key, tile.block_k) if descriptors else key,
            describe(value, tile.block_k) if descriptors else value,
            mask,
            output,
            lse,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *mask_strides,
            *output.stride()[:3],
            heads,
            kv_heads,
            seqlen_q,
            seqlen_k,
            seqlen_k - seqlen_q if bottom_right else 0,
            scale,
            softcap_argument(softcap),
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            BLOCK_D=padded_width(head_dim),
            BLOCK_DV=padded_width(value_dim),
            MASK=mask_kind,
            IS_CAUSAL=is_causal,
            DESCRIPTORS=descriptors,
            **launch_options(tile, softcap is not None),
        )
    return output, lse
