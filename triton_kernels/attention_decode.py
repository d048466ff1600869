"""Attention of a few queries over many keys, as in decoding: the keys are split among programs, and then combined.

Flash-decoding (https://pytorch.org/blog/flash-decoding): reading the keys is what takes the time, so a program takes
all the queries of all the query heads that share a key head as its rows, and one part of the keys. It leaves its rows'
unfinished output, peak and total, which a second kernel combines. With one part, one kernel does it all.

Shapes: attention_tiles.py. A sequence has Sq * H / G rows for each key head, row = query * (H / G) + head; the results
are N = lse.numel() in all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_arguments import crowded, shared_arguments, stride_arguments
from .attention_combine import combine_parts, finish_rows, row_offsets
from .attention_tiles import LOG2E, architecture, cap_scores, empty_heads, padded_width, within_reach
from .attention_visible import mask_end, sequence
from .common import finite_peak, multiprocessors, unit_stride
from .philox import kept_weights

# With so many programs on each multiprocessor, loads of one overlap with the arithmetic of another.
PROGRAMS_PER_MULTIPROCESSOR = 2
# Tiles of keys that a part has at least, for its partial results to be small beside them.
LEAST_TILES = 2


class DecodeTile(NamedTuple):
    """How the kernel is cut and launched."""

    block_r: int  # rows
    block_k: int  # keys
    num_warps: int


# (head width at most, bytes an element) -> tiles for more and more rows. The budget is that of attention_tiles.TILES
# on "sm_80", whatever the features. tl.dot takes 16 rows at least, which one or a few queries don't fill: padding costs
# nothing while loads are waited for. float32 has no tensor cores, where it would.
DECODE_TILES: dict[tuple[int, int], tuple[DecodeTile, ...]] = {
    (64, 2): (DecodeTile(16, 64, 4), DecodeTile(64, 32, 4)),
    (128, 2): (DecodeTile(16, 64, 4), DecodeTile(64, 32, 8)),
    (256, 2): (DecodeTile(16, 32, 8), DecodeTile(32, 32, 8)),
    (64, 4): (DecodeTile(16, 32, 8),),
    (128, 4): (DecodeTile(16, 32, 8),),
    (256, 4): (DecodeTile(16, 16, 8),),
}


def select_tile(head_dim: int, value_dim: int, itemsize: int, rows: int | None, masked: bool) -> DecodeTile:
    """The smallest tile that holds so many rows, else the largest; None: of an unknown number."""
    tiles = DECODE_TILES[max(64, padded_width(head_dim), padded_width(value_dim)), itemsize]
    tile = next((tile for tile in tiles if rows is not None and tile.block_r >= rows), tiles[-1])
    return beside_mask(tile) if masked else tile


def beside_mask(tile: DecodeTile) -> DecodeTile:
    """The tile with half the keys, for the registers that a mask takes."""
    return tile._replace(block_k=max(16, tile.block_k // 2))


def launch_options(architecture: str, tile: DecodeTile, paged: bool, masked: bool, crowded: bool) -> dict[str, int]:
    """The tile as the keyword arguments of the kernel, for an architecture of attention_tiles.architecture.

    gfx942 has warps of 64 threads and 64 KB of shared memory. A mask takes the registers of a stage. Over pages the
    stages are shared by the loads of their numbers and those of the keys, which wait for them. Where it is crowded, and
    for "sm_100", the compiler would spill some registers for the sake of more threads.
    """
    amd = architecture == "gfx942"
    stages = 3 - masked - amd
    options = {
        "BLOCK_R": tile.block_r,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps // 2 if amd else tile.num_warps,
        "num_stages": 2 * stages - 1 if paged else stages,
    }
    if (crowded or architecture == "sm_100") and not amd:
        options["maxnreg"] = 255
    return options


def select_parts(programs: int, multiprocessors: int, seqlen_k: int, block_k: int) -> int:
    """Into how many parts the keys are split, so that these programs, each times the parts, fill the device."""
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // programs
    return max(1, min(wanted, triton.cdiv(seqlen_k, block_k) // LEAST_TILES))


@triton.jit
def _load_keys(
    source,  # of this sequence and head: [Sk, WIDTH], or [PAGE_SIZE, WIDTH] of page 0
    stride_page,
    stride_row,
    pages,  # [BLOCK_K], the pages that the keys are on, or None
    start,
    seqlen_k,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """[BLOCK_K, BLOCK_W]: the keys, or values, from start on, 0 beyond seqlen_k and WIDTH."""
    keys = tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_W)[None, :]
    if pages is None:
        pointers = source + tl.cast(start, tl.int64) * stride_row + (keys[:, None] * stride_row + columns)
    else:
        rows = pages.to(tl.int64) * stride_page + ((start + keys) % PAGE_SIZE).to(tl.int64) * stride_row
        pointers = source + (rows[:, None] + columns)
    return tl.load(pointers, mask=(start + keys < seqlen_k)[:, None] & (columns < WIDTH), other=0.0)


@triton.jit
def _load_mask(
    mask,
    offsets,  # int64 [BLOCK_R], of the rows
    stride_k,
    inside,  # [BLOCK_R]
    start,
    seqlen_k,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_R, BLOCK_K]: the mask of the rows and the keys from start on, 0 beyond the rows and mask_end(seqlen_k)."""
    keys = tl.arange(0, BLOCK_K)[None, :]
    pointers = mask + tl.cast(start, tl.int64) * stride_k + offsets[:, None] + keys * stride_k
    return tl.load(pointers, mask=inside[:, None] & (start + keys < mask_end(seqlen_k)), other=0)


@triton.jit
def _attend(
    accumulator,  # [BLOCK_R, BLOCK_DV] float32: sum of weights * value so far
    peak,  # [BLOCK_R] float32: largest score so far
    total,  # [BLOCK_R] float32: sum of weights so far
    query_tile,  # [BLOCK_R, BLOCK_D]
    queries,  # [BLOCK_R]
    inside,  # [BLOCK_R]: whether there is such a row
    sequences,  # [BLOCK_R]: batch * heads + head, for dropout
    offset,  # query i is at position i + offset among the keys
    slopes,  # [BLOCK_R] of ALiBi, or None
    mask,
    mask_offsets,
    mask_stride_k,
    key,  # like value of this sequence and key head: its first row, or that of page 0
    key_stride_page,
    key_stride_row,
    value,
    value_stride_page,
    value_stride_row,
    pages,  # of this sequence, or None
    begin,
    end,
    seqlen_k,
    scale,
    softcap,
    window_left,
    window_right,
    dropout_state,
    threshold,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MASK: tl.constexpr,
):
    """Takes the keys from begin to end into (accumulator, peak, total)."""
    for start in range(begin, end, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        tile_pages = None
        if pages is not None:
            tile_pages = tl.load(pages + keys // PAGE_SIZE, mask=keys < seqlen_k, other=0)
        key_tile = _load_keys(
            key, key_stride_page, key_stride_row, tile_pages, start, seqlen_k, HEAD_DIM, BLOCK_K, BLOCK_D, PAGE_SIZE
        )
        scores = tl.dot(query_tile, key_tile.T, input_precision="ieee")  # [BLOCK_R, BLOCK_K]
        scores, factor = cap_scores(scores, scale, softcap)
        scores *= factor
        distances = (queries + offset)[:, None] - keys[None, :]
        if slopes is not None:
            scores -= slopes[:, None] * tl.abs(distances).to(tl.float32)
        visible = (keys < seqlen_k)[None, :]
        if window_left is not None:
            visible = visible & (distances <= window_left)
        if window_right is not None:
            visible = visible & (distances >= -window_right)
        if MASK == "bool":
            visible = visible & (_load_mask(mask, mask_offsets, mask_stride_k, inside, start, seqlen_k, BLOCK_K) != 0)
        if MASK == "additive":
            added = _load_mask(mask, mask_offsets, mask_stride_k, inside, start, seqlen_k, BLOCK_K)
            scores += added.to(tl.float32)
        scores = tl.where(visible, scores, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = finite_peak(new_peak)
        weights = tl.exp2((scores - shift[:, None]) * LOG2E)
        decay = tl.exp2((peak - shift) * LOG2E)
        total = total * decay + tl.sum(weights, 1)
        if dropout_state is not None:
            kept = kept_weights(dropout_state, threshold, sequences, queries, start, BLOCK_K)
            weights = tl.where(kept, weights, 0.0)
        value_tile = _load_keys(
            value, value_stride_page, value_stride_row, tile_pages, start, seqlen_k,
            VALUE_DIM, BLOCK_K, BLOCK_DV, PAGE_SIZE,
        )  # fmt: skip
        accumulator = tl.dot(
            weights.to(value_tile.dtype), value_tile, accumulator * decay[:, None], input_precision="ieee"
        )
        peak = new_peak
    return accumulator, peak, total


@triton.jit
def _store_rows(
    output,  # [B, H, S, VALUE_DIM]
    output_strides,
    lse,  # [B, H, S], contiguous
    heads,
    seqlen,
    batch,
    row_heads,  # [BLOCK_R]
    rows,  # int64 [BLOCK_R]
    inside,  # [BLOCK_R]
    tile,  # [BLOCK_R, BLOCK_DV]
    row_lse,  # [BLOCK_R]
    VALUE_DIM: tl.constexpr,
):
    """Stores the rows that are inside."""
    columns = tl.arange(0, tile.shape[1])[None, :]
    pointers = output + row_offsets(batch, row_heads, rows, output_strides)[:, None] + columns
    tl.store(pointers, tile.to(output.dtype.element_ty), mask=inside[:, None] & (columns < VALUE_DIM))
    tl.store(lse + (batch * heads + row_heads) * seqlen + rows, row_lse, mask=inside)


# A server has other counts at each step, and Triton compiles for multiples of 16, and for 1, in all combinations.
@triton.jit(do_not_specialize=["batches", "query_rows", "row_tiles", "parts", "results"])
def attention_decode_kernel(
    query,  # [B, H, Sq, D], or [1, H, Tq, D] if packed
    key,  # [B, G, Sk, D], [1, G, Tk, D] if packed, or [pages, G, PAGE_SIZE, D]
    value,  # like key, Dv wide
    mask,  # of [B, H, Sq, Sk] by its strides, uint8 (0: hidden) or added, or None
    output,  # [B, H, Sq, Dv], or [1, H, Tq, Dv]; written if there is one part
    lse,  # [B, H, Sq], or [1, H, Tq], float32, contiguous; likewise
    partial_output,  # [parts, N, Dv] float32, or None: there is one part
    partial_peak,  # [parts, N] float32, or None
    partial_total,  # [parts, N] float32, or None
    alibi_slopes,  # [H] or [B, H] float32, contiguous, or None
    sinks,  # [H] float32, or None
    dropout_state,  # [2] int64: seed and offset, or None
    cu_seqlens_q,  # [B + 1] int32, or None
    cu_seqlens_k,  # [B + 1] int32, or None
    seqused_k,  # [B] int32, or None
    block_table,  # [B, pages of a sequence] int32, or None
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,  # of pages, where there are such
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
    alibi_stride_b,
    block_table_stride,
    batches,
    heads,
    kv_heads,
    query_rows,  # Sq, or Tq
    seqlen_q,  # of the longest sequence
    seqlen_k,
    row_tiles,
    parts,
    results,  # N
    window_left,  # None: no bound
    window_right,
    scale,
    softcap,  # positive, or None
    threshold,  # dropout_threshold(p)
    kept_scale,  # 1 / (1 - p), or None
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK: tl.constexpr,  # none, bool or additive
    BOTTOM_RIGHT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0: keys are not paged
):
    """One program: BLOCK_R rows of a sequence and key head, and one part of their keys."""
    program = tl.program_id(0)
    row_tile = program % row_tiles
    part = program // row_tiles % parts
    kv_head = (program // row_tiles // parts % kv_heads).to(tl.int64)
    batch = (program // row_tiles // parts // kv_heads).to(tl.int64)
    group = heads // kv_heads
    first_row = row_tile * BLOCK_R
    rows = first_row + tl.arange(0, BLOCK_R)
    queries = rows // group
    row_heads = kv_head.to(tl.int32) * group + rows % group
    output_strides = (output_stride_b, output_stride_h, output_stride_s)

    query_batch, first_query, seqlen_q = sequence(batch, cu_seqlens_q, None, seqlen_q)
    query_batch = tl.cast(query_batch, tl.int64)
    if cu_seqlens_q is not None and partial_output is None:
        # The last sequence's programs also clear the rows that belong to no sequence.
        unclaimed = tl.where(batch == batches - 1, first_query + seqlen_q, query_rows)
        for start in range(unclaimed, query_rows, row_tiles * BLOCK_R // group):
            places = (start + queries).to(tl.int64)
            _store_rows(
                output, output_strides, lse, heads, query_rows, query_batch, row_heads, places, places < query_rows,
                tl.zeros([BLOCK_R, BLOCK_DV], tl.float32), tl.full([BLOCK_R], float("-inf"), tl.float32), VALUE_DIM,
            )  # fmt: skip
    if first_row >= seqlen_q * group:
        return

    inside = queries < seqlen_q
    query_places = (first_query + queries).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)[None, :]
    query_offsets = row_offsets(query_batch, row_heads, query_places, (query_stride_b, query_stride_h, query_stride_s))
    query_tile = tl.load(
        query + query_offsets[:, None] + columns, mask=inside[:, None] & (columns < HEAD_DIM), other=0.0
    )
    slopes = None
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + batch * alibi_stride_b + row_heads, mask=inside, other=0.0)
    mask_offsets = None
    if MASK != "none":
        mask_offsets = row_offsets(batch, row_heads, queries, (mask_stride_b, mask_stride_h, mask_stride_q))

    key_batch, first_key, seqlen_k = sequence(batch, cu_seqlens_k, seqused_k, seqlen_k)
    key += kv_head * key_stride_h
    value += kv_head * value_stride_h
    pages = None
    if PAGE_SIZE:
        pages = block_table + batch * block_table_stride
    else:
        key += tl.cast(key_batch, tl.int64) * key_stride_b + tl.cast(first_key, tl.int64) * key_stride_s
        value += tl.cast(key_batch, tl.int64) * value_stride_b + tl.cast(first_key, tl.int64) * value_stride_s

    # The keys that any of the rows sees, in whole tiles, and of them this part: it depends on this sequence alone.
    offset = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
    begin = 0
    end = seqlen_k
    if window_left is not None:
        begin = tl.maximum(first_row // group + offset - window_left, 0)
    if window_right is not None:
        last_query = tl.minimum((first_row + BLOCK_R - 1) // group, seqlen_q - 1)
        end = tl.minimum(end, last_query + offset + window_right + 1)
    first_tile = begin // BLOCK_K
    tiles = tl.cdiv(tl.maximum(tl.cdiv(end, BLOCK_K) - first_tile, 0), parts)
    begin = (first_tile + part * tiles) * BLOCK_K
    end = tl.minimum(end, begin + tiles * BLOCK_K)

    accumulator = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    # With a boolean mask, runs of tiles that are not wholly hidden, each taken when the tile behind it is reached.
    run = begin
    for start in range(begin, (end if MASK == "bool" else begin) + BLOCK_K, BLOCK_K):
        run_end = end
        next_run = end
        if MASK == "bool":
            mask_tile = _load_mask(mask, mask_offsets, mask_stride_k, inside, start, end, BLOCK_K)
            hidden = tl.max(mask_tile.to(tl.int32)) == 0
            run_end = tl.where(hidden, start, run)
            next_run = tl.where(hidden, start + BLOCK_K, run)
        accumulator, peak, total = _attend(
            accumulator, peak, total, query_tile, queries, inside, batch.to(tl.int32) * heads + row_heads, offset,
            slopes, mask, mask_offsets, mask_stride_k, key, key_stride_b, key_stride_s, value, value_stride_b,
            value_stride_s, pages, run, run_end, seqlen_k, scale, softcap, window_left, window_right, dropout_state,
            threshold, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_K, PAGE_SIZE, MASK,
        )  # fmt: skip
        run = next_run

    if partial_output is None:
        sink = None
        if sinks is not None:
            sink = tl.load(sinks + row_heads, mask=inside, other=0.0)
        factor, row_lse = finish_rows(peak, total, sink, kept_scale)
        _store_rows(
            output, output_strides, lse, heads, query_rows, query_batch, row_heads, query_places, inside,
            accumulator * factor[:, None], row_lse, VALUE_DIM,
        )  # fmt: skip
    else:
        places = part * tl.cast(results, tl.int64) + (query_batch * heads + row_heads) * query_rows + query_places
        columns = tl.arange(0, BLOCK_DV)[None, :]
        tl.store(partial_peak + places, peak, mask=inside)
        tl.store(partial_total + places, total, mask=inside)
        tl.store(
            partial_output + places[:, None] * VALUE_DIM + columns,
            accumulator,
            mask=(inside & (peak != float("-inf")))[:, None] & (columns < VALUE_DIM),
        )


def attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    softcap: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_state: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """(output, lse) of attention_forward in csrc/ops.cpp, for a few queries of each sequence.

    num_splits: into how many parts the keys are split. 0: as many as keep the device busy; then the last bits of a
    sequence's results depend on what else is in the batch, and otherwise not.
    """
    packed = cu_seqlens_q is not None
    output = empty_heads(*query.shape[:3], value.shape[3], query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    query, key, value = unit_stride(query), within_reach(key), within_reach(value)
    batches, arguments = shared_arguments(
        query, key, value, mask, scale, is_causal, bottom_right, softcap, window_left, window_right, alibi_slopes,
        dropout_p, dropout_state, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    rows = query.shape[1] // key.shape[1] * arguments["seqlen_q"]
    if lse.numel() == 0 or rows == 0 or batches == 0:
        return output.zero_(), lse.fill_(float("-inf"))
    sinks, block_table = (None if x is None else x.contiguous() for x in (sinks, block_table))

    unknown_rows = packed and num_splits != 0  # a tile for the longest sequence would depend on the batch
    widths = (query.shape[3], value.shape[3])
    tile = select_tile(*widths, query.element_size(), None if unknown_rows else rows, mask is not None)
    row_tiles = triton.cdiv(rows, tile.block_r)
    programs = batches * key.shape[1] * row_tiles
    seqlen_k = arguments["seqlen_k"] if block_table is None else min(arguments["seqlen_k"], max_seqlen_k)
    parts = num_splits
    if parts == 0:
        left, right = arguments["window_left"], arguments["window_right"]
        seen = seqlen_k if left is None or right is None else left + right + arguments["seqlen_q"]
        parts = select_parts(programs, multiprocessors(query), min(seen, seqlen_k), tile.block_k)
    parts = max(1, min(parts, triton.cdiv(seqlen_k, tile.block_k)))
    partial_output = partial_peak = partial_total = None
    if parts > 1:
        partial_output = query.new_empty(parts, lse.numel(), value.shape[3], dtype=torch.float32)
        partial_peak, partial_total = query.new_empty(2, parts, lse.numel(), dtype=torch.float32)
    with torch.cuda.device_of(query):
        attention_decode_kernel[(programs * parts,)](
            query=query,
            key=key,
            value=value,
            output=output,
            lse=lse,
            partial_output=partial_output,
            partial_peak=partial_peak,
            partial_total=partial_total,
            sinks=sinks,
            block_table=block_table,
            **stride_arguments(output=output),
            block_table_stride=0 if block_table is None else block_table.stride(0),
            batches=batches,
            row_tiles=row_tiles,
            parts=parts,
            results=lse.numel(),
            **arguments,
            PAGE_SIZE=0 if block_table is None else key.shape[2],
            **launch_options(
                architecture(query.device), tile, block_table is not None, mask is not None, crowded(arguments)
            ),
        )
    if partial_output is not None:
        combine_parts(
            partial_output, partial_peak, partial_total, output, lse, sinks, arguments["cu_seqlens_q"], batches,
            arguments["kept_scale"],
        )  # fmt: skip
    return output, lse
