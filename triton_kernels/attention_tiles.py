"""What the attention kernels, forward and backward, share: tile sizes, loads, stores, softcap and what adds to scores.

Shapes: B batch, H query heads, G key/value heads (H a multiple of G), Sq and Sk lengths, D head_dim, Dv value width.
A program works on one (batch, head) and on tiles of BLOCK_Q queries by BLOCK_K keys; D and Dv are padded to powers of
two, BLOCK_D and BLOCK_DV.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Container
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_visible import MASK_ALIGNMENT, mask_end, mask_pointers, padded_columns

LOG2E = tl.constexpr(math.log2(math.e))

# The arguments with which rows beyond a sequence are another's, or unused: tiles can't be loaded by descriptors.
POINTERS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
# How much of the kernels' registers an argument takes, besides.
BURDENS = {"mask": 2, "softcap": 1, "window_left": 1, "alibi_slopes": 1, "dropout_state": 4}

# Within a tile, at most 128 by 128, offsets are of 32 bits, because those of 64 would take registers that the kernels
# don't have: steps along its rows and columns must be smaller than this.
FAR = 2**31 // (128 + 128)


class Tile(NamedTuple):
    """How one kernel is cut and launched."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The three kernels' tiles; what is loaded and reused by the loop is pipelined over num_stages."""

    forward: Tile
    dkdv: Tile
    dq: Tile


# (architecture, head width at most, bytes an element, crowding) -> tiles. The budget: no register spills (255 registers
# a thread), and shared memory within 99 KB on "sm_80", so that sm_86, sm_89 and sm_120 run it too, and 227 KB on
# "sm_90". At 8 warps a [128, 128] float32 accumulator takes 64 registers a thread; forward holds one of output's width
# and the scores, dkdv two of head width, the scores and their gradients. A mask or softcap adds a tile of its own to
# registers, and a mask, pipelined, to shared memory, hence the smaller blocks where it is crowded. float32 products run
# on the plain cores, which read both operands into registers. "sm_100" has its own rows where it spills with those of
# "sm_90". A row that is missing is that of less crowding.
TILES: dict[tuple[str, int, int, int], Tiles] = {
    ("sm_80", 64, 2, 0): Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),
    ("sm_80", 64, 2, 1): Tiles(Tile(128, 64, 8, 2), Tile(32, 32, 8, 1), Tile(64, 32, 4, 2)),
    ("sm_80", 64, 2, 2): Tiles(Tile(128, 64, 8, 1), Tile(32, 32, 8, 1), Tile(64, 32, 4, 2)),
    ("sm_80", 128, 2, 0): Tiles(Tile(128, 32, 8, 3), Tile(32, 64, 8, 2), Tile(64, 64, 8, 2)),
    ("sm_80", 128, 2, 1): Tiles(Tile(128, 32, 8, 2), Tile(32, 32, 8, 1), Tile(64, 32, 8, 2)),
    ("sm_80", 128, 2, 2): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(64, 32, 8, 2)),
    ("sm_80", 256, 2, 0): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(64, 32, 8, 1)),
    ("sm_80", 256, 2, 1): Tiles(Tile(64, 32, 8, 2), Tile(16, 32, 8, 1), Tile(32, 32, 8, 1)),
    ("sm_80", 64, 4, 0): Tiles(Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(32, 32, 4, 2)),
    ("sm_80", 64, 4, 1): Tiles(Tile(32, 16, 8, 2), Tile(16, 32, 8, 1), Tile(32, 32, 8, 2)),
    ("sm_80", 128, 4, 0): Tiles(Tile(32, 16, 8, 2), Tile(16, 32, 8, 1), Tile(32, 32, 8, 2)),
    ("sm_80", 128, 4, 1): Tiles(Tile(16, 16, 8, 2), Tile(16, 32, 8, 1), Tile(16, 16, 8, 2)),
    ("sm_80", 128, 4, 2): Tiles(Tile(16, 16, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
    ("sm_80", 256, 4, 0): Tiles(Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
    ("sm_80", 256, 4, 1): Tiles(Tile(16, 16, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
    ("sm_90", 64, 2, 0): Tiles(Tile(128, 128, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
    ("sm_90", 64, 2, 1): Tiles(Tile(128, 64, 8, 2), Tile(16, 128, 8, 1), Tile(128, 32, 8, 2)),
    ("sm_90", 128, 2, 0): Tiles(Tile(128, 128, 8, 2), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),
    ("sm_90", 128, 2, 1): Tiles(Tile(128, 64, 8, 2), Tile(16, 64, 8, 1), Tile(128, 32, 8, 2)),
    ("sm_90", 128, 2, 2): Tiles(Tile(128, 32, 8, 2), Tile(16, 16, 8, 1), Tile(128, 32, 8, 2)),
    ("sm_90", 256, 2, 0): Tiles(Tile(128, 64, 8, 2), Tile(16, 64, 8, 2), Tile(128, 32, 8, 2)),
    ("sm_90", 256, 2, 1): Tiles(Tile(128, 32, 8, 2), Tile(16, 16, 8, 1), Tile(64, 16, 8, 2)),
    ("sm_90", 256, 2, 2): Tiles(Tile(64, 32, 8, 2), Tile(16, 16, 8, 1), Tile(64, 16, 8, 2)),
    ("sm_90", 64, 4, 0): Tiles(Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(32, 32, 4, 2)),
    ("sm_90", 64, 4, 1): Tiles(Tile(32, 16, 8, 2), Tile(16, 32, 8, 1), Tile(32, 32, 8, 2)),
    ("sm_90", 128, 4, 0): Tiles(Tile(32, 16, 8, 2), Tile(16, 32, 8, 1), Tile(32, 32, 8, 2)),
    ("sm_90", 128, 4, 1): Tiles(Tile(16, 16, 8, 2), Tile(16, 32, 8, 1), Tile(16, 16, 8, 2)),
    ("sm_90", 128, 4, 2): Tiles(Tile(16, 16, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
    ("sm_90", 256, 4, 0): Tiles(Tile(16, 16, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
    ("sm_100", 64, 2, 0): Tiles(Tile(128, 128, 8, 3), Tile(64, 128, 8, 1), Tile(128, 64, 8, 2)),
    ("sm_100", 128, 2, 0): Tiles(Tile(128, 128, 8, 2), Tile(32, 128, 8, 1), Tile(128, 64, 8, 2)),
    ("sm_100", 128, 2, 1): Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 8, 1), Tile(128, 32, 8, 2)),
    ("sm_100", 256, 2, 0): Tiles(Tile(128, 64, 8, 2), Tile(16, 16, 8, 2), Tile(128, 32, 8, 2)),
    ("sm_100", 256, 2, 1): Tiles(Tile(128, 32, 8, 2), Tile(16, 16, 8, 1), Tile(64, 32, 8, 2)),
    ("sm_100", 64, 4, 0): Tiles(Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("sm_100", 64, 4, 1): Tiles(Tile(32, 32, 8, 2), Tile(16, 32, 8, 1), Tile(32, 32, 8, 2)),
    ("sm_100", 128, 4, 0): Tiles(Tile(32, 16, 8, 2), Tile(16, 32, 8, 1), Tile(16, 32, 8, 2)),
}


def padded_width(width: int) -> int:
    """The power of two that a tile's rows are padded to; tl.dot wants 16 at least."""
    return max(16, triton.next_power_of_2(width))


def crowding(width: int, given: Container[str]) -> int:
    """0, 1 or 2: how much of the registers what is given takes, by the names of the operators' arguments.

    The weights are such that the kernels of tests/ahead_of_time/attention.py spill nothing.
    """
    burden = sum(weight for name, weight in BURDENS.items() if name in given)
    if "block_table" in given:
        burden += 3
    elif any(name in given for name in POINTERS):
        burden += 2 if width <= 128 else 4
    return 0 if burden == 0 else 1 if burden <= 3 else 2


def select_tiles(architecture: str, head_dim: int, value_dim: int, itemsize: int, given: Container[str]) -> Tiles:
    """The row of the table for heads as wide as the wider of query and value, and arguments of these names."""
    width = max(64, padded_width(head_dim), padded_width(value_dim))
    if architecture == "gfx942":  # as sm_80, with as many threads: its warps have 64
        tiles = select_tiles("sm_80", head_dim, value_dim, itemsize, given)
        return Tiles(*(tile._replace(num_warps=tile.num_warps // 2) for tile in tiles))
    architectures = ("sm_100", "sm_90") if architecture == "sm_100" else (architecture,)
    levels = range(crowding(width, given), -1, -1)
    rows = [(name, width, itemsize, level) for level in levels for name in architectures]
    return next(TILES[row] for row in rows if row in TILES)


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's class of a device: sm_90 and sm_100 have TMA and 227 KB of shared memory; sm_80 is the rest."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 9 or properties.shared_memory_per_block_optin < 227 * 1024:
        return "sm_80"
    return "sm_90" if properties.major == 9 else "sm_100"


def use_descriptors(*tensors: Tensor) -> bool:
    """Whether tiles of these tensors should be loaded through tensor descriptors (TMA).

    TMA wants the base and every stride but the last 16-byte aligned. float32 products use no tensor cores, so
    that loads are not what they wait for.
    """
    return architecture(tensors[0].device) in ("sm_90", "sm_100") and all(
        x.element_size() == 2
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


def describe(tensor: Tensor, block_rows: int) -> TensorDescriptor:
    """A descriptor of [B, heads, S, width] whose tiles are block_rows rows of one head."""
    return TensorDescriptor.from_tensor(tensor, [1, 1, block_rows, padded_width(tensor.shape[-1])])


def launch_options(
    architecture: str, tile: Tile, itemsize: int, softcap: bool, wide_dq: bool = False
) -> dict[str, int]:
    """The tile as the keyword arguments of a kernel. wide_dq: it is that of dq, of a width beyond 64.

    For the sake of 128 registers a thread, the compiler spills some for "sm_100", and in kernels of float32, or with
    softcap, unless it is told that there are more; where it is told so, it spills in those of wide dq before "sm_100".
    """
    options = {
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    crowded = itemsize == 4 or (softcap and not wide_dq) or architecture == "sm_100"
    if crowded and architecture != "gfx942":
        options["maxnreg"] = 255
    return options


def within_reach(tensor: Tensor) -> Tensor:
    """The tensor as the kernels can walk it: with stride 1 in the last dimension and rows less than FAR apart."""
    return tensor if tensor.stride(-1) == 1 and tensor.stride(-2) < FAR else tensor.contiguous()


def softcap_argument(softcap: float | None) -> float | None:
    """softcap within bounds beyond which it changes nothing more, but scale / softcap might become 0 or infinite."""
    return None if softcap is None else min(max(softcap, 1e-30), 1e30)


def empty_heads(batch: int, heads: int, seqlen: int, width: int, like: Tensor) -> Tensor:
    """[B, heads, S, width] that lies in memory as [B, S, heads, width], so that merging the heads copies nothing."""
    return like.new_empty(batch, seqlen, heads, width).transpose(1, 2)


def mask_arguments(mask: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[Tensor | None, list[int], str]:
    """(mask, its strides over [B, H, Sq, Sk] with 0 where it broadcasts, its kind: none, bool or additive)."""
    if mask is None:
        return None, [0, 0, 0, 0], "none"
    kind = "bool" if mask.dtype == torch.bool else "additive"
    mask = _aligned_mask(mask.expand(shape))
    strides = [stride if size > 1 else 0 for size, stride in zip(mask.shape, mask.stride())]
    expanded = mask.as_strided(shape, strides)
    return expanded.view(torch.uint8) if kind == "bool" else expanded, strides, kind


def _aligned_mask(mask: Tensor) -> Tensor:
    """The mask, without what it repeats, if the kernels can walk it as it is, else a copy, as torch pads biases."""
    for dim, stride in enumerate(mask.stride()):
        if stride == 0:
            mask = mask.narrow(dim, 0, 1)
    *rows, columns = mask.shape
    strides = [stride if size > 1 else 0 for size, stride in zip(rows, mask.stride())]
    padded = padded_columns(columns)
    last = mask.storage_offset() + sum((size - 1) * stride for size, stride in zip(rows, strides))
    aligned = columns == 1 or (
        mask.stride(-1) == 1
        and mask.data_ptr() % 16 == 0
        and all(stride % MASK_ALIGNMENT.value == 0 for stride in strides)
        and (last + padded) * mask.element_size() <= mask.untyped_storage().nbytes()
    )
    if mask.numel() == 0 or (aligned and strides[-1] < FAR):
        return mask
    return mask.new_empty(*rows, padded)[..., :columns].copy_(mask)


@triton.jit
def load_rows(
    source,  # [B, heads, S, WIDTH]: a pointer, or a descriptor of [1, 1, BLOCK_S, BLOCK_W] tiles
    strides,  # of batch, head and row
    batch,
    head,
    start,
    end,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """[BLOCK_S, BLOCK_W]: the rows from start on of one head, 0 from end, with DESCRIPTORS S, and WIDTH on."""
    if DESCRIPTORS:
        tile = source.load([batch, head, start, 0]).reshape(BLOCK_S, BLOCK_W)
    else:
        rows = tl.arange(0, BLOCK_S)[:, None]
        columns = tl.arange(0, BLOCK_W)[None, :]
        first = source + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
        pointers = first + tl.cast(start, tl.int64) * strides[2] + rows * strides[2] + columns
        tile = tl.load(pointers, mask=(start + rows < end) & (columns < WIDTH), other=0.0)
    return tile


@triton.jit
def store_rows(
    target,  # [B, heads, S, WIDTH]
    strides,  # of batch, head and row
    tile,  # [BLOCK_S, BLOCK_W]
    batch,
    head,
    start,
    end,
    WIDTH: tl.constexpr,
):
    """Stores the part of tile that lies before end and within WIDTH as the rows from start on of one head."""
    rows = tl.arange(0, tile.shape[0])[:, None]
    columns = tl.arange(0, tile.shape[1])[None, :]
    first = target + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    pointers = first + tl.cast(start, tl.int64) * strides[2] + rows * strides[2] + columns
    inside = (start + rows < end) & (columns < WIDTH)
    tl.store(pointers, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x):
    """Of float32, within 2 ulp. |x| < 0.6: x + x^3 p(x^2), p of degree 4. Beyond: 1 - 2e / (1 + e), e = e^(-2|x|)."""
    square = x * x
    p = square * -0.00626911968 + 0.0211109594
    p = square * p - 0.0538739487
    p = square * p + 0.133329153
    p = square * p - 0.333333313
    small = x + x * square * p
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    large = 1 - 2 * e / (1 + e)
    return tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0, -large, large))


@triton.jit
def cap_scores(scores, scale, softcap):
    """(scores, factor), to be multiplied: with softcap tanh(scale / softcap * scores) and softcap, else as given."""
    if softcap is not None:
        scores = _tanh(scores * (scale / softcap))
        scale = softcap
    return scores, scale


@triton.jit
def add_biases(
    scores,  # a float32 tile of query key^T, to be multiplied by factor
    factor,
    row,
    column,
    first_query,
    first_key,
    lengths,  # (seqlen_q, seqlen_k)
    offset,  # query i is at position i + offset among the keys
    slope,  # of ALiBi, or None
    mask,  # of this batch and head; read if MASK is additive
    mask_strides,  # of query and key
    MASK: tl.constexpr,
):
    """(scores, factor) with ALiBi and an additive mask, where there are such; the factor is then 1."""
    if slope is not None or MASK == "additive":
        scores *= factor
        factor = 1.0
    if slope is not None:
        distance = (first_query + offset - first_key + row).to(tl.float32) - column.to(tl.float32)
        scores -= slope * tl.abs(distance)
    if MASK == "additive":
        inside = (first_query + row < lengths[0]) & (first_key + column < mask_end(lengths[1]))
        pointers = mask_pointers(mask, mask_strides, first_query, first_key, row, column)
        scores += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return scores, factor
