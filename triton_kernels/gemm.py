"""Tiled matrix products: what the kernels that fuse something into one are made of.

``out[m, n] = sum over k of a[m, k] * b[n, k]``: a is [M, K] and b is [N, K], as torch keeps a layer's weight. Either
may lie in memory transposed, as [K, M] or [K, N]. Sums are float32, and float32 operands are not rounded (no TF32).

An operand reaches a kernel as a pointer with two strides, or as a tensor descriptor, which Hopper's and data-centre
Blackwell's copy engine (TMA) turns into whole tiles without any thread computing an address.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Tile:
    """What one program computes (block_m by block_n), in which steps (block_k), and how it is compiled."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        """The kernel's tile arguments."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def options(self) -> dict[str, int]:
        """The compiler's."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# By device class and bytes an element. The budget, here and in the other tables of tiles: a stage holds the operands'
# block_k columns in shared memory, of which sm_90 and sm_100 have 227 KB, sm_80 to sm_89 and sm_120 at least 99 KB,
# gfx942 and sm_75 64 KB. A thread's part of the sums takes at most 128 of its 255 registers. On the tensor cores 8
# warps are two groups of 64 rows each. float32 runs on the ordinary units, which take their operands through registers:
# smaller tiles.
ACCUMULATE_TILES = {
    ("sm_90", 2): Tile(128, 128, 64, num_warps=8, num_stages=4),
    ("sm_80", 2): Tile(128, 128, 32, num_warps=8, num_stages=4),
    ("gfx942", 2): Tile(128, 128, 32, num_warps=8, num_stages=2),
}

# Row tiles that walk the columns together: a multiprocessor's neighbours in time then share operands through the L2.
GROUP_M = 8


@triton.jit
def tile_place(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) where the program's tile starts: down GROUP_M tiles, then one to the right, and so on."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return (group * GROUP_M + within % group_rows) * BLOCK_M, (within // group_rows) * BLOCK_N


@triton.jit
def load_tile(
    matrix,  # [rows, columns]: a descriptor of such tiles, or a pointer
    row,
    column,
    rows,
    columns,
    stride_row,
    stride_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The tile that starts at (row, column), with zeros beyond the matrix."""
    if DESCRIPTORS:
        return matrix.load([row, column])
    else:
        row_index = row + tl.arange(0, BLOCK_ROWS)
        column_index = column + tl.arange(0, BLOCK_COLUMNS)
        keep = (row_index < rows)[:, None] & (column_index < columns)[None, :]
        offsets = row_index.to(tl.int64)[:, None] * stride_row + column_index.to(tl.int64)[None, :] * stride_column
        return tl.load(matrix + offsets, mask=keep, other=0.0)


@triton.jit
def load_operand(
    operand,  # [extent, K], or in memory [K, extent] if TRANSPOSED
    place,
    k,
    extent,
    K,
    stride,  # along extent
    stride_k,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """[BLOCK, BLOCK_K] of an operand, from (place, k) on."""
    if TRANSPOSED:
        return load_tile(operand, k, place, K, extent, stride_k, stride, BLOCK_K, BLOCK, DESCRIPTORS).T
    else:
        return load_tile(operand, place, k, extent, K, stride, stride_k, BLOCK, BLOCK_K, DESCRIPTORS)


@triton.jit
def product(
    a,  # [M, K]
    b,  # [N, K]
    row,
    column,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N] of the product, from (row, column) on; zeros beyond M and N."""
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a_tile = load_operand(a, row, k, M, K, stride_am, stride_ak, BLOCK_M, BLOCK_K, A_TRANSPOSED, DESCRIPTORS)
        b_tile = load_operand(b, column, k, N, K, stride_bn, stride_bk, BLOCK_N, BLOCK_K, B_TRANSPOSED, DESCRIPTORS)
        sums = tl.dot(a_tile, b_tile.T, sums, input_precision="ieee")
    return sums


@triton.jit
def product_pair(
    a,  # [M, K]
    b,  # [N, K]
    c,  # [N, K]
    row,
    column,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    stride_cn,
    stride_ck,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The products of a with b and with c, like two calls of `product`, reading a once."""
    b_sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    c_sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a_tile = load_operand(a, row, k, M, K, stride_am, stride_ak, BLOCK_M, BLOCK_K, False, DESCRIPTORS)
        b_tile = load_operand(b, column, k, N, K, stride_bn, stride_bk, BLOCK_N, BLOCK_K, False, DESCRIPTORS)
        c_tile = load_operand(c, column, k, N, K, stride_cn, stride_ck, BLOCK_N, BLOCK_K, False, DESCRIPTORS)
        b_sums = tl.dot(a_tile, b_tile.T, b_sums, input_precision="ieee")
        c_sums = tl.dot(a_tile, c_tile.T, c_sums, input_precision="ieee")
    return b_sums, c_sums


@triton.jit
def halves(x):
    """The left and the right half of the columns: what follows a product takes one at a time, for fewer registers."""
    left, right = tl.split(x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1))
    return left, right


@triton.jit(do_not_specialize=["K"])
def _accumulate(
    total,  # [M, N] float32, contiguous
    a,  # in memory [K, M]
    b,  # in memory [K, N]
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    row, column = tile_place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    sums = product(
        a, b, row, column, M, N, K, stride_am, stride_ak, stride_bn, stride_bk,
        BLOCK_M, BLOCK_N, BLOCK_K, True, True, DESCRIPTORS,
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    places = total + rows.to(tl.int64)[:, None] * N + columns[None, :]
    keep = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(places, tl.load(places, mask=keep, other=0.0) + sums, mask=keep)


def device_class(x: Tensor) -> str:
    """Which tiles suit the device of ``x``: "sm_90", "sm_80" or "gfx942"; the interpreter plays the first."""
    if not x.is_cuda:
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(x.device)
    if major in (9, 10, 11):  # the later sm_12x have neither that much shared memory nor wgmma's successor
        return "sm_90"
    return "sm_80" if major >= 8 else "gfx942"


def operands(*matrices: tuple[Tensor, int, int]) -> tuple[list[Tensor | TensorDescriptor], bool]:
    """Each (matrix, tile rows, tile columns) as the kernel takes it, and whether these are descriptors: all, or none.

    A descriptor needs 16-byte steps from row to row and neighbours in memory along a row.
    """
    describable = all(
        device_class(x) == "sm_90"
        and x.element_size() == 2
        and x.numel() > 0
        and x.stride(1) == 1
        and x.stride(0) > 0
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
        for x, _, _ in matrices
    )
    if describable:
        return [TensorDescriptor.from_tensor(x, [rows, columns]) for x, rows, columns in matrices], True
    return [x for x, _, _ in matrices], False


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a^T b`` in float32: total [M, N] contiguous, a [K, M], b [K, N], which may be of half precision."""
    if a.dtype == torch.float32:
        total.addmm_(a.T, b)
        return
    (M, N), K = total.shape, a.shape[0]
    if total.numel() == 0 or K == 0:
        return
    tile = ACCUMULATE_TILES[device_class(a), a.element_size()]
    (a_operand, b_operand), descriptors = operands((a, tile.block_k, tile.block_m), (b, tile.block_k, tile.block_n))
    grid = (triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)
    with torch.cuda.device_of(total):
        _accumulate[grid](
            total, a_operand, b_operand, M, N, K, a.stride(1), a.stride(0), b.stride(1), b.stride(0),
            **tile.constants(), GROUP_M=GROUP_M, DESCRIPTORS=descriptors, **tile.options(),
        )  # fmt: skip
