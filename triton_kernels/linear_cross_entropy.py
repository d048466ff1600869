"""Cross-entropy of input weight^T + bias (the unembedding and the loss), whose logits are never all in memory.

Shapes: N rows, C columns, V vocabulary. ``loss = lse - (1 - s) logit[target] - s mean(logits)`` with label smoothing s,
and its gradient by the logits is ``softmax(logits) - (1 - s) onehot(target) - s / V``; both are 0 where target is
ignore_index. Losses and log-sum-exps are float32.

Without gradients a program holds one tile of logits at a time, and keeps a row's running maximum and sum. With them, a
chunk of rows at a time has its logits in a workspace, where their gradient takes their place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import finite_peak, multiprocessors, power_of_two
from .gemm import Tile, add_product, device_class, operands, product

# By device class and bytes an element; the budget is in gemm.py. The exponentials need registers beside the sums.
LOSS_TILES = {
    ("sm_90", 2): Tile(128, 128, 64, num_warps=8, num_stages=3),
    ("sm_80", 2): Tile(128, 128, 32, num_warps=8, num_stages=4),
    ("gfx942", 2): Tile(128, 128, 32, num_warps=8, num_stages=2),
    ("sm_90", 4): Tile(64, 64, 16, num_warps=8, num_stages=3),
    ("sm_80", 4): Tile(64, 64, 16, num_warps=8, num_stages=3),
    ("gfx942", 4): Tile(64, 64, 16, num_warps=8, num_stages=2),
}
# The vocabulary is split among programs until there are this many for each multiprocessor: the last ones to finish then
# leave little of the machine idle.
PROGRAMS_A_MULTIPROCESSOR = 8
# Rows a program when the splits' results are joined, and the warps for it.
JOIN_ROWS, JOIN_WARPS = 128, 4
# Logits a step, at most, of the kernel that goes over a row in the workspace, and its warps: 32 elements a thread.
ROW_BLOCK, ROW_WARPS = 8192, 8
# The workspace's rows start 128 bytes or more apart by a multiple of that, for wide loads whatever V.
ROW_ALIGNMENT = 64


@triton.jit(do_not_specialize=["N"])
def _partial_loss(
    input,  # [N, C]
    weight,  # [V, C]
    bias,  # [V], or None
    target,  # [N] int64
    partials,  # [4, splits, N] float32: maximum, sum of exp(logit - maximum), target's logit, sum of logits
    N,
    V,
    C,
    stride_input,
    stride_input_c,
    stride_weight,
    stride_weight_c,
    tiles_a_split,
    SMOOTHING: tl.constexpr,  # whether the sum of logits is needed
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    rows = row + tl.arange(0, BLOCK_M)
    labels = tl.load(target + rows, mask=rows < N, other=-1)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    picked = tl.zeros([BLOCK_M], tl.float32)
    logit_sum = tl.zeros([BLOCK_M], tl.float32)
    first = split * tiles_a_split * BLOCK_N
    for column in range(first, min(first + tiles_a_split * BLOCK_N, V), BLOCK_N):
        logits = product(
            input, weight, row, column, N, V, C, stride_input, stride_input_c, stride_weight, stride_weight_c,
            BLOCK_M, BLOCK_N, BLOCK_K, False, False, DESCRIPTORS,
        )  # fmt: skip
        columns = column + tl.arange(0, BLOCK_N)
        if bias is not None:
            logits += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        picked += tl.sum(tl.where(columns[None, :] == labels[:, None], logits, 0.0), 1)
        if SMOOTHING:
            logit_sum += tl.sum(tl.where((columns < V)[None, :], logits, 0.0), 1)
        logits = tl.where((columns < V)[None, :], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        shift = finite_peak(new_peak)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        peak = new_peak
    kind_stride = tl.num_programs(1).to(tl.int64) * N
    place = partials + split.to(tl.int64) * N + rows
    keep = rows < N
    tl.store(place, peak, mask=keep)
    tl.store(place + kind_stride, total, mask=keep)
    tl.store(place + 2 * kind_stride, picked, mask=keep)
    if SMOOTHING:
        tl.store(place + 3 * kind_stride, logit_sum, mask=keep)


@triton.jit
def _loss_of_row(peak, total, picked, logit_sum, V, smoothing, SMOOTHING: tl.constexpr):
    """The loss from the row's statistics, by differences from its maximum: a small loss keeps its digits."""
    log_total = tl.log(total)
    result = log_total - (picked - peak)
    if SMOOTHING:
        result = (1.0 - smoothing) * result + smoothing * (log_total - (logit_sum / V - peak))
    return result


@triton.jit(do_not_specialize=["N", "splits"])
def _join_loss(
    partials,  # [4, splits, N] float32, as above
    target,  # [N] int64
    loss,  # [N] float32
    lse,  # [N] float32
    N,
    V,
    splits,
    ignore_index,
    smoothing,
    SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = rows < N
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    picked = tl.zeros([ROWS], tl.float32)
    logit_sum = tl.zeros([ROWS], tl.float32)
    kind_stride = splits.to(tl.int64) * N
    place = partials + rows
    for _ in range(splits):
        split_peak = tl.load(place, mask=keep, other=0.0)
        new_peak = tl.maximum(peak, split_peak)
        shift = finite_peak(new_peak)
        split_total = tl.load(place + kind_stride, mask=keep, other=0.0)
        total = total * tl.exp(peak - shift) + split_total * tl.exp(split_peak - shift)
        peak = new_peak
        picked += tl.load(place + 2 * kind_stride, mask=keep, other=0.0)
        if SMOOTHING:
            logit_sum += tl.load(place + 3 * kind_stride, mask=keep, other=0.0)
        place += N
    result = _loss_of_row(peak, total, picked, logit_sum, V, smoothing, SMOOTHING)
    kept = tl.load(target + rows, mask=keep, other=0) != ignore_index
    tl.store(loss + rows, tl.where(kept, result, 0.0), mask=keep)
    tl.store(lse + rows, peak + tl.log(total), mask=keep)


@triton.jit
def _load_logits(logits, columns, V, stride):
    """float32, -inf from V on. The row's padding is read with it: whole, wide loads."""
    values = tl.load(logits + columns, mask=columns < stride, other=0.0).to(tl.float32)
    return tl.where(columns < V, values, float("-inf"))


@triton.jit
def _logits_to_gradient(
    logits,  # [rows, V], rows a multiple of ROW_ALIGNMENT apart; their gradient takes their place
    target,  # [rows] int64
    row_grad,  # [rows] float32: the gradient by the row's loss
    loss,  # [rows] float32, to be written; None if lse is known
    lse,  # [rows] float32, to be written where loss is, else read
    stride,  # from row to row
    V,
    ignore_index,
    smoothing,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(target + row)
    kept = label != ignore_index
    total = 0.0
    if loss is None:  # lse is near enough for a shift; what it is off by, the sum makes good
        shift = finite_peak(tl.load(lse + row))
        for start in range(0, stride, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            total += tl.sum(tl.exp(_load_logits(logits, columns, V, stride) - shift), 0)
    else:
        peak = float("-inf")
        logit_sum = 0.0
        picked = tl.load(logits + label, mask=(label >= 0) & (label < V), other=0.0).to(tl.float32)
        for start in range(0, stride, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            values = _load_logits(logits, columns, V, stride)
            if SMOOTHING:
                logit_sum += tl.sum(tl.where(columns < V, values, 0.0), 0)
            new_peak = tl.maximum(peak, tl.max(values, 0))
            shift = finite_peak(new_peak)
            total = total * tl.exp(peak - shift) + tl.sum(tl.exp(values - shift), 0)
            peak = new_peak
        shift = finite_peak(peak)
        result = _loss_of_row(peak, total, picked, logit_sum, V, smoothing, SMOOTHING)
        tl.store(loss + row, tl.where(kept, result, 0.0))
        tl.store(lse + row, peak + tl.log(total))
        tl.debug_barrier()  # every thread has read the target's logit before one overwrites it

    grad = tl.load(row_grad + row)
    scale = 1.0 / total
    for start in range(0, stride, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = _load_logits(logits, columns, V, stride)
        gradient = tl.exp(values - shift) * scale
        if SMOOTHING:
            gradient -= smoothing / V
        gradient -= tl.where(columns == label, 1.0 - smoothing, 0.0)
        gradient = tl.where(kept, grad * gradient, 0.0)
        tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < stride)


def chunk_rows(N: int, C: int, V: int) -> int:
    """How many rows have their logits in the workspace at a time.

    The workspace [rows, V] gets no larger than the larger of input [N, C] and weight [V, C]. (By the input alone, as
    Liger-Kernel chooses, a chunk has so few rows that passing over the float32 sums of grad_weight takes longer than
    the product they come from.)
    """
    rows = min(N, max(C, N * C // V, 1))
    return triton.cdiv(N, triton.cdiv(N, rows))  # chunks of one size


def _losses(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """(losses, lse), both [N] float32."""
    (N, C), V = input.shape, weight.shape[0]
    loss = input.new_empty(N, dtype=torch.float32)
    lse = torch.empty_like(loss)
    if N == 0:
        return loss, lse
    tile = LOSS_TILES[device_class(input), input.element_size()]
    row_tiles, tiles = triton.cdiv(N, tile.block_m), triton.cdiv(V, tile.block_n)
    wanted = triton.cdiv(PROGRAMS_A_MULTIPROCESSOR * multiprocessors(input), row_tiles)
    tiles_a_split = triton.cdiv(tiles, wanted)
    splits = triton.cdiv(tiles, tiles_a_split)
    partials = input.new_empty(4, splits, N, dtype=torch.float32)
    smoothed = label_smoothing != 0.0
    (rows, words), descriptors = operands((input, tile.block_m, tile.block_k), (weight, tile.block_n, tile.block_k))
    with torch.cuda.device_of(input):
        # Row tiles are neighbours in the grid: they go through one part of the weight together, which the L2 serves.
        _partial_loss[(row_tiles, splits)](
            rows, words, bias, target, partials, N, V, C, *input.stride(), *weight.stride(), tiles_a_split,
            SMOOTHING=smoothed, **tile.constants(), DESCRIPTORS=descriptors, **tile.options(),
        )  # fmt: skip
        _join_loss[(triton.cdiv(N, JOIN_ROWS),)](
            partials, target, loss, lse, N, V, splits, ignore_index, label_smoothing,
            SMOOTHING=smoothed, ROWS=JOIN_ROWS, num_warps=JOIN_WARPS,
        )  # fmt: skip
    return loss, lse


def _gradients(
    row_grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    loss: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(row_grad * loss) by input, weight and bias. Writes loss and lse; with loss None, reads lse."""
    (N, C), V = input.shape, weight.shape[0]
    if N == 0:
        return (
            input.new_empty(N, C),
            weight.new_zeros(V, C),
            input.new_empty(0) if bias is None else torch.zeros_like(bias),
        )
    step = chunk_rows(N, C, V)
    grad_input = input.new_empty(N, C)
    grad_bias = None if bias is None else bias.new_zeros(V, dtype=torch.float32)
    stride = triton.cdiv(V, ROW_ALIGNMENT) * ROW_ALIGNMENT
    workspace = input.new_empty(step, stride)
    # One chunk's product is the whole gradient; several are added up in float32, with rows for the padding too.
    grad_weight = None if step == N else weight.new_zeros(stride, C, dtype=torch.float32)
    block = min(power_of_two(stride), ROW_BLOCK)
    for start in range(0, N, step):
        chunk = slice(start, min(start + step, N))
        rows = input[chunk]
        padded = workspace[: rows.shape[0]]
        logits = padded[:, :V]
        if bias is None:
            torch.mm(rows, weight.T, out=logits)
        else:
            torch.addmm(bias, rows, weight.T, out=logits)
        with torch.cuda.device_of(input):
            _logits_to_gradient[(rows.shape[0],)](
                logits, target[chunk], row_grad[chunk], loss if loss is None else loss[chunk], lse[chunk], stride, V,
                ignore_index, label_smoothing, SMOOTHING=label_smoothing != 0.0, BLOCK=block, num_warps=ROW_WARPS,
            )  # fmt: skip
        torch.mm(logits, weight, out=grad_input[chunk])
        if grad_weight is not None:
            add_product(grad_weight, padded, rows)
        else:
            grad_weight = logits.T @ rows
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=torch.float32)
    return (
        grad_input,
        grad_weight[:V].to(weight.dtype),
        input.new_empty(0) if bias is None else grad_bias.to(bias.dtype),
    )


def linear_cross_entropy_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    save_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, grad_input, grad_weight, grad_bias). Shapes and meaning: csrc/ops.cpp."""
    target = target.contiguous()
    bias = bias if bias is None else bias.contiguous()
    if not save_grads:
        loss, lse = _losses(input, weight, bias, target, ignore_index, label_smoothing)
        grads = input.new_empty(0), input.new_empty(0), input.new_empty(0)
    elif row_weight is None:
        raise ValueError("save_grads needs row_weight: the gradients are those of the sum of row_weight * loss")
    else:
        loss = input.new_empty(input.shape[0], dtype=torch.float32)
        lse = torch.empty_like(loss)
        grads = _gradients(
            row_weight.contiguous(), input, weight, bias, target, loss, lse, ignore_index, label_smoothing
        )
    return loss if row_weight is None else (row_weight * loss).sum(), lse, *grads


def linear_cross_entropy_backward(
    grad_losses: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_input, grad_weight, grad_bias). Shapes and meaning: csrc/ops.cpp."""
    target = target.contiguous()
    bias = bias if bias is None else bias.contiguous()
    return _gradients(
        grad_losses.contiguous(), input, weight, bias, target, None, lse.contiguous(), ignore_index, label_smoothing
    )
