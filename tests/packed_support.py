"""Packed and paged attention, and the check of it against one dense attention for each sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import TARGETS, Target, check, tensor
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest

import fastformer.functional as F
from fastformer import reference

LSE = AuxRequest(lse=True)

#: Without float16 in the interpreter, which is slow and computes the same in both of its dtypes.
FEWER_TARGETS = [target for target in TARGETS if not target.slow or target.dtype == torch.float32]
on_fewer_targets = pytest.mark.parametrize("target", FEWER_TARGETS, ids=str)


@dataclass(frozen=True)
class Packed:
    """What a call of varlen_attn is about. Rows of query, key and value that no sequence uses are NaN."""

    lengths: tuple[tuple[int, int], ...]  # (queries, keys) of each sequence
    heads: tuple[int, int] = (2, 1)  # of queries, of keys
    widths: tuple[int, int] = (16, 16)  # of queries and keys, of values
    window: tuple[int, int] = (-1, -1)
    is_causal: bool = False
    scale: float | None = None
    softcap: float | None = None
    alibi: int = 0  # dimensions of the slopes
    sinks: str = ""  # "fixed", or "learned": with a gradient, whose error is a matter of luck in a few heads
    room: int = 0  # for further keys of each sequence, as in a cache
    rest: int = 0  # rows of no sequence behind the last
    page_size: int = 0  # 0: not paged
    sliced: bool = False  # query, key and value are slices of wider tensors
    spread: float = 1.0  # of the queries
    num_splits: int | None = None


class Problem:
    """Tensors for a call on a target.

    ``inputs`` are query, key, value and sinks; the other arguments of the two ways to compute attention from them, by
    one call and sequence by sequence, are kept here.
    """

    def __init__(self, target: Target, case: Packed) -> None:
        self.case, self.device = case, target.device
        self.table: Tensor | None = None
        heads, kv_heads = case.heads
        queries, self.used = zip(*case.lengths, strict=True)
        self.ends_q = starts(queries)
        self.ends_k = starts(length + case.room for length in self.used)
        query = _rows(target, case, self.ends_q[-1] + case.rest, heads, case.widths[0], case.spread)
        query[self.ends_q[-1] :] = torch.nan
        key, value = (_rows(target, case, self.ends_k[-1] + case.rest, kv_heads, w) for w in case.widths)
        for x in (key, value):
            x[self.unused(x)] = torch.nan
        if case.page_size:
            self.table = self._block_table()
            key, value = self._paged(key), self._paged(value)
        self.slopes = None
        if case.alibi:
            self.slopes = torch.rand((len(queries), heads)[2 - case.alibi :], device=self.device) / 4
        self.sinks = tensor(target, heads) if case.sinks else None
        self.inputs = (query, key, value, self.sinks if case.sinks == "learned" else None)

    def _block_table(self) -> Tensor:
        """Pages in random order. Sequences that fill a page share their first one: a common prefix."""
        size = self.case.page_size
        counts = [-(-length // size) for length in self.used]
        order = torch.randperm(sum(counts) + 3).tolist()
        table = torch.full((len(counts), max(counts) + 2), -1, dtype=torch.int32)
        table[:, -1] = 2**30
        for i, count in enumerate(counts):
            table[i, :count] = torch.tensor([order.pop() for _ in range(count)])
        full = [i for i, length in enumerate(self.used) if length >= size]
        table[full, 0] = table[full[:1], 0]
        return table.to(self.device)

    def _paged(self, packed: Tensor) -> Tensor:
        """[pages, page size, heads, width]; if sliced, keys and values of a page follow one another in memory."""
        size = self.case.page_size
        pages = sum(-(-length // size) for length in self.used) + 3
        pool = packed.new_full((pages, 1 + self.case.sliced, size, *packed.shape[1:]), torch.nan)[:, -1]
        for i, start in enumerate(self.ends_k[:-1]):
            for page, length in self._pages_of(i):
                pool[page, :length] = packed[start : start + length]
                start += size
        return pool

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of varlen_attn behind query, key and value, without the sinks."""
        case = self.case
        cu_seq_q, cu_seq_k, used = (
            torch.tensor(x, dtype=torch.int32, device=self.device) for x in (self.ends_q, self.ends_k, self.used)
        )
        options = {
            "return_aux": LSE,
            "scale": case.scale,
            "window_size": case.window,
            "enable_gqa": True,
            "seqused_k": used if case.room or case.page_size else None,
            "block_table": self.table,
            "num_splits": case.num_splits,
            "is_causal": case.is_causal,
            "softcap": case.softcap,
            "alibi_slopes": self.slopes,
        }
        longest = max(queries for queries, _ in case.lengths), max(self.used)
        return (cu_seq_q, None if case.page_size else cu_seq_k, *longest), options

    def varlen(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        arguments, options = self.arguments()
        options["sinks"] = self.sinks if sinks is None else sinks
        return F.varlen_attn(query, key, value, *arguments, **options)

    def unused(self, x: Tensor) -> Tensor:
        """bool, one for each row of the keys or values ``x``."""
        found = torch.ones_like(x[..., 0, 0], dtype=torch.bool)
        for i in range(len(self.used)):
            if self.table is None:
                found[self.ends_k[i] :][: self.used[i]] = False
            for page, length in self._pages_of(i):
                found[page, :length] = False
        return found

    def _pages_of(self, i: int) -> Iterator[tuple[int, int]]:
        """(page, how many of its rows are used) of one sequence."""
        size = self.case.page_size
        if self.table is not None:
            for page, begin in zip(self.table[i].tolist(), range(0, self.used[i], size)):
                yield page, min(size, self.used[i] - begin)

    def keys_of(self, i: int, x: Tensor) -> Tensor:
        """[keys, heads, width] of one sequence."""
        if self.table is None:
            return x[self.ends_k[i] :][: self.used[i]]
        pages = self.table[i, : -(-self.used[i] // self.case.page_size)]
        return x[pages].flatten(0, 1)[: self.used[i]]

    def each(self, attend: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same by ``attend(number, query, key, value, sinks)`` on [1, heads, length, width] of each sequence."""
        query, key, value, sinks = tensors
        sinks = self.sinks if sinks is None else sinks
        outputs, lses = [], []
        for i, (start, end) in enumerate(itertools.pairwise(self.ends_q)):
            own = (query[start:end], self.keys_of(i, key), self.keys_of(i, value))
            output, lse = attend(i, *(x.transpose(0, 1).unsqueeze(0) for x in own), sinks)
            outputs.append(output[0].transpose(0, 1))
            lses.append(lse[0])
        rest = self.case.rest
        output = torch.nn.functional.pad(torch.cat(outputs), (0, 0, 0, 0, 0, rest))
        return output, torch.nn.functional.pad(torch.cat(lses, -1), (0, rest), value=-torch.inf)

    def options_of(self, i: int) -> dict[str, Any]:
        slopes = self.slopes[i] if self.case.alibi == 2 else self.slopes
        return {"scale": self.case.scale, "softcap": self.case.softcap, "alibi_slopes": slopes}

    def dense(self, i: int, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """torch's own function where it has what is asked for; the log-sum-exp from its float32 functions."""
        options = self.options_of(i) | {
            "is_causal": self.case.is_causal,
            "enable_gqa": True,
            "causal_alignment": "bottom_right",
            "window": bounds(self.case.window),
            "sinks": sinks,
        }
        output = F.scaled_dot_product_attention(query, key, value, **options)
        return output, F.scaled_dot_product_attention(query, key, value, **options, return_lse=True)[1]

    def exact(self, i: int, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        causal = {"is_causal": self.case.is_causal, "bottom_right": True, "window": bounds(self.case.window)}
        return reference.attention(query, key, value, sinks=sinks, **causal, **self.options_of(i))


def check_packed(target: Target, case: Packed, *, grad: bool = True) -> None:
    """One call is as exact as one of scaled_dot_product_attention for each sequence."""
    problem = Problem(target, case)

    def each(attend: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda *tensors: problem.each(attend, *tensors)

    check(target, problem.varlen, each(problem.dense), each(problem.exact), problem.inputs, grad=grad)


def starts(lengths: Any) -> list[int]:
    return list(itertools.accumulate(lengths, initial=0))


def bounds(window: tuple[int, int]) -> tuple[int | None, int | None]:
    left, right = (None if x == -1 else x for x in window)
    return left, right


def _rows(target: Target, case: Packed, rows: int, heads: int, width: int, scale: float = 1.0) -> Tensor:
    """[rows, heads, width], if sliced the middle third of a wider tensor, as of a common projection."""
    if not case.sliced:
        return tensor(target, rows, heads, width, scale=scale)
    return tensor(target, rows, 3 * heads * width, scale=scale)[:, heads * width :][:, : heads * width].unflatten(
        1, (heads, width)
    )
