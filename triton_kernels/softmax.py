"""Softmax over the last dimension, forward and backward: ``softmax(scale * input + mask)``.

Shapes: N rows (all leading dimensions together), C columns. Arithmetic is float32 with one cast, at the store. A row
that fits in a block is read once and kept in registers; a wider one is read twice, the first time for its maximum and
its sum together (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import as_rows, finite_peak, power_of_two

# (columns up to, rows a program, warps). Sixteen bytes a thread and load is the widest there is: 8 elements of 16 bits.
# Narrow rows share a program so that its 4 warps have that much to do; from 1024 on the row is spread over more warps
# as it grows, which holds a thread to 32 elements, and the program to a quarter of the registers, at the widest.
CONFIGS = (
    (16, 64, 4),
    (32, 32, 4),
    (64, 16, 4),
    (128, 8, 4),
    (256, 4, 4),
    (512, 2, 4),
    (1024, 1, 4),
    (4096, 1, 8),
    (16384, 1, 16),
)
# Rows beyond the table's last: columns a step, and warps.
LOOPED_BLOCK, LOOPED_WARPS = 8192, 16


@triton.jit
def _load_scores(
    input,  # at the row's first element; [rows, 1] pointers or one pointer
    mask,  # at the row's first element of the mask, likewise; None without one
    mask_stride,  # elements from a column of the mask to the next
    columns,  # the columns to load
    keep,  # which of them exist
    row,  # each row's place among the rows that is_causal counts
    scale,
    IS_CAUSAL: tl.constexpr,
):
    """scale * input + mask in float32, -inf where masked out or beyond the row."""
    scores = tl.load(input + columns, mask=keep, other=0.0).to(tl.float32) * scale
    if IS_CAUSAL:
        keep = keep & (columns <= row)
    if mask is not None:
        bias = tl.load(mask + columns.to(tl.int64) * mask_stride, mask=keep, other=0)
        if mask.dtype.element_ty == tl.int8:
            keep = keep & (bias != 0)
        else:
            scores += bias.to(tl.float32)
    return tl.where(keep, scores, float("-inf"))


@triton.jit
def _mask_rows(mask, row, heads, seqlen, stride_outer, stride_head, stride_row):
    """Where the mask of each row starts: rows are numbered over [outer, heads, seqlen]."""
    head = row // seqlen
    return mask + (head // heads) * stride_outer + (head % heads) * stride_head + (row % seqlen) * stride_row


@triton.jit
def _forward(
    input,  # [N, C], unit stride
    mask,  # broadcast to [outer, heads, seqlen, C], int8 if bool; or None
    output,  # [N, C], contiguous
    row_count,  # N
    column_count,  # C
    stride_input,  # from row to row, like the others
    heads,
    seqlen,
    stride_mask_outer,
    stride_mask_head,
    stride_mask_row,
    stride_mask_column,
    causal_rows,  # row n is row n % causal_rows of its matrix
    scale,
    IS_CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least C
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    keep = (row < row_count) & (columns < column_count)
    mask_row = None
    if mask is not None:
        mask_row = _mask_rows(mask, row, heads, seqlen, stride_mask_outer, stride_mask_head, stride_mask_row)
    scores = _load_scores(
        input + row * stride_input, mask_row, stride_mask_column, columns, keep, row % causal_rows, scale, IS_CAUSAL
    )
    exponentials = tl.exp(scores - finite_peak(tl.max(scores, 1))[:, None])
    total = tl.sum(exponentials, 1)[:, None]
    probabilities = exponentials / tl.where(total == 0.0, 1.0, total)
    tl.store(output + row * column_count + columns, probabilities.to(output.dtype.element_ty), mask=keep)


@triton.jit
def _forward_looped(
    input,  # as in _forward
    mask,
    output,
    row_count,
    column_count,
    stride_input,
    heads,
    seqlen,
    stride_mask_outer,
    stride_mask_head,
    stride_mask_row,
    stride_mask_column,
    causal_rows,
    scale,
    IS_CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    input_row = input + row * stride_input
    mask_row = None
    if mask is not None:
        mask_row = _mask_rows(mask, row, heads, seqlen, stride_mask_outer, stride_mask_head, stride_mask_row)
    causal_row = row % causal_rows

    peak = float("-inf")
    total = 0.0
    for start in range(0, column_count, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keep = columns < column_count
        scores = _load_scores(input_row, mask_row, stride_mask_column, columns, keep, causal_row, scale, IS_CAUSAL)
        new_peak = tl.maximum(peak, tl.max(scores, 0))
        shift = finite_peak(new_peak)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(scores - shift), 0)
        peak = new_peak

    shift = finite_peak(peak)
    total = tl.where(total == 0.0, 1.0, total)
    for start in range(0, column_count, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keep = columns < column_count
        scores = _load_scores(input_row, mask_row, stride_mask_column, columns, keep, causal_row, scale, IS_CAUSAL)
        probabilities = tl.exp(scores - shift) / total
        tl.store(output + row * column_count + columns, probabilities.to(output.dtype.element_ty), mask=keep)


@triton.jit
def _backward(
    grad_output,  # [N, C], unit stride
    output,  # [N, C], unit stride
    grad_input,  # [N, C], contiguous
    row_count,
    column_count,
    stride_grad_output,
    stride_output,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least C
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    keep = (row < row_count) & (columns < column_count)
    grad = tl.load(grad_output + row * stride_grad_output + columns, mask=keep, other=0.0).to(tl.float32)
    probabilities = tl.load(output + row * stride_output + columns, mask=keep, other=0.0).to(tl.float32)
    # The second sum takes off what rounding left in the first: all of the answer where one probability is close to 1.
    grad -= tl.sum(grad * probabilities, 1)[:, None]
    grad -= tl.sum(grad * probabilities, 1)[:, None]
    result = scale * probabilities * grad
    tl.store(grad_input + row * column_count + columns, result.to(grad_input.dtype.element_ty), mask=keep)


@triton.jit
def _backward_looped(
    grad_output,  # as in _backward
    output,
    grad_input,
    row_count,
    column_count,
    stride_grad_output,
    stride_output,
    scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mean = 0.0
    for start in range(0, column_count, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keep = columns < column_count
        grad = tl.load(grad_output + row * stride_grad_output + columns, mask=keep, other=0.0).to(tl.float32)
        probabilities = tl.load(output + row * stride_output + columns, mask=keep, other=0.0).to(tl.float32)
        mean += tl.sum(grad * probabilities, 0)
    for start in range(0, column_count, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keep = columns < column_count
        grad = tl.load(grad_output + row * stride_grad_output + columns, mask=keep, other=0.0).to(tl.float32)
        probabilities = tl.load(output + row * stride_output + columns, mask=keep, other=0.0).to(tl.float32)
        result = scale * probabilities * (grad - mean)
        tl.store(grad_input + row * column_count + columns, result.to(grad_input.dtype.element_ty), mask=keep)


def configuration(columns: int) -> tuple[int, int, int] | None:
    """(rows a program, block, warps) for rows of that many columns; None where they have to be looped over."""
    for widest, rows, warps in CONFIGS:
        if columns <= widest:
            return rows, power_of_two(columns), warps
    return None


def _four_dimensional(mask: Tensor, shape: torch.Size) -> tuple[Tensor, tuple[int, int]]:
    """``mask`` broadcast to ``shape`` as [outer, heads, seqlen, C], a view where that exists, and (heads, seqlen).

    Neighbouring leading dimensions are merged where one stride steps through both; more than three that are left over
    need a copy.
    """
    mask = mask.expand(shape)
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(shape[:-1], mask.stride()[:-1]):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 3:
        return _four_dimensional(mask.contiguous(), shape)
    missing = 3 - len(sizes)
    view = mask.as_strided([1] * missing + sizes + [shape[-1]], [0] * missing + strides + [mask.stride(-1)])
    return view, (view.shape[1], view.shape[2])


def softmax_forward(input: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """[..., C] like ``input``, contiguous. Shapes and meaning: csrc/ops.cpp."""
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    if input.numel() == 0:
        return output
    rows = as_rows(input)
    row_count, column_count = rows.shape
    heads, seqlen, mask_strides = 1, 1, (0, 0, 0, 0)
    if mask is not None:
        mask, (heads, seqlen) = _four_dimensional(mask, input.shape)
        mask_strides = mask.stride()
        if mask.dtype == torch.bool:
            mask = mask.view(torch.int8)
    causal_rows = input.shape[-2] if is_causal else 1
    arguments = (rows, mask, output, row_count, column_count, rows.stride(0), heads, seqlen, *mask_strides)
    arguments += (causal_rows, scale, is_causal)
    chosen = configuration(column_count)
    with torch.cuda.device_of(input):
        if chosen is None:
            _forward_looped[(row_count,)](*arguments, LOOPED_BLOCK, num_warps=LOOPED_WARPS)
        else:
            rows_a_program, block, warps = chosen
            grid = (triton.cdiv(row_count, rows_a_program),)
            _forward[grid](*arguments, rows_a_program, block, num_warps=warps)
    return output


def softmax_backward(grad_output: Tensor, output: Tensor, scale: float) -> Tensor:
    """[..., C] like ``output``, contiguous: scale * output * (grad_output - sum(grad_output * output))."""
    grad_input = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    if output.numel() == 0:
        return grad_input
    grad_rows, rows = as_rows(grad_output), as_rows(output)
    row_count, column_count = rows.shape
    arguments = (grad_rows, rows, grad_input, row_count, column_count, grad_rows.stride(0), rows.stride(0), scale)
    chosen = configuration(column_count)
    with torch.cuda.device_of(output):
        if chosen is None:
            _backward_looped[(row_count,)](*arguments, LOOPED_BLOCK, num_warps=LOOPED_WARPS)
        else:
            rows_a_program, block, warps = chosen
            _backward[(triton.cdiv(row_count, rows_a_program),)](*arguments, rows_a_program, block, num_warps=warps)
    return grad_input
