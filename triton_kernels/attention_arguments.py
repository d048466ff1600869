"""The keyword arguments that the attention kernels have in common, from those of the operators in csrc/ops.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_tiles import (
    POINTERS,
    Tile,
    Tiles,
    architecture,
    mask_arguments,
    padded_width,
    select_tiles,
    softcap_argument,
)
from .attention_visible import list_tiles, window_bounds
from .philox import dropout_threshold

Arguments = dict[str, Any]


def stride_arguments(**tensors: Tensor) -> Arguments:
    """The strides over batch, head and row of each tensor [B, heads, S, width] under the names that kernels have."""
    return {
        f"{name}_stride_{letter}": stride
        for name, tensor in tensors.items()
        for letter, stride in zip("bhs", tensor.stride())
    }


def shared_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    softcap: float | None,
    window_left: int | None,
    window_right: int | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    dropout_state: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[int, Arguments]:
    """(how many sequences there are, the arguments). ``seqlen_q`` and ``seqlen_k`` are those of the longest ones."""
    heads, query_rows, head_dim = query.shape[1:]
    batch = query.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    seqlen_q = query_rows if cu_seqlens_q is None else max_seqlen_q
    seqlen_k, value_dim = key.shape[2], value.shape[3]
    if cu_seqlens_k is not None:
        seqlen_k = max_seqlen_k
    elif block_table is not None:
        seqlen_k *= block_table.shape[1]
    left, right = window_bounds(window_left, window_right, is_causal, seqlen_q, seqlen_k)
    mask, mask_strides, mask_kind = mask_arguments(mask, (batch, heads, query_rows, seqlen_k))
    alibi_slopes, dropout_state, cu_seqlens_q, cu_seqlens_k, seqused_k = (
        None if x is None else x.contiguous()
        for x in (alibi_slopes, dropout_state, cu_seqlens_q, cu_seqlens_k, seqused_k)
    )
    return batch, {
        "mask": mask,
        "alibi_slopes": alibi_slopes,
        "dropout_state": dropout_state,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_k": seqused_k,
        **stride_arguments(query=query, key=key, value=value),
        **{f"mask_stride_{letter}": stride for letter, stride in zip("bhqk", mask_strides)},
        "alibi_stride_b": heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        "heads": heads,
        "kv_heads": key.shape[1],
        "query_rows": query_rows,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "window_left": left,
        "window_right": right,
        "scale": scale,
        "softcap": softcap_argument(softcap),
        "threshold": None if dropout_state is None else dropout_threshold(dropout_p),
        "kept_scale": None if dropout_state is None else 1 / (1 - dropout_p),
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": padded_width(head_dim),
        "BLOCK_DV": padded_width(value_dim),
        "MASK": mask_kind,
        "BOTTOM_RIGHT": bottom_right and (left is not None or right is not None or alibi_slopes is not None),
    }


def tile_list_arguments(arguments: Arguments, tile: Tile, by_keys: bool) -> Arguments:
    """With a boolean mask the lists of the tiles to visit; by_keys: of queries for each tile of keys."""
    if arguments["MASK"] != "bool":
        return {"tiles": None, "tiles_stride_b": 0, "tiles_stride_h": 0}
    offset = arguments["seqlen_k"] - arguments["seqlen_q"] if arguments["BOTTOM_RIGHT"] else 0
    band = (offset, arguments["window_left"], arguments["window_right"])
    tiles, (stride_b, stride_h) = list_tiles(arguments["mask"], band, tile.block_q, tile.block_k, by_keys)
    return {"tiles": tiles, "tiles_stride_b": stride_b, "tiles_stride_h": stride_h}


def chosen_tiles(query: Tensor, arguments: Arguments, paged: bool = False) -> Tiles:
    """The tiles of the kernels that get these arguments."""
    given = {name for name, value in arguments.items() if value is not None} | ({"block_table"} if paged else set())
    widths = (arguments["HEAD_DIM"], arguments["VALUE_DIM"])
    return select_tiles(architecture(query.device), *widths, query.element_size(), given)


def crowded(arguments: Arguments) -> bool:
    """Whether something adds a tile of its own to the kernels' registers."""
    return any(arguments[name] is not None for name in ("mask", "softcap", "alibi_slopes", "dropout_state"))


def needs_pointers(arguments: Arguments) -> bool:
    """Whether rows of one sequence's tile may be another's, or unused, which tensor descriptors would load."""
    return any(arguments[name] is not None for name in POINTERS)


def sink_gradients(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """[H]: what flows back into the sinks; ``delta`` [B, H, Sq] is 0 for rows that saw nothing."""
    weights = torch.where(lse == float("-inf"), 0.0, torch.exp(sinks[:, None] - lse))
    return -(weights * delta).sum((0, 2))
