"""The feed-forward layer: activation(x W1^T + b1) W2^T + b2, plain or gated, forward and backward.

Shapes: N rows (all leading dimensions together), C columns, F hidden width, C2 output width. The first product applies
bias, activation and gate to its sums before they leave the registers; so does the backward with the activation's slope.
Products with nothing to fuse are the library's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import GROUP_M, Tile, device_class, halves, operands, product, product_pair, tile_place

# By device class and bytes an element; the budget is in gemm.py. A gated tile keeps two sums, so has half the columns.
FORWARD_TILES = {
    ("sm_90", 2): Tile(128, 256, 64, num_warps=8, num_stages=3),
    ("sm_80", 2): Tile(128, 128, 32, num_warps=8, num_stages=4),
    ("gfx942", 2): Tile(128, 128, 32, num_warps=8, num_stages=2),
    ("sm_90", 4): Tile(64, 64, 16, num_warps=4, num_stages=3),
    ("sm_80", 4): Tile(64, 64, 16, num_warps=4, num_stages=3),
    ("gfx942", 4): Tile(64, 64, 16, num_warps=4, num_stages=2),
}
GATED_TILES = {
    ("sm_90", 2): Tile(128, 128, 64, num_warps=8, num_stages=3),
    ("sm_80", 2): Tile(128, 64, 32, num_warps=8, num_stages=4),
    ("gfx942", 2): Tile(128, 64, 32, num_warps=8, num_stages=2),
    ("sm_90", 4): Tile(64, 32, 16, num_warps=4, num_stages=3),
    ("sm_80", 4): Tile(64, 32, 16, num_warps=4, num_stages=3),
    ("gfx942", 4): Tile(64, 32, 16, num_warps=4, num_stages=2),
}
# The hidden values and what becomes of them need registers beside the sums: tiles of half the forward's columns.
BACKWARD_TILES = {
    ("sm_90", 2): Tile(128, 128, 64, num_warps=8, num_stages=4),
    ("sm_80", 2): Tile(128, 128, 32, num_warps=8, num_stages=4),
    ("gfx942", 2): Tile(128, 128, 32, num_warps=8, num_stages=2),
    ("sm_90", 4): Tile(64, 64, 16, num_warps=4, num_stages=3),
    ("sm_80", 4): Tile(64, 64, 16, num_warps=4, num_stages=3),
    ("gfx942", 4): Tile(64, 64, 16, num_warps=4, num_stages=2),
}
# Few rows are bound by reading the weights: narrow tiles, so that every multiprocessor reads some. By bytes an element.
FEW_ROWS = 32
FEW_ROWS_TILES = {
    2: Tile(FEW_ROWS, 64, 64, num_warps=4, num_stages=3),
    4: Tile(FEW_ROWS, 64, 16, num_warps=4, num_stages=2),
}


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _sigmoid_and_slope(x):
    """sigmoid(x), and sigmoid(x) (1 - sigmoid(x)) without the subtraction, which would cancel."""
    exponential = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + exponential)
    smaller = exponential * larger
    return tl.where(x < 0.0, smaller, larger), smaller * larger


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh(u)) = sigmoid(2u), which can't overflow
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":  # NaN stays NaN
        return tl.where(x < 0.0, 0.0, x)
    else:
        tl.static_assert(ACTIVATION == "silu")
        return x * _sigmoid(x)


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """The activation's derivative at x."""
    if ACTIVATION == "gelu":  # the normal distribution's integral, and x times its density
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        gate, gate_slope = _sigmoid_and_slope(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return gate + x * gate_slope * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "silu")
        gate, gate_slope = _sigmoid_and_slope(x)
        return gate + x * gate_slope


@triton.jit
def _store_activated(gate, up, bias1, activated, hidden, row, column, N, F, ACTIVATION: tl.constexpr):
    """Ends the forward for the tile ``up`` of input W1^T at (row, column); ``gate``, of input Wg^T, or None."""
    rows = row + tl.arange(0, up.shape[0])
    columns = column + tl.arange(0, up.shape[1])
    keep = (rows < N)[:, None] & (columns < F)[None, :]
    offsets = rows.to(tl.int64)[:, None] * F + columns[None, :]
    dtype = activated.dtype.element_ty
    if bias1 is not None:
        up += tl.load(bias1 + columns, mask=columns < F, other=0.0).to(tl.float32)[None, :]
    if gate is None:
        if hidden is not None:
            tl.store(hidden + offsets, up.to(dtype), mask=keep)
        result = _activate(up, ACTIVATION)
    else:
        if hidden is not None:
            gate_offsets = offsets + rows.to(tl.int64)[:, None] * F
            tl.store(hidden + gate_offsets, gate.to(dtype), mask=keep)
            tl.store(hidden + gate_offsets + F, up.to(dtype), mask=keep)
        result = _activate(gate, ACTIVATION) * up
    tl.store(activated + offsets, result.to(dtype), mask=keep)


@triton.jit(do_not_specialize=["N"])
def _forward(
    input,  # [N, C]
    weight1,  # [F, C]
    weight_gate,  # [F, C], or None
    bias1,  # [F], or None
    activated,  # [N, F], contiguous
    hidden,  # [N, F], or [N, 2F] = gate beside up, contiguous; None where it is not saved
    N,
    F,
    C,
    stride_input,
    stride_input_c,
    stride_weight1,
    stride_weight1_c,
    stride_gate,
    stride_gate_c,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    row, column = tile_place(tl.program_id(0), N, F, BLOCK_M, BLOCK_N, GROUP_M)
    if weight_gate is None:
        up = product(
            input, weight1, row, column, N, F, C, stride_input, stride_input_c, stride_weight1, stride_weight1_c,
            BLOCK_M, BLOCK_N, BLOCK_K, False, False, DESCRIPTORS,
        )  # fmt: skip
        gate_left, gate_right = None, None
    else:
        gate, up = product_pair(
            input, weight_gate, weight1, row, column, N, F, C,
            stride_input, stride_input_c, stride_gate, stride_gate_c, stride_weight1, stride_weight1_c,
            BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS,
        )  # fmt: skip
        gate_left, gate_right = halves(gate)
    left, right = halves(up)
    _store_activated(gate_left, left, bias1, activated, hidden, row, column, N, F, ACTIVATION)
    _store_activated(gate_right, right, bias1, activated, hidden, row, column + BLOCK_N // 2, N, F, ACTIVATION)


@triton.jit
def _store_grad_hidden(
    grad,  # a tile of grad_output W2, at (row, column)
    hidden,
    grad_hidden,
    activated,
    bias_sums,  # at the row of sums that is this tile's
    row,
    column,
    N,
    F,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):
    """Ends the backward for that tile."""
    rows = row + tl.arange(0, grad.shape[0])
    columns = column + tl.arange(0, grad.shape[1])
    keep = (rows < N)[:, None] & (columns < F)[None, :]
    offsets = rows.to(tl.int64)[:, None] * F + columns[None, :]
    dtype = grad_hidden.dtype.element_ty
    if GATED:
        gate_offsets = offsets + rows.to(tl.int64)[:, None] * F
        gate = tl.load(hidden + gate_offsets, mask=keep, other=0.0).to(tl.float32)
        up = tl.load(hidden + gate_offsets + F, mask=keep, other=0.0).to(tl.float32)
        value = _activate(gate, ACTIVATION)
        if activated is not None:
            tl.store(activated + offsets, (value * up).to(dtype), mask=keep)
        tl.store(grad_hidden + gate_offsets, (grad * up * _slope(gate, ACTIVATION)).to(dtype), mask=keep)
        grad_up = grad * value
        tl.store(grad_hidden + gate_offsets + F, grad_up.to(dtype), mask=keep)
    else:
        up = tl.load(hidden + offsets, mask=keep, other=0.0).to(tl.float32)
        if activated is not None:
            tl.store(activated + offsets, _activate(up, ACTIVATION).to(dtype), mask=keep)
        grad_up = grad * _slope(up, ACTIVATION)
        tl.store(grad_hidden + offsets, grad_up.to(dtype), mask=keep)
    if bias_sums is not None:
        sums = tl.sum(grad_up, 0)  # rows beyond N are zeros
        tl.store(bias_sums + columns, sums, mask=columns < F)


@triton.jit(do_not_specialize=["N"])
def _backward(
    grad_output,  # [N, C2]
    weight2,  # [C2, F]
    hidden,  # [N, F], or [N, 2F] = gate beside up, contiguous
    grad_hidden,  # like hidden
    activated,  # [N, F], contiguous; None where it is not needed
    bias_sums,  # [row tiles, F] float32: each tile's part of grad_bias1; None where it is not needed
    N,
    F,
    C2,
    stride_grad,
    stride_grad_c,
    stride_weight2,  # from one of C2 to the next
    stride_weight2_f,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    row, column = tile_place(tl.program_id(0), N, F, BLOCK_M, BLOCK_N, GROUP_M)
    grad = product(
        grad_output, weight2, row, column, N, F, C2, stride_grad, stride_grad_c, stride_weight2_f, stride_weight2,
        BLOCK_M, BLOCK_N, BLOCK_K, False, True, DESCRIPTORS,
    )  # fmt: skip
    if bias_sums is not None:
        bias_sums += (row // BLOCK_M).to(tl.int64) * F
    left, right = halves(grad)
    _store_grad_hidden(left, hidden, grad_hidden, activated, bias_sums, row, column, N, F, ACTIVATION, GATED)
    right_column = column + BLOCK_N // 2
    _store_grad_hidden(right, hidden, grad_hidden, activated, bias_sums, row, right_column, N, F, ACTIVATION, GATED)


def _as_matrix(x: Tensor) -> Tensor:
    """[..., C] as [N, C], which has to work for C = 0 too."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _tile(tiles: dict[tuple[str, int], Tile], x: Tensor) -> Tile:
    if x.shape[0] <= FEW_ROWS:
        return FEW_ROWS_TILES[x.element_size()]
    return tiles[device_class(x), x.element_size()]


def _activated(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight_gate: Tensor | None,
    activation: str,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """(activated [N, F], hidden or an empty tensor) of input [N, C]."""
    (N, C), F = input.shape, weight1.shape[0]
    gated = weight_gate is not None
    activated = input.new_empty(N, F)
    hidden = input.new_empty(N, 2 * F if gated else F) if save_hidden else input.new_empty(0)
    if activated.numel() == 0:
        return activated, hidden
    tile = _tile(GATED_TILES if gated else FORWARD_TILES, input)
    weights = [weight1, weight_gate] if gated else [weight1]
    (rows, *weights), descriptors = operands(
        (input, tile.block_m, tile.block_k), *((weight, tile.block_n, tile.block_k) for weight in weights)
    )
    gate_strides = weight_gate.stride() if gated else (0, 0)
    grid = (triton.cdiv(N, tile.block_m) * triton.cdiv(F, tile.block_n),)
    with torch.cuda.device_of(input):
        _forward[grid](
            rows, weights[0], weights[1] if gated else None, bias1 if bias1 is None else bias1.contiguous(),
            activated, hidden if save_hidden else None, N, F, C, *input.stride(), *weight1.stride(), *gate_strides,
            ACTIVATION=activation, **tile.constants(), GROUP_M=GROUP_M, DESCRIPTORS=descriptors, **tile.options(),
        )  # fmt: skip
    return activated, hidden


def feed_forward_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight_gate: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """(output [..., C2], hidden). Shapes and meaning: csrc/ops.cpp."""
    rows = _as_matrix(input)
    activated, hidden = _activated(rows, weight1, bias1, weight_gate, activation, save_hidden)
    output = activated @ weight2.T if bias2 is None else torch.addmm(bias2, activated, weight2.T)
    return output.view(*input.shape[:-1], weight2.shape[0]), hidden


def _hidden_gradient(
    grad_output: Tensor,
    weight2: Tensor,
    hidden: Tensor,
    activation: str,
    gated: bool,
    needs_activated: bool,
    needs_bias1: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(grad_hidden like hidden, activated [N, F], grad_bias1 [F]), the last two None where not needed."""
    N, (C2, F) = grad_output.shape[0], weight2.shape
    grad_hidden = torch.empty_like(hidden)
    tile = _tile(BACKWARD_TILES, grad_output)
    row_tiles = triton.cdiv(N, tile.block_m)
    activated = hidden.new_empty(N, F) if needs_activated else None
    bias_sums = hidden.new_empty(row_tiles, F, dtype=torch.float32) if needs_bias1 else None
    if hidden.numel() > 0:
        (grad, weight), descriptors = operands(
            (grad_output, tile.block_m, tile.block_k), (weight2, tile.block_k, tile.block_n)
        )
        with torch.cuda.device_of(hidden):
            _backward[(row_tiles * triton.cdiv(F, tile.block_n),)](
                grad, weight, hidden, grad_hidden, activated, bias_sums, N, F, C2,
                *grad_output.stride(), *weight2.stride(), ACTIVATION=activation, GATED=gated,
                **tile.constants(), GROUP_M=GROUP_M, DESCRIPTORS=descriptors, **tile.options(),
            )  # fmt: skip
    return grad_hidden, activated, bias_sums.sum(0).to(hidden.dtype) if needs_bias1 else None


def feed_forward_backward(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    weight_gate: Tensor | None,
    weight2: Tensor,
    hidden: Tensor,
    activation: str,
    has_bias1: bool,
    has_bias2: bool,
    needs_grad_input: bool,
    needs_grad_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by input, weight1, bias1, weight_gate, weight2, bias2; empty where not asked for: csrc/ops.cpp."""
    gated = weight_gate is not None
    F = weight1.shape[0]
    rows = _as_matrix(input)
    grad_rows = _as_matrix(grad_output)
    grad_hidden, activated, grad_bias1 = _hidden_gradient(
        grad_rows, weight2, hidden.contiguous(), activation, gated, needs_grad_weights, needs_grad_weights and has_bias1
    )
    grad_gate, grad_up = (grad_hidden[:, :F], grad_hidden[:, F:]) if gated else (None, grad_hidden)
    grad_input = grad_weight1 = grad_weight_gate = grad_weight2 = grad_bias2 = None
    if needs_grad_input:
        grad_input = grad_up @ weight1
        if gated:
            grad_input.addmm_(grad_gate, weight_gate)
        grad_input = grad_input.view(input.shape)
    if needs_grad_weights:
        grad_weight1 = grad_up.T @ rows
        grad_weight_gate = grad_gate.T @ rows if gated else None
        grad_weight2 = grad_rows.T @ activated
        grad_bias2 = grad_rows.sum(0, dtype=torch.float32).to(grad_rows.dtype) if has_bias2 else None
    grads = (grad_input, grad_weight1, grad_bias1, grad_weight_gate, grad_weight2, grad_bias2)
    return tuple(input.new_empty(0) if grad is None else grad for grad in grads)
