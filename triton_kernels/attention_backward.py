"""The backward pass of attention.py: FlashAttention-2 (arXiv 2307.08691), section 3.1.2.

With P = exp(scale * Q K^T + mask - lse), recomputed tile by tile, and dP = dO V^T:

    delta = rowsum(dO * O) - dlse      dS = P * (dP - delta)
    dV = P^T dO      dK = scale * dS^T Q      dQ = scale * dS K      dmask = dS

With softcap, P = exp(softcap * T + mask - lse), T = tanh(scale * Q K^T / softcap), and dK and dQ have dS * (1 - T^2)
for dS. With dropout, of a mask Z that is 0 or 1 / (1 - p), dV = (P * Z)^T dO and dP = Z * dO V^T. A sink's gradient is
-sum of exp(sink - lse) * delta.

Every gradient is summed by one program in a fixed order, so that the result is the same bits each time. Legend of
shapes: attention_tiles.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_arguments import (
    Arguments,
    chosen_tiles,
    needs_pointers,
    shared_arguments,
    sink_gradients,
    stride_arguments,
    tile_list_arguments,
)
from .attention_dkdv import attention_dkdv_kernel
from .attention_dq import attention_dq_kernel
from .attention_tiles import (
    Tile,
    architecture,
    describe,
    empty_heads,
    launch_options,
    load_rows,
    padded_width,
    use_descriptors,
    within_reach,
)
from .attention_visible import padded_columns

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


def _delta(grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor) -> Tensor:
    """[B, H, Sq] float32: rowsum(grad_output * output) - grad_lse."""
    batch, heads, seqlen_q, value_dim = output.shape
    delta = torch.empty_like(lse)
    if delta.numel() == 0:
        return delta
    with torch.cuda.device_of(output):
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
    return delta


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
    window_left: int | None = None,
    window_right: int | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_state: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(grad_query, grad_key, grad_value, grad_mask, grad_sinks) of the operator of this name in csrc/ops.cpp.

    grad_mask is not yet summed to the mask's own shape; what is not asked for is empty.
    """
    grad_query, grad_key, grad_value = (empty_heads(*x.shape, like=x) for x in (query, key, value))
    grad_output, query, key, value, output = (within_reach(x) for x in (grad_output, query, key, value, output))
    lse = lse.contiguous()
    batch, arguments = shared_arguments(
        query, key, value, mask, scale, is_causal, bottom_right, softcap, window_left, window_right, alibi_slopes,
        dropout_p, dropout_state, cu_seqlens_q, cu_seqlens_k, seqused_k, None, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    heads, kv_heads, seqlen_q, seqlen_k = (arguments[x] for x in ("heads", "kv_heads", "seqlen_q", "seqlen_k"))
    # Zeros, because tiles that no query sees are never visited.
    mask_shape = (batch, heads, seqlen_q, padded_columns(seqlen_k)) if needs_grad_mask else (0,)
    grad_mask = query.new_zeros(mask_shape, dtype=torch.float32)
    delta = _delta(grad_output, grad_lse, output, lse)
    grad_sinks = lse.new_empty(0) if sinks is None else sink_gradients(sinks, lse, delta)
    nothing = batch * heads * seqlen_q == 0 or batch * kv_heads * seqlen_k == 0
    if nothing or cu_seqlens_q is not None:  # there may be rows of no sequence
        grad_query.zero_()
    if nothing or cu_seqlens_k is not None or seqused_k is not None:
        grad_key.zero_()
        grad_value.zero_()
    if nothing:
        return grad_query, grad_key, grad_value, grad_mask[..., :seqlen_k].contiguous(), grad_sinks

    wide_dq = max(query.shape[3], value.shape[3]) > 64
    arch = architecture(query.device)
    tiles = chosen_tiles(query, arguments)
    descriptors = not needs_pointers(arguments) and use_descriptors(grad_output, query, key, value)
    arguments |= {"lse": lse, "delta": delta, "DESCRIPTORS": descriptors}
    arguments |= stride_arguments(grad_output=grad_output)

    def inputs(tile: Tile) -> Arguments:
        found = {"grad_output": grad_output, "query": query, "key": key, "value": value}
        blocks = dict(zip(found, (tile.block_q, tile.block_q, tile.block_k, tile.block_k)))
        return {name: describe(x, blocks[name]) for name, x in found.items()} if descriptors else found

    with torch.cuda.device_of(query):
        attention_dkdv_kernel[(triton.cdiv(seqlen_k, tiles.dkdv.block_k) * batch * kv_heads,)](
            grad_key=grad_key,
            grad_value=grad_value,
            **stride_arguments(grad_key=grad_key, grad_value=grad_value),
            **inputs(tiles.dkdv),
            **arguments,
            **tile_list_arguments(arguments, tiles.dkdv, by_keys=True),
            **launch_options(arch, tiles.dkdv, query.element_size(), softcap is not None),
        )
        attention_dq_kernel[(triton.cdiv(seqlen_q, tiles.dq.block_q) * batch * heads,)](
            grad_query=grad_query,
            grad_mask=grad_mask if needs_grad_mask else None,
            **stride_arguments(grad_query=grad_query),
            **inputs(tiles.dq),
            **arguments,
            **tile_list_arguments(arguments, tiles.dq, by_keys=False),
            **launch_options(arch, tiles.dq, query.element_size(), softcap is not None, wide_dq),
        )
    return grad_query, grad_key, grad_value, grad_mask[..., :seqlen_k].contiguous(), grad_sinks
