"""What varlen_attn asks for around the attention operators: checks, and the layout of packed and paged tensors."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastformer.ops import _common
from fastformer.ops.attention import attention
from fastformer.ops.attention_torch import Options
from fastformer.ops.scaled_dot_product_attention import check_features, check_tensors, check_window

if TYPE_CHECKING:
    from torch.nn.attention.varlen import AuxRequest


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    return_aux: AuxRequest | None,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    num_splits: int | None,
    is_causal: bool,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See functional.varlen_attn."""
    _check_tensors(query, key, value, block_table is not None, enable_gqa)
    sequences = _check_sequences(query, key, cu_seq_q, cu_seq_k, seqused_k, block_table)
    for name, length in (("max_q", max_q), ("max_k", max_k)):
        if not _common.is_integer(length):
            raise TypeError(f"{name} is a {type(length).__name__}, must be an int")
        if length < 0:
            raise ValueError(f"{name} is {length}, must not be negative")
    if num_splits is not None and (type(num_splits) is not int or num_splits < 1):
        raise ValueError(f"num_splits is {num_splits!r}, must be None or a positive int")
    if return_aux is not None and not hasattr(return_aux, "lse"):
        raise TypeError(f"return_aux is a {type(return_aux).__name__}, must be None or an AuxRequest")
    left, right = check_window("window_size", window_size, -1)
    heads = query.shape[1:2]
    check_features(is_causal, scale, softcap, alibi_slopes, sinks, query, (heads, (sequences, *heads)))
    options = Options(
        scale=1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale,
        is_causal=is_causal,
        bottom_right=True,
        softcap=softcap,
        window_left=left,
        window_right=right,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        cu_seqlens_q=cu_seq_q,
        cu_seqlens_k=None if block_table is not None else cu_seq_k,
        seqused_k=seqused_k,
        block_table=block_table,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        num_splits=num_splits or 0,
    )
    if query.is_cpu and _readable(cu_seq_q, cu_seq_k, seqused_k, block_table):
        _check_lengths(query, key, options)
    swapped = (x.transpose(0, 1).unsqueeze(0) if x.dim() == 3 else x.transpose(1, 2) for x in (query, key, value))
    return_lse = return_aux is not None and return_aux.lse
    output, lse = attention(*swapped, None, options, return_lse)
    output = output.squeeze(0).transpose(0, 1)
    return (output, lse.squeeze(0)) if return_lse else output


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, paged: bool, enable_gqa: bool) -> None:
    check_tensors(query, key, value)
    if query.dim() != 3:
        raise ValueError(f"query has shape {tuple(query.shape)}, must have 3 dimensions")
    shape = "[pages, page size, heads, width]" if paged else "[tokens, heads, width]"
    for name, x in (("key", key), ("value", value)):
        if x.dim() != (4 if paged else 3):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, must be {shape}")
    _common.check_shape("key", key, (*key.shape[:-1], query.shape[-1]))
    _common.check_shape("value", value, (*key.shape[:-1], value.shape[-1]))
    heads, kv_heads = query.shape[1], key.shape[-2]
    if heads != kv_heads:
        if not enable_gqa:
            raise ValueError(f"key has {kv_heads} heads and query {heads}, must be equal without enable_gqa")
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"query has {heads} heads, must have a multiple of key's {kv_heads}")
    if paged and (key.shape[1] < 16 or key.shape[1] & (key.shape[1] - 1)):
        raise ValueError(f"key has pages of {key.shape[1]}, must be of a power of two, 16 at least")


def _check_sequences(
    query: Tensor,
    key: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
) -> int:
    """How many sequences there are; the lengths themselves are left to _check_lengths."""
    _check_int32("cu_seq_q", cu_seq_q, query, 1)
    if cu_seq_q.shape[0] == 0:
        raise ValueError("cu_seq_q has shape (0,), must have one element more than there are sequences")
    sequences = cu_seq_q.shape[0] - 1
    if cu_seq_k is not None:
        _check_int32("cu_seq_k", cu_seq_k, query, 1)
        _common.check_shape("cu_seq_k", cu_seq_k, (sequences + 1,))
    if seqused_k is not None:
        _check_int32("seqused_k", seqused_k, query, 1)
        _common.check_shape("seqused_k", seqused_k, (sequences,))
    if block_table is not None:
        _check_int32("block_table", block_table, query, 2)
        _common.check_shape("block_table", block_table, (sequences, block_table.shape[1]))
        if seqused_k is None:
            raise ValueError("seqused_k is None, must be given with block_table")
    elif cu_seq_k is None:
        raise ValueError("cu_seq_k is None, must be given without block_table")
    return sequences


def _check_int32(name: str, value: object, query: Tensor, dim: int) -> None:
    _common.check_tensor(name, value, floating=False)
    if value.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {value.dtype}, must be torch.int32")
    if value.dim() != dim:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, must have {dim} dimensions")
    _common.check_like(name, value, "query", query, dtype=False)


def _readable(*tensors: Tensor | None) -> bool:
    """Whether the values can be read now: not while a graph is being made."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(x is None or type(x) is Tensor for x in tensors)


def _check_lengths(query: Tensor, key: Tensor, options: Options) -> None:
    """ValueError that names the argument whose values don't fit."""
    lengths = {}
    for name, starts, total in (
        ("cu_seq_q", options.cu_seqlens_q, query.shape[0]),
        ("cu_seq_k", options.cu_seqlens_k, key.shape[0]),
    ):
        if starts is None:
            continue
        values = starts.tolist()
        if values[0] != 0 or values[-1] > total or values != sorted(values):
            raise ValueError(f"{name} is {values}, must ascend from 0 to at most {total}")
        lengths[name] = [end - begin for begin, end in itertools.pairwise(values)]
    capacity = lengths.get("cu_seq_k")
    if options.block_table is not None:
        capacity = [options.block_table.shape[1] * key.shape[1]] * (options.cu_seqlens_q.shape[0] - 1)
    if options.seqused_k is not None:
        used = options.seqused_k.tolist()
        if any(not 0 <= length <= most for length, most in zip(used, capacity)):
            raise ValueError(f"seqused_k is {used}, must be from 0 to {capacity}")
        lengths["cu_seq_k"] = used
    if options.block_table is not None:
        for row, length in zip(options.block_table.tolist(), used):
            pages = row[: -(-length // key.shape[1])]
            if any(not 0 <= page < key.shape[0] for page in pages):
                raise ValueError(f"block_table has a row {row}, must have pages from 0 to {key.shape[0] - 1}")
    for name, most, starts in (
        ("max_q", options.max_seqlen_q, "cu_seq_q"),
        ("max_k", options.max_seqlen_k, "cu_seq_k"),
    ):
        if most < max(lengths[starts], default=0):
            raise ValueError(f"{name} is {most}, must not be less than the longest sequence, {max(lengths[starts])}")
