"""The keys and values that a decoder has seen, kept for the tokens that follow: in one piece, or in pages.

Both kinds are used alike. A model calls ``place`` once for the new tokens, then each of its layers ``attend``, which
stores the layer's new keys and values and attends to all of them, then ``advance``.

Shapes: L layers, B sequences, S new positions, T positions so far, H heads of queries, G of keys and values, D
head_dim.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer.models.checks import check_count

#: Keys and values of an encoder's output for one layer, [2, B, G, Sk, D], or packed [2, Tk, G, D].
Memory = list[Tensor]

PAGE_SIZE = 16


def pages_needed(sequences: int, room: int, page_size: int = PAGE_SIZE) -> int:
    """Pages that hold ``room`` positions of each sequence."""
    return sequences * -(-room // page_size)


class KVCache:
    """Keys and values in room allotted once, all sequences of one length.

    Sequences of different lengths are padded at their start: row b's first ``starts[b]`` positions are nobody's, which
    ``pack`` says with the first tokens.

    Args:
        layers: L.
        shape: (B, G, room, D).
        like: gives dtype and device.
    """

    def __init__(self, layers: int, shape: tuple[int, int, int, int], like: Tensor) -> None:
        batch, heads, self.room, width = shape
        # Of each layer [B, 2 G, room, D], the keys' heads before the values'.
        self.keys_values = [like.new_empty(batch, 2 * heads, self.room, width) for _ in range(layers)]
        self.length = 0
        self.starts: Tensor | None = None  # int64 [B]
        self.memory: Memory = []
        self.memory_mask: Tensor | None = None  # bool [B, 1, 1, Sk]
        self._mask: Tensor | None = None  # bool [B, 1, 1, T]
        self._end = 0

    @property
    def longest(self) -> int:
        """Length of the longest sequence, padding included."""
        return self.length

    def place(self, tokens: Tensor) -> slice | Tensor:
        """Positions of the new tokens [B, S]: a slice, or int64 [B, S].

        Raises:
            ValueError: there is no room for them, or they are not of as many sequences.
        """
        batch, count = tokens.shape
        if batch != len(self.keys_values[0]):
            raise ValueError(f"tokens has {batch} rows, must have {len(self.keys_values[0])} like the cache")
        self._end = self.length + count
        if self._end > self.room:
            raise ValueError(f"tokens end at position {self._end}, must be at most the cache's room, {self.room}")
        if self.starts is None:
            return slice(self.length, self._end)
        places = torch.arange(self._end, device=self.starts.device)  # [T]
        self._mask = (places >= self.starts[:, None])[:, None, None]  # [B, 1, 1, T]
        return (places[self.length :] - self.starts[:, None]).clamp(min=0)

    def attend(self, layer: int, query: Tensor, keys_values: Tensor) -> Tensor:
        """Attention of query [B, H, S, D] to all keys so far, once keys_values [B, 2 G, S, D] are stored."""
        stored = self.keys_values[layer]
        stored.narrow(2, self.length, self._end - self.length).copy_(keys_values)
        key, value = stored.narrow(2, 0, self._end).chunk(2, dim=1)  # [B, G, T, D]
        # The last query is the newest position: it sees every key.
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            self._mask,
            is_causal=True,
            enable_gqa=True,
            causal_alignment="bottom_right",
        )

    def attend_memory(self, layer: int, query: Tensor) -> Tensor:
        """Attention of query [B, H, S, D] to the encoder's output."""
        key, value = self.memory[layer].unbind()
        return F.scaled_dot_product_attention(query, key, value, self.memory_mask, enable_gqa=True)

    def advance(self) -> None:
        """The tokens placed last are now in the cache."""
        self.length = self._end

    def pack(self, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
        """Tokens [B, S], of each row those from ``starts[b]`` on, as the model takes them: padded at their start.

        Raises:
            ValueError: ``starts`` are given for tokens that are not the first.
        """
        if starts is not None:
            if self.length:
                raise ValueError(f"starts is given for tokens at position {self.length}, must be given with the first")
            self.starts = starts
        return tokens

    def last(self, features: Tensor) -> Tensor:
        """Of what the model makes of the tokens placed last, [B, S, C], each sequence's last: [B, C]."""
        return features[:, -1]

    def repeat(self, times: int) -> None:
        """Make ``times`` neighbouring sequences of each, as beam search wants."""
        self.keys_values = [x.repeat_interleave(times, dim=0) for x in self.keys_values]
        self.memory = [x.repeat_interleave(times, dim=1) for x in self.memory]
        if self.starts is not None:
            self.starts = self.starts.repeat_interleave(times)
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask.repeat_interleave(times, dim=0)

    def select(self, rows: Tensor) -> None:
        """Make row ``rows[b]``, int64, row b, of as many. Both come from one by ``repeat``, so their memory is one."""
        for stored in self.keys_values:
            used = stored.narrow(2, 0, self.length)
            used.copy_(used.index_select(0, rows))


class _Placement(NamedTuple):
    """Where the tokens of one call go, and what they attend to."""

    ends: list[int]  # of each sequence, its length with them
    most_new: int  # of them in one sequence
    cu_new: Tensor  # int32 [B + 1], where each sequence's begin among them
    used: Tensor  # int32 [B], the ends
    block_table: Tensor  # int32 [B, pages of the longest]
    slots: Tensor  # int64 [T], their places in the pool
    cu_memory: Tensor  # int32 [B + 1], where each sequence's memory begins


class PagedKVCache:
    """Keys and values in pages of a pool, each sequence of its own length (PagedAttention, arXiv 2309.06180).

    Tokens are packed: [1, T], those of all sequences one behind the other. Sequences that begin alike share full pages
    after ``select``; a page that two would write to is copied first.

    Args:
        layers: L.
        shape: (B, G, room, D), room being the most positions of a sequence.
        like: gives dtype and device.
        page_size: positions in a page: a power of two, 16 at least.
        num_pages: in the pool; None for enough for all sequences at their longest.

    Raises:
        TypeError: ``page_size`` or ``num_pages`` is no int.
        ValueError: one is not what it must be.
    """

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int, int, int],
        like: Tensor,
        page_size: int = PAGE_SIZE,
        num_pages: int | None = None,
    ) -> None:
        check_count("page_size", page_size, least=1)
        if page_size < 16 or page_size & (page_size - 1):
            raise ValueError(f"page_size is {page_size}, must be a power of two, 16 at least")
        sequences, heads, self.room, width = shape
        self.page_size = page_size
        self.num_pages = pages_needed(sequences, self.room, page_size) if num_pages is None else num_pages
        check_count("num_pages", self.num_pages, least=1)
        self.pages = [like.new_zeros(2, self.num_pages, page_size, heads, width) for _ in range(layers)]
        self.sequence_lengths = [0] * sequences
        self.memory: Memory = []
        self.memory_lengths: list[int] = []
        self._tables: list[list[int]] = [[] for _ in range(sequences)]  # of each sequence, its pages in order
        self._users = [0] * self.num_pages  # of each page, how many sequences have it
        self._counts: list[int] | None = None
        self._placement: _Placement | None = None
        self._device = like.device

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return max(self.sequence_lengths)

    def reserve(self, counts: list[int]) -> None:
        """Say how many of the tokens that come next belong to each sequence; else each has one.

        Raises:
            ValueError: not a count for each sequence, or a negative one.
        """
        if len(counts) != len(self.sequence_lengths) or min(counts) < 0:
            raise ValueError(f"counts is {counts}, must have {len(self.sequence_lengths)} counts that are not negative")
        self._counts = list(counts)

    def place(self, tokens: Tensor) -> Tensor:
        """Positions of the new tokens [1, T], int64 likewise.

        Raises:
            ValueError: they are not those that were reserved, a sequence gets too long, or no page is left.
        """
        counts = [1] * len(self.sequence_lengths) if self._counts is None else self._counts
        if tokens.shape != (1, sum(counts)):
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, must be (1, {sum(counts)}), as reserved")
        ends = [length + count for length, count in zip(self.sequence_lengths, counts)]
        if max(ends) > self.room:
            raise ValueError(f"tokens end at position {max(ends)}, must be at most the cache's room, {self.room}")
        for sequence, (length, end) in enumerate(zip(self.sequence_lengths, ends)):
            self._make_writable(sequence, length, end)
        most = max(map(len, self._tables))
        tables = [table + [0] * (most - len(table)) for table in self._tables]
        spans = [range(end - count, end) for count, end in zip(counts, ends)]
        size = self.page_size
        slots = [table[i // size] * size + i % size for table, span in zip(self._tables, spans) for i in span]
        self._placement = _Placement(
            ends,
            max(counts),
            self._int32([0, *itertools.accumulate(counts)]),
            self._int32(ends),
            self._int32(tables).view(len(tables), most),
            torch.tensor(slots, dtype=torch.int64, device=self._device),
            self._int32([0, *itertools.accumulate(self.memory_lengths)]),
        )
        return torch.tensor([[i for span in spans for i in span]], dtype=torch.int64, device=self._device)

    def attend(self, layer: int, query: Tensor, keys_values: Tensor) -> Tensor:
        """As KVCache's, of packed tokens: query [1, H, T, D] and keys_values [1, 2 G, T, D]."""
        placement, pages = self._placement, self.pages[layer]  # [2, pages, page size, G, D]
        new = keys_values[0].unflatten(0, (2, -1)).transpose(1, 2)  # [2, T, G, D]
        pages.flatten(1, 2).index_copy_(1, placement.slots, new.to(pages.dtype))
        output = F.varlen_attn(
            query[0].transpose(0, 1),  # [T, H, D]
            pages[0],
            pages[1],
            placement.cu_new,
            None,
            placement.most_new,
            max(placement.ends),
            enable_gqa=True,
            seqused_k=placement.used,
            block_table=placement.block_table,
            is_causal=True,
        )
        return output.transpose(0, 1).unsqueeze(0)

    def attend_memory(self, layer: int, query: Tensor) -> Tensor:
        """As KVCache's, of packed tokens: query [1, H, T, D]."""
        key, value = self.memory[layer].unbind()  # [Tk, G, D]
        output = F.varlen_attn(
            query[0].transpose(0, 1),
            key,
            value,
            self._placement.cu_new,
            self._placement.cu_memory,
            self._placement.most_new,
            max(self.memory_lengths),
            enable_gqa=True,
        )
        return output.transpose(0, 1).unsqueeze(0)

    def advance(self) -> None:
        """The tokens placed last are now in the cache."""
        self.sequence_lengths = self._placement.ends
        self._counts = None

    def pack(self, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
        """Tokens [B, S], of each row those from ``starts[b]`` on, packed [1, T], and reserved."""
        if starts is None:
            self.reserve([tokens.shape[1]] * len(tokens))
            return tokens.reshape(1, -1)
        self.reserve((tokens.shape[1] - starts).tolist())
        return tokens[torch.arange(tokens.shape[1], device=tokens.device) >= starts[:, None]][None]

    def last(self, features: Tensor) -> Tensor:
        """Of what the model makes of the tokens placed last, [1, T, C], each sequence's last: [B, C]."""
        return features[0, self._placement.cu_new[1:].long() - 1]

    def repeat(self, times: int) -> None:
        """Make ``times`` neighbouring sequences of each, as beam search wants."""
        self._select([row for row in range(len(self._tables)) for _ in range(times)])
        starts = [0, *itertools.accumulate(self.memory_lengths)]
        places = [i for begin, end in itertools.pairwise(starts) for _ in range(times) for i in range(begin, end)]
        self.memory = [x[:, places] for x in self.memory]
        self.memory_lengths = [length for length in self.memory_lengths for _ in range(times)]

    def select(self, rows: Tensor) -> None:
        """Make sequence ``rows[b]``, int64, sequence b; see KVCache."""
        self._select(rows.tolist())

    def _select(self, rows: list[int]) -> None:
        tables = [list(self._tables[row]) for row in rows]
        self._users = [0] * self.num_pages
        for page in itertools.chain(*tables):
            self._users[page] += 1
        self._tables = tables
        self.sequence_lengths = [self.sequence_lengths[row] for row in rows]

    def _make_writable(self, sequence: int, length: int, end: int) -> None:
        """Give the sequence pages of its own for positions ``length`` to ``end``."""
        table = self._tables[sequence]
        if length % self.page_size and end > length and self._users[table[-1]] > 1:
            shared, table[-1] = table[-1], self._take_page()
            self._users[shared] -= 1
            for pages in self.pages:
                pages[:, table[-1]] = pages[:, shared]
        while len(table) * self.page_size < end:
            table.append(self._take_page())

    def _take_page(self) -> int:
        try:
            page = self._users.index(0)
        except ValueError:
            raise ValueError(f"num_pages is {self.num_pages}, must be more: every page is taken") from None
        self._users[page] = 1
        return page

    def _int32(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)


Cache = KVCache | PagedKVCache
