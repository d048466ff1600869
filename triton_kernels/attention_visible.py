"""Which keys a query sees: sequences of their own lengths, the band of a window or a causal mask, and boolean masks.

Query i is at position p = i + offset among the keys and sees keys p - left .. p + right; None is no bound. A kernel
walks over tiles of keys (or of queries) in up to three phases: tiles that only some of its rows see, at the lower edge
of the band; tiles that all of them see; and those at the upper edge, the end of the keys included. Other tiles it does
not touch. With a boolean mask the tiles are listed beforehand, as in FlexAttention (arXiv 2412.05496).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LIST_WARPS = 8  # of list_tiles_kernel
# Rows of a mask begin at multiples of so many elements and are read up to one, so that loads are of whole vectors: byte
# by byte, tiles would take more registers than there are.
MASK_ALIGNMENT = tl.constexpr(16)


def window_bounds(
    window_left: int | None, window_right: int | None, is_causal: bool, seqlen_q: int, seqlen_k: int
) -> tuple[int | None, int | None]:
    """(left, right): those of a causal mask included, None where nothing is beyond them, and sums fit in 32 bits."""
    if is_causal:
        window_right = 0 if window_right is None else min(window_right, 0)
    reach = max(seqlen_q, seqlen_k)
    left, right = (
        None if bound is None or bound >= reach else max(bound, -2 * reach) for bound in (window_left, window_right)
    )
    return left, right


@triton.jit
def sequence(batch, cu_seqlens, seqused, seqlen):
    """(entry, first, length) of a sequence: its rows are first .. first + length of the first dimension's entry."""
    entry = batch
    first = 0
    length = seqlen
    if cu_seqlens is not None:
        entry = 0
        first = tl.load(cu_seqlens + batch)
        length = tl.load(cu_seqlens + batch + 1) - first
    if seqused is not None:
        length = tl.minimum(length, tl.load(seqused + batch))
    return entry, first, length


@triton.jit
def visible_range(
    first,
    length,
    other_length,
    band,  # (offset, left, right)
    BLOCK: tl.constexpr,
    OTHER_BLOCK: tl.constexpr,
):
    """(lower, full, full_end, end): the phases' bounds, in tiles of keys, for the BLOCK queries from first on.

    Tiles full .. full_end are seen by all of the queries; lower .. full and full_end .. end by some, others by none.
    For the queries that see a tile of keys, swap what is of queries and of keys, and give (-offset, right, left).
    """
    offset, left, right = band
    last = tl.minimum(first + BLOCK, length) - 1
    lower = 0
    full = 0
    full_end = other_length // OTHER_BLOCK
    end = tl.cdiv(other_length, OTHER_BLOCK)
    if right is not None:
        full_end = tl.minimum(full_end, tl.maximum(first + offset + right + 1, 0) // OTHER_BLOCK)
        end = tl.minimum(end, tl.cdiv(tl.maximum(last + offset + right + 1, 0), OTHER_BLOCK))
    if left is not None:
        lower = tl.maximum(first + offset - left, 0) // OTHER_BLOCK
        full = tl.minimum(tl.cdiv(tl.maximum(last + offset - left, 0), OTHER_BLOCK), end)
        full_end = tl.maximum(full_end, full)
    return lower, full, full_end, end


@triton.jit
def places(BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(row, column) numbers within a tile [BLOCK_Q, BLOCK_K], or [BLOCK_K, BLOCK_Q] if TRANSPOSED, to be broadcast."""
    if TRANSPOSED:
        return tl.arange(0, BLOCK_Q)[None, :], tl.arange(0, BLOCK_K)[:, None]
    else:
        return tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def mask_pointers(mask, mask_strides, first_query, first_key, row, column):
    """Into a mask of one batch and head, to the places of a tile; only to its corner they need 64 bits."""
    corner = mask + tl.cast(first_query, tl.int64) * mask_strides[0] + tl.cast(first_key, tl.int64) * mask_strides[1]
    return corner + (row * mask_strides[0] + column * mask_strides[1])


def padded_columns(seqlen_k: int) -> int:
    """mask_end on the host: what a row of a mask takes in memory."""
    return triton.cdiv(seqlen_k, MASK_ALIGNMENT.value) * MASK_ALIGNMENT.value


@triton.jit
def mask_end(seqlen_k):
    """Up to which key a mask's rows can be read; what lies beyond seqlen_k means nothing."""
    return tl.cdiv(seqlen_k, MASK_ALIGNMENT) * MASK_ALIGNMENT


@triton.jit
def visible_places(
    row,
    column,
    first_query,
    first_key,
    lengths,  # (seqlen_q, seqlen_k)
    band,  # (offset, left, right)
    mask,  # of this batch and head, uint8 (0: hidden); read if MASK is bool
    mask_strides,  # of query and key
    MASK: tl.constexpr,
):
    """Of which places in a tile the query sees the key; a bool tile, or what broadcasts to it."""
    seqlen_q, seqlen_k = lengths
    offset, left, right = band
    queries = first_query + row
    keys = first_key + column
    visible = keys < seqlen_k
    if right is not None:
        visible = visible & (keys <= queries + (offset + right))
    if left is not None:
        visible = visible & (keys >= queries + (offset - left))
    if MASK == "bool":
        pointers = mask_pointers(mask, mask_strides, first_query, first_key, row, column)
        visible = visible & (tl.load(pointers, mask=(queries < seqlen_q) & (keys < mask_end(seqlen_k)), other=0) != 0)
    return visible


@triton.jit
def list_tiles_kernel(
    mask,  # uint8, of [B, H, Sq, Sk] by its strides
    tiles,  # int32 [B, H, row tiles, 2 + column tiles], contiguous
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    heads,
    seqlen_q,
    seqlen_k,
    offset,
    window_left,
    window_right,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """One program: one row of ``tiles``, for a tile of queries, or of keys if TRANSPOSED; see list_tiles."""
    band = (offset, window_left, window_right)
    if TRANSPOSED:
        rows = tl.cdiv(seqlen_k, BLOCK_K)
        columns = tl.cdiv(seqlen_q, BLOCK_Q)
        first = tl.program_id(0) % rows * BLOCK_K
        band_of_keys = (-offset, window_right, window_left)
        lower, _, _, end = visible_range(first, seqlen_k, seqlen_q, band_of_keys, BLOCK_K, BLOCK_Q)
    else:
        rows = tl.cdiv(seqlen_q, BLOCK_Q)
        columns = tl.cdiv(seqlen_k, BLOCK_K)
        first = tl.program_id(0) % rows * BLOCK_Q
        lower, _, _, end = visible_range(first, seqlen_q, seqlen_k, band, BLOCK_Q, BLOCK_K)
    batch_head = tl.program_id(0) // rows
    mask += (batch_head // heads).to(tl.int64) * mask_stride_b + (batch_head % heads).to(tl.int64) * mask_stride_h
    counts = tiles + tl.program_id(0).to(tl.int64) * (columns + 2)
    row, column = places(BLOCK_Q, BLOCK_K, False)

    full = 0
    partial = 0
    for tile in range(lower, end):
        first_query = tile * BLOCK_Q if TRANSPOSED else first
        first_key = first if TRANSPOSED else tile * BLOCK_K
        visible = visible_places(
            row, column, first_query, first_key, (seqlen_q, seqlen_k), band, mask, (mask_stride_q, mask_stride_k),
            "bool",
        )  # fmt: skip
        some = tl.max(tl.max(visible.to(tl.int32), 1), 0)
        every = tl.min(tl.min((visible | (first_query + row >= seqlen_q)).to(tl.int32), 1), 0)
        place = tl.where(every != 0, full, columns - 1 - partial)
        tl.store(counts + 2 + place, tile, mask=some != 0)
        full += every
        partial += some - every
    tl.store(counts, full)
    tl.store(counts + 1, partial)


def list_tiles(
    mask: Tensor,
    band: tuple[int, int | None, int | None],
    block_q: int,
    block_k: int,
    by_keys: bool,
) -> tuple[Tensor, list[int]]:
    """(tiles, its strides over batch and head) of a boolean mask, uint8 and expanded to [B, H, Sq, Sk].

    tiles is int32 [B, H, row tiles, 2 + column tiles], 1 for B or H where the mask broadcasts. A row is of a tile of
    queries, its columns are tiles of keys (the other way round if by_keys). It holds the number of columns that all of
    the row sees, and of those that some of it sees, and then the numbers of the former, from the front, and of the
    latter, up to the end. band is (offset, left, right).
    """
    batch, heads, seqlen_q, seqlen_k = mask.shape
    rows, columns = triton.cdiv(seqlen_q, block_q), triton.cdiv(seqlen_k, block_k)
    if by_keys:
        rows, columns = columns, rows
    own_batch, own_heads = (1 if mask.stride(i) == 0 else mask.shape[i] for i in (0, 1))
    tiles = mask.new_empty(own_batch, own_heads, rows, 2 + columns, dtype=torch.int32)
    with torch.cuda.device_of(mask):
        list_tiles_kernel[(own_batch * own_heads * rows,)](
            mask,
            tiles,
            *mask.stride(),
            own_heads,
            seqlen_q,
            seqlen_k,
            *band,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            TRANSPOSED=by_keys,
            num_warps=LIST_WARPS,
        )
    return tiles, list(tiles.expand(batch, heads, -1, -1).stride()[:2])


@triton.jit
def tiles_row(
    strides,  # of list_tiles' tiles, over batch and head
    batch,
    head,
    tile,  # the row
    columns,  # how many tiles a row can hold
):
    """Where in ``tiles`` a row's numbers of tiles begin; the two counts are before them."""
    row = tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    return row + tl.cast(tile, tl.int64) * (columns + 2) + 2


@triton.jit
def tile_range(
    listed,  # tiles + tiles_row, or None
    columns,
    first,  # like the rest as in visible_range
    length,
    other_length,
    band,
    BLOCK: tl.constexpr,
    OTHER_BLOCK: tl.constexpr,
):
    """(lower, full, full_end, upper, end): of what to walk over, phase by phase.

    The phases are lower .. full, full .. full_end, which all rows see, and upper .. end: numbers of tiles, or, unless
    listed is None, places in this list of such numbers.
    """
    if listed is None:
        lower, full, full_end, end = visible_range(first, length, other_length, band, BLOCK, OTHER_BLOCK)
        return lower, full, full_end, full_end, end
    else:
        return 0, 0, tl.load(listed - 2), columns - tl.load(listed - 1), columns
