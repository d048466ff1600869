"""varlen_attn: sequences of different lengths packed for training, and new tokens over a paged cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional, reference

from .harness import FORWARD, TRAINING, Case, Work

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# (query heads, key heads, head_dim), lengths of the sequences
PACKED = {
    "cpu": ((12, 4, 64), (37, 512, 129, 1024, 64, 256, 700, 18)),
    "cuda": ((32, 8, 128), (1037, 4096, 129, 8192, 640, 2560, 7000, 180)),
}
# (query heads, key heads, head_dim), page size, keys that each sequence has in the cache
PAGED = {
    "cpu": ((12, 4, 64), 16, (4096, 1000, 2317, 3500)),
    "cuda": ((32, 8, 128), 16, (8192, 1000, 2317, 30000) * 16),
}


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The cases of this operation on a kind of device."""
    widths, lengths = PACKED[device.type]
    starts = _starts(lengths, device)
    yield Case(
        operation="varlen_attn",
        shape=f"{len(lengths)} sequences, {sum(lengths)}",
        dtype=dtype,
        inputs=partial(_packed_inputs, *widths, sum(lengths), device, dtype),
        ours=partial(_ours, starts=starts, longest=max(lengths)),
        reference=partial(_one_by_one, lengths=lengths, attend=_reference),
        peers={
            "eager": partial(_one_by_one, lengths=lengths, attend=_sdpa),
            "fused": partial(_padded, lengths=lengths),
        },
        work=_packed_work(*widths, lengths, dtype),
    )
    widths, page_size, used = PAGED[device.type]
    table = _table(used, page_size, device)
    count = torch.tensor(used, dtype=torch.int32, device=device)
    yield Case(
        operation="varlen_attn",
        shape=f"{len(used)} x 1, pages of {page_size}",
        dtype=dtype,
        inputs=partial(_paged_inputs, *widths, page_size, len(used), int(table.max()) + 1, device, dtype),
        ours=partial(_decoded, table=table, used=count, longest=max(used)),
        reference=partial(_gathered, table=table, used=used, attend=_reference),
        peers={
            "eager": partial(_gathered, table=table, used=used, attend=_sdpa),
            "fused": partial(_gathered_padded, table=table, used=count),
        },
        work=_paged_work(*widths, used, dtype),
    )


def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    ends = torch.tensor(lengths, device=device).cumsum(0)
    return torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)


def _table(used: tuple[int, ...], page_size: int, device: torch.device) -> Tensor:
    """Pages in random order."""
    counts = [-(-n // page_size) for n in used]
    pages = iter(torch.randperm(sum(counts)).tolist())
    rows = [[next(pages) for _ in range(n)] + [0] * (max(counts) - n) for n in counts]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _packed_inputs(
    heads: int, kv_heads: int, head_dim: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    shapes = {"query": (tokens, heads), "key": (tokens, kv_heads), "value": (tokens, kv_heads)}
    return {
        name: torch.randn(*shape, head_dim, device=device, dtype=dtype, requires_grad=True)
        for name, shape in shapes.items()
    }


def _paged_inputs(
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    sequences: int,
    pages: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    cache = (pages, page_size, kv_heads, head_dim)
    shapes = {"query": (sequences, heads, head_dim), "key": cache, "value": cache}
    return {name: torch.randn(shape, device=device, dtype=dtype) for name, shape in shapes.items()}


def _ours(query: Tensor, key: Tensor, value: Tensor, *, starts: Tensor, longest: int) -> Tensor:
    ends = (starts, starts, longest, longest)
    return functional.varlen_attn(query, key, value, *ends, window_size=(-1, 0), enable_gqa=True)


def _decoded(query: Tensor, key: Tensor, value: Tensor, *, table: Tensor, used: Tensor, longest: int) -> Tensor:
    starts = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    cache = {"seqused_k": used, "block_table": table, "enable_gqa": True}
    return functional.varlen_attn(query, key, value, starts, None, 1, longest, **cache)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's, of one sequence; a single query sees every key."""
    return torch_functional.scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[2] > 1, enable_gqa=True
    )


def _reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return reference.attention(query, key, value, is_causal=True, bottom_right=True)[0]


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, *, lengths: tuple[int, ...], attend: Attend) -> Tensor:
    """A call for each sequence."""
    parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, 2) for x in (query, key, value)))
    return torch.cat([attend(*part) for part in parts], 2).squeeze(0).transpose(0, 1)


def _padded(query: Tensor, key: Tensor, value: Tensor, *, lengths: tuple[int, ...]) -> Tensor:
    """One call of torch's on a batch that is padded at the end of each sequence, and what is none taken out of it."""
    padded = (
        torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (query, key, value)
    )
    output = _sdpa(*padded).transpose(1, 2)
    return torch.cat([row[:length] for row, length in zip(output, lengths)])


def _gathered(
    query: Tensor, key: Tensor, value: Tensor, *, table: Tensor, used: tuple[int, ...], attend: Attend
) -> Tensor:
    """A call for each sequence, on its gathered pages."""
    outputs = []
    for row, pages, length in zip(query, table, used):
        cache = (x[pages].flatten(0, 1)[:length].transpose(0, 1).unsqueeze(0) for x in (key, value))
        outputs.append(attend(row[None, :, None], *cache)[0, :, 0])
    return torch.stack(outputs)


def _gathered_padded(query: Tensor, key: Tensor, value: Tensor, *, table: Tensor, used: Tensor) -> Tensor:
    """One call of torch's, on all the pages of the table, with a mask."""
    keys, values = (x[table].flatten(1, 2).transpose(1, 2) for x in (key, value))
    mask = torch.arange(keys.shape[2], device=used.device) < used[:, None, None, None]
    output = torch_functional.scaled_dot_product_attention(query.unsqueeze(2), keys, values, mask, enable_gqa=True)
    return output.squeeze(2)


def _packed_work(
    heads: int, kv_heads: int, head_dim: int, lengths: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Work]:
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    rows, row = sum(lengths), head_dim * dtype.itemsize
    flops = 2 * 2 * heads * pairs * head_dim  # two products, 2 FLOPs a term
    queries, keys = rows * heads * row, rows * kv_heads * row
    return {
        FORWARD: Work(bytes=2 * queries + 2 * keys, flops=flops),
        # and five products; query, output and its gradient, key and value read, three gradients written
        TRAINING: Work(bytes=6 * queries + 6 * keys, flops=flops * 7 // 2),
    }


def _paged_work(heads: int, kv_heads: int, head_dim: int, used: tuple[int, ...], dtype: torch.dtype) -> dict[str, Work]:
    keys = sum(used)
    cache = 2 * keys * kv_heads * head_dim * dtype.itemsize
    return {FORWARD: Work(bytes=cache, flops=2 * 2 * heads * keys * head_dim, reads=True)}
