"""LayerNorm and RMSNorm over the last dimension, with an optional residual added first; forward and backward.

Shapes: N rows (all leading dimensions together), C columns. Statistics and arithmetic are float32 with one cast, at
the store. With ``normed = (summed - mean) * rstd`` and ``scaled = grad_output * weight``, the gradient of a row is

    grad_input = rstd * (scaled - mean(scaled) - normed * mean(scaled * normed)) + grad_summed

(without ``mean(scaled)`` in RMSNorm), and the weight's and bias's are the sums over rows of grad_output * normed and of
grad_output: each program adds up its own rows in order and a second kernel adds up the programs, so that the result
is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import as_rows, multiprocessors, power_of_two

# Forward: (columns up to, rows a program, warps). As in softmax.py: sixteen bytes a thread and load where a row has
# them. At the widest a thread has 16 elements; 16384 columns spill on 16 warps and on 32, as do 64 rows of 16 columns
# under Triton 3.6.0 and 4 rows of 256 on sm_100 under 3.9.0.
FORWARD_CONFIGS = (
    (16, 32, 4),
    (32, 32, 4),
    (64, 16, 4),
    (128, 8, 4),
    (256, 2, 4),
    (512, 2, 4),
    (1024, 1, 4),
    (4096, 1, 8),
    (8192, 1, 16),
)
# Backward: (columns up to, rows a step, warps, programs a multiprocessor). A thread's 8 elements of grad_output, summed
# and both sums take about 110 registers, so that 16 warps fill a multiprocessor, and it gets no more programs than
# that: each one more lengthens the sums' second step. With 16 elements (8192 columns) it spills, and so do two rows of
# 512 columns on 4 warps under Triton 3.6.0.
BACKWARD_CONFIGS = (
    (16, 64, 4, 4),
    (32, 32, 4, 4),
    (64, 16, 4, 4),
    (128, 8, 4, 4),
    (256, 4, 4, 4),
    (512, 4, 8, 2),
    (1024, 1, 4, 4),
    (2048, 1, 8, 2),
    (4096, 1, 16, 1),
)
# Rows beyond a table's last: columns a step, and warps. 8 elements a thread leave room for two programs or more on a
# multiprocessor; with 16 ptxas spills on sm_100.
LOOPED_BLOCK, LOOPED_WARPS = 4096, 16
# Weight's and bias's gradients of such rows: rows and columns a step, warps, programs a multiprocessor.
COLUMN_ROWS, COLUMN_BLOCK, COLUMN_WARPS, COLUMN_PROGRAMS = 2, 1024, 4, 4
# The second step of those gradients: programs' sums and columns a step. Many sums of few columns, or, where rows were
# looped over, the reverse.
PARTIALS, LOOPED_PARTIALS, PARTIAL_WARPS = (64, 32), (4, 1024), 4


@triton.jit
def _load_summed(input, residual, columns, keep):
    """input + residual as it is stored, in the input's dtype, then float32; 0 beyond the row."""
    summed = tl.load(input + columns, mask=keep, other=0.0).to(tl.float32)
    if residual is not None:
        summed += tl.load(residual + columns, mask=keep, other=0.0).to(tl.float32)
        summed = summed.to(input.dtype.element_ty).to(tl.float32)
    return summed


@triton.jit
def _scale_and_shift(normed, weight, bias, columns, keep):
    if weight is not None:
        normed *= tl.load(weight + columns, mask=keep, other=0.0).to(tl.float32)
    if bias is not None:
        normed += tl.load(bias + columns, mask=keep, other=0.0).to(tl.float32)
    return normed


@triton.jit
def _forward(
    input,  # [N, C], unit stride
    residual,  # likewise, or None
    weight,  # [C] or None
    bias,  # [C] or None
    output,  # [N, C], contiguous
    summed,  # [N, C], contiguous; None without residual
    mean,  # [N] float32; None if RMS
    rstd,  # [N] float32
    row_count,  # N
    column_count,  # C
    stride_input,  # from row to row
    stride_residual,
    eps,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least C
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    row_exists = row < row_count
    column_exists = columns < column_count
    keep = row_exists & column_exists
    residual_row = None if residual is None else residual + row * stride_residual
    centred = _load_summed(input + row * stride_input, residual_row, columns, keep)
    if summed is not None:
        tl.store(summed + row * column_count + columns, centred.to(summed.dtype.element_ty), mask=keep)
    if not RMS:
        row_mean = (tl.sum(centred, 1) / column_count)[:, None]
        # By how much it was rounded is more than nearly equal values differ.
        row_mean += (tl.sum(tl.where(keep, centred - row_mean, 0.0), 1) / column_count)[:, None]
        tl.store(mean + row, row_mean, mask=row_exists)
        centred = tl.where(keep, centred - row_mean, 0.0)
    row_rstd = tl.rsqrt(tl.sum(centred * centred, 1) / column_count + eps)[:, None]
    tl.store(rstd + row, row_rstd, mask=row_exists)
    result = _scale_and_shift(centred * row_rstd, weight, bias, columns, column_exists)
    tl.store(output + row * column_count + columns, result.to(output.dtype.element_ty), mask=keep)


@triton.jit
def _forward_looped(
    input,  # as in _forward
    residual,
    weight,
    bias,
    output,
    summed,
    mean,
    rstd,
    row_count,
    column_count,
    stride_input,
    stride_residual,
    eps,
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    input_row = input + row * stride_input
    residual_row = None if residual is None else residual + row * stride_residual

    # Each block's own mean and sum of squared distances from it, joined to those of the blocks before (Chan, Golub and
    # LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979).
    row_mean = 0.0
    squares = 0.0
    for start in range(0, column_count, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keep = columns < column_count
        values = _load_summed(input_row, residual_row, columns, keep)
        if summed is not None:
            tl.store(summed + row * column_count + columns, values.to(summed.dtype.element_ty), mask=keep)
        if not RMS:
            count = tl.minimum(column_count - start, BLOCK).to(tl.float32)
            block_mean = tl.sum(values, 0) / count
            block_mean += tl.sum(tl.where(keep, values - block_mean, 0.0), 0) / count  # as in _forward
            values = tl.where(keep, values - block_mean, 0.0)
            distance = block_mean - row_mean
            share = count / (start + count)
            row_mean += distance * share
            squares += distance * distance * start * share
        squares += tl.sum(values * values, 0)
    row_rstd = tl.rsqrt(squares / column_count + eps)
    if not RMS:
        tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)

    for start in range(0, column_count, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keep = columns < column_count
        normed = (_load_summed(input_row, residual_row, columns, keep) - row_mean) * row_rstd
        result = _scale_and_shift(normed, weight, bias, columns, keep)
        tl.store(output + row * column_count + columns, result.to(output.dtype.element_ty), mask=keep)


@triton.jit
def _load_normed(summed, row_mean, row_rstd, columns, keep):
    """(summed - mean) * rstd in float32, 0 beyond the row; row_mean is None in RMSNorm."""
    values = tl.load(summed + columns, mask=keep, other=0.0).to(tl.float32)
    if row_mean is not None:
        values = tl.where(keep, values - row_mean, 0.0)
    return values * row_rstd


@triton.jit
def _backward(
    grad_output,  # [N, C], unit stride
    grad_summed,  # likewise, or None
    summed,  # likewise
    weight,  # [C] or None
    mean,  # [N] float32; None in RMSNorm
    rstd,  # [N] float32
    grad_input,  # [N, C], contiguous
    weight_sums,  # [programs, C] float32: each program's share of grad_weight; None if not asked for
    bias_sums,  # likewise of grad_bias
    row_count,
    column_count,
    stride_grad_output,  # from row to row
    stride_grad_summed,
    stride_summed,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least C
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]
    column_exists = columns < column_count
    if weight_sums is not None:
        weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    if bias_sums is not None:
        bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)

    for tile in range(program, tl.cdiv(row_count, ROWS), tl.num_programs(0)):
        row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        row_exists = row < row_count
        keep = row_exists & column_exists
        row_mean = None if mean is None else tl.load(mean + row, mask=row_exists, other=0.0)
        row_rstd = tl.load(rstd + row, mask=row_exists, other=0.0)
        normed = _load_normed(summed + row * stride_summed, row_mean, row_rstd, columns, keep)
        grad = tl.load(grad_output + row * stride_grad_output + columns, mask=keep, other=0.0).to(tl.float32)
        if weight_sums is not None:
            weight_sum += grad * normed
        if bias_sums is not None:
            bias_sum += grad
        if weight is not None:
            grad *= tl.load(weight + columns, mask=column_exists, other=0.0).to(tl.float32)
        result = grad - normed * (tl.sum(grad * normed, 1) / column_count)[:, None]
        if mean is not None:
            result -= (tl.sum(grad, 1) / column_count)[:, None]
        result *= row_rstd
        if grad_summed is not None:
            pointers = grad_summed + row * stride_grad_summed + columns
            result += tl.load(pointers, mask=keep, other=0.0).to(tl.float32)
        tl.store(grad_input + row * column_count + columns, result.to(grad_input.dtype.element_ty), mask=keep)

    place = program.to(tl.int64) * column_count + tl.arange(0, BLOCK)
    if weight_sums is not None:
        tl.store(weight_sums + place, tl.sum(weight_sum, 0), mask=tl.arange(0, BLOCK) < column_count)
    if bias_sums is not None:
        tl.store(bias_sums + place, tl.sum(bias_sum, 0), mask=tl.arange(0, BLOCK) < column_count)


@triton.jit
def _backward_looped(
    grad_output,  # as in _backward
    grad_summed,
    summed,
    weight,
    mean,
    rstd,
    grad_input,
    column_count,
    stride_grad_output,
    stride_grad_summed,
    stride_summed,
    BLOCK: tl.constexpr,
):
    """grad_input of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    row_mean = None if mean is None else tl.load(mean + row)
    row_rstd = tl.load(rstd + row)
    summed_row = summed + row * stride_summed
    grad_row = grad_output + row * stride_grad_output

    grad_mean = 0.0
    product_mean = 0.0
    for start in range(0, column_count, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keep = columns < column_count
        normed = _load_normed(summed_row, row_mean, row_rstd, columns, keep)
        grad = tl.load(grad_row + columns, mask=keep, other=0.0).to(tl.float32)
        if weight is not None:
            grad *= tl.load(weight + columns, mask=keep, other=0.0).to(tl.float32)
        product_mean += tl.sum(grad * normed, 0) / column_count
        if mean is not None:
            grad_mean += tl.sum(grad, 0) / column_count

    for start in range(0, column_count, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keep = columns < column_count
        normed = _load_normed(summed_row, row_mean, row_rstd, columns, keep)
        grad = tl.load(grad_row + columns, mask=keep, other=0.0).to(tl.float32)
        if weight is not None:
            grad *= tl.load(weight + columns, mask=keep, other=0.0).to(tl.float32)
        result = (grad - grad_mean - normed * product_mean) * row_rstd
        if grad_summed is not None:
            result += tl.load(grad_summed + row * stride_grad_summed + columns, mask=keep, other=0.0).to(tl.float32)
        tl.store(grad_input + row * column_count + columns, result.to(grad_input.dtype.element_ty), mask=keep)


@triton.jit
def _column_sums(
    grad_output,  # as in _backward
    summed,
    mean,
    rstd,
    weight_sums,  # [programs along axis 1, C] float32, or None
    bias_sums,
    row_count,
    column_count,
    stride_grad_output,
    stride_summed,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program's share of grad_weight and grad_bias: a block of columns, every num_programs(1)-th tile of rows."""
    columns = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    column_exists = columns < column_count
    if weight_sums is not None:
        weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    if bias_sums is not None:
        bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(row_count, ROWS), tl.num_programs(1)):
        row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        row_exists = row < row_count
        keep = row_exists & column_exists
        grad = tl.load(grad_output + row * stride_grad_output + columns, mask=keep, other=0.0).to(tl.float32)
        if weight_sums is not None:
            row_mean = None if mean is None else tl.load(mean + row, mask=row_exists, other=0.0)
            row_rstd = tl.load(rstd + row, mask=row_exists, other=0.0)
            weight_sum += grad * _load_normed(summed + row * stride_summed, row_mean, row_rstd, columns, keep)
        if bias_sums is not None:
            bias_sum += grad
    place = tl.program_id(1).to(tl.int64) * column_count + columns
    if weight_sums is not None:
        tl.store(weight_sums + place, tl.sum(weight_sum, 0)[None, :], mask=column_exists)
    if bias_sums is not None:
        tl.store(bias_sums + place, tl.sum(bias_sum, 0)[None, :], mask=column_exists)


@triton.jit
def _sum_programs(sums, result, program_count, column_count, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, program_count, ROWS):
        program = (start + tl.arange(0, ROWS))[:, None]
        keep = (program < program_count) & (columns < column_count)[None, :]
        total += tl.load(sums + program.to(tl.int64) * column_count + columns[None, :], mask=keep, other=0.0)
    tl.store(result + columns, tl.sum(total, 0).to(result.dtype.element_ty), mask=columns < column_count)


@triton.jit
def _finish_sums(
    weight_sums,  # [programs, C] float32, or None
    bias_sums,
    grad_weight,  # [C], or None
    grad_bias,
    program_count,
    column_count,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if weight_sums is not None:
        _sum_programs(weight_sums, grad_weight, program_count, column_count, columns, ROWS, BLOCK)
    if bias_sums is not None:
        _sum_programs(bias_sums, grad_bias, program_count, column_count, columns, ROWS, BLOCK)


def forward_configuration(columns: int) -> tuple[int, int, int] | None:
    """(rows a program, block, warps) for rows of that many columns; None where they have to be looped over."""
    for widest, rows, warps in FORWARD_CONFIGS:
        if columns <= widest:
            return rows, power_of_two(columns), warps
    return None


def backward_configuration(columns: int) -> tuple[int, int, int, int] | None:
    """(rows a step, block, warps, programs a multiprocessor); None where rows have to be looped over."""
    for widest, rows, warps, programs in BACKWARD_CONFIGS:
        if columns <= widest:
            return rows, power_of_two(columns), warps, programs
    return None


def layer_norm_forward(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, summed, mean, rstd). Shapes and meaning: csrc/ops.cpp."""
    columns = input.shape[-1]
    row_count = input.numel() // columns if columns else input.shape[:-1].numel()
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    summed = torch.empty(0 if residual is None else input.shape, dtype=input.dtype, device=input.device)
    mean = torch.empty(0 if rms else row_count, dtype=torch.float32, device=input.device)
    rstd = torch.empty(row_count, dtype=torch.float32, device=input.device)
    if input.numel() == 0:
        return output, summed, mean.zero_(), rstd.zero_()
    rows = as_rows(input)
    residual_rows = None if residual is None else as_rows(residual)
    arguments = (
        rows,
        residual_rows,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        output,
        None if residual is None else summed,
        None if rms else mean,
        rstd,
        row_count,
        columns,
        rows.stride(0),
        0 if residual_rows is None else residual_rows.stride(0),
        eps,
        rms,
    )
    chosen = forward_configuration(columns)
    with torch.cuda.device_of(input):
        if chosen is None:
            _forward_looped[(row_count,)](*arguments, LOOPED_BLOCK, num_warps=LOOPED_WARPS)
        else:
            rows_a_program, block, warps = chosen
            grid = (triton.cdiv(row_count, rows_a_program),)
            _forward[grid](*arguments, rows_a_program, block, num_warps=warps)
    return output, summed, mean, rstd


def layer_norm_backward(
    grad_output: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_input, grad_weight, grad_bias), the last in the weight's dtype. Shapes and meaning: csrc/ops.cpp."""
    columns = summed.shape[-1]
    parameter_dtype = summed.dtype if weight is None else weight.dtype
    grad_input = torch.empty(summed.shape, dtype=summed.dtype, device=summed.device)
    grad_weight = torch.empty(0 if weight is None else columns, dtype=parameter_dtype, device=summed.device)
    grad_bias = summed.new_empty(columns, dtype=parameter_dtype) if has_bias else summed.new_empty(0)
    if summed.numel() == 0:
        return grad_input, grad_weight.zero_(), grad_bias.zero_()

    grad_rows, rows = as_rows(grad_output), as_rows(summed)
    grad_summed_rows = None if grad_summed is None else as_rows(grad_summed)
    strides = (grad_rows.stride(0), 0 if grad_summed is None else grad_summed_rows.stride(0), rows.stride(0))
    weight = None if weight is None else weight.contiguous()
    mean = None if rms else mean
    row_count = rows.shape[0]
    available = multiprocessors(summed)

    def new_sums(wanted: bool, programs: int) -> Tensor | None:
        return torch.empty(programs, columns, dtype=torch.float32, device=summed.device) if wanted else None

    chosen = backward_configuration(columns)
    with torch.cuda.device_of(summed):
        if chosen is None:
            arguments = (grad_rows, grad_summed_rows, rows, weight, mean, rstd, grad_input, columns, *strides)
            _backward_looped[(row_count,)](*arguments, LOOPED_BLOCK, num_warps=LOOPED_WARPS)
            blocks = triton.cdiv(columns, COLUMN_BLOCK)
            programs = min(triton.cdiv(row_count, COLUMN_ROWS), triton.cdiv(available * COLUMN_PROGRAMS, blocks))
            weight_sums, bias_sums = new_sums(weight is not None, programs), new_sums(has_bias, programs)
            if weight is not None or has_bias:
                arguments = (grad_rows, rows, mean, rstd, weight_sums, bias_sums, row_count, columns)
                _column_sums[(blocks, programs)](
                    *arguments, strides[0], strides[2], COLUMN_ROWS, COLUMN_BLOCK, num_warps=COLUMN_WARPS
                )
        else:
            rows_a_step, block, warps, programs_each = chosen
            programs = min(triton.cdiv(row_count, rows_a_step), available * programs_each)
            weight_sums, bias_sums = new_sums(weight is not None, programs), new_sums(has_bias, programs)
            arguments = (grad_rows, grad_summed_rows, rows, weight, mean, rstd, grad_input, weight_sums, bias_sums)
            _backward[(programs,)](*arguments, row_count, columns, *strides, rows_a_step, block, num_warps=warps)
        if weight is not None or has_bias:
            grads = (None if weight is None else grad_weight, grad_bias if has_bias else None)
            tile = LOOPED_PARTIALS if chosen is None else PARTIALS
            _finish_sums[(triton.cdiv(columns, tile[1]),)](
                weight_sums, bias_sums, *grads, programs, columns, *tile, num_warps=PARTIAL_WARPS
            )
    return grad_input, grad_weight, grad_bias
