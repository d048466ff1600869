"""varlen_attn: sequences of different lengths packed for training, and new tokens over a paged cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional, reference

from . import peers
from .bench_attention import attention_work, decoding_work
from .harness import Case, Function

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Widths = tuple[int, int, int]  # query heads, key heads, head_dim

LLAMA = (32, 8, 128)  # Llama 3 8B
BERT = (12, 12, 64)  # BERT base
# Widths, lengths of the sequences, whether causal
PACKED: dict[str, tuple[Widths, tuple[int, ...], bool]] = {
    "cpu": ((12, 4, 64), (37, 512, 129, 1024, 64, 256, 700, 18), True),
    "cuda": (LLAMA, (1037, 4096, 129, 8192, 640, 2560, 7000, 180), True),
}
MORE_PACKED: dict[str, tuple[Widths, tuple[int, ...], bool]] = {
    "cpu": (BERT, (12, 512, 37, 128, 300, 64, 441, 209), False),
    "cuda": (BERT, (12, 512, 37, 128, 300, 64, 441, 209) * 16, False),
}
# Widths, page size, keys that each sequence has in the cache
PAGED: dict[str, tuple[Widths, int, tuple[int, ...]]] = {
    "cpu": ((12, 4, 64), 16, (4096, 1000, 2317, 3500)),
    "cuda": (LLAMA, 16, (8192, 1000, 2317, 30000) * 16),
}
MORE_PAGED: dict[str, tuple[Widths, int, tuple[int, ...]]] = {
    "cpu": (LLAMA, 64, (4096, 1000, 2317, 3500)),
    "cuda": (LLAMA, 256, (8192, 1000, 2317, 30000) * 16),
}


def cases(device: torch.device, dtype: torch.dtype, suite: str) -> Iterator[Case]:
    """The cases of this operation on a kind of device, those of the quick suite first."""
    yield _packed(*PACKED[device.type], device, dtype, suite)
    yield _paged(*PAGED[device.type], device, dtype)
    if suite != "quick":
        yield _packed(*MORE_PACKED[device.type], device, dtype, suite)
        yield _paged(*MORE_PAGED[device.type], device, dtype)


def _packed(
    widths: Widths,
    lengths: tuple[int, ...],
    is_causal: bool,
    device: torch.device,
    dtype: torch.dtype,
    suite: str,
) -> Case:
    heads, kv_heads, head_dim = widths
    starts = _starts(lengths, device)
    pairs = sum(n * (n + 1) // 2 if is_causal else n * n for n in lengths)
    calls = {"starts": starts, "longest": max(lengths), "is_causal": is_causal}
    flex = peers.flex(device, suite, _same_sequence(lengths, is_causal, device))["flex"]
    return Case(
        operation="varlen_attn",
        shape=f"{len(lengths)} sequences, {sum(lengths)}",
        dtype=dtype,
        inputs=partial(_packed_inputs, *widths, sum(lengths), device, dtype),
        ours=partial(_varlen, functional.varlen_attn, **calls),
        reference=partial(_one_by_one, lengths=lengths, attend=partial(_reference, is_causal=is_causal)),
        peers={
            "eager": partial(_one_by_one, lengths=lengths, attend=partial(_sdpa, is_causal=is_causal)),
            "sdpa": partial(_padded, lengths=lengths, is_causal=is_causal),
            **_torchs_varlen(device, dtype, partial(_varlen, **calls)),
            "flex": flex if isinstance(flex, str) else partial(_as_one, attend=flex),
            **peers.optional("packed", device, dtype, **calls),
        },
        work=attention_work(
            sum(lengths) * heads * head_dim, sum(lengths) * kv_heads * head_dim, heads * pairs, head_dim, dtype
        ),
        sizes={"sequences": len(lengths), "tokens": sum(lengths), "heads": heads, "kv_heads": kv_heads},
    )


def _paged(widths: Widths, page_size: int, used: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Case:
    heads, kv_heads, _ = widths
    table = _table(used, page_size, device)
    count = torch.tensor(used, dtype=torch.int32, device=device)
    return Case(
        operation="varlen_attn",
        shape=f"{len(used)} x 1, pages of {page_size}",
        dtype=dtype,
        inputs=partial(_paged_inputs, *widths, page_size, len(used), _pages(used, page_size), device, dtype),
        ours=partial(_decoded, functional.varlen_attn, table=table, used=count, longest=max(used)),
        reference=partial(_gathered, table=table, used=used, attend=partial(_reference, is_causal=False)),
        peers={
            "eager": partial(_gathered, table=table, used=used, attend=partial(_sdpa, is_causal=False)),
            "sdpa": partial(_gathered_padded, table=table, used=count),
            **_torchs_varlen(device, dtype, partial(_decoded, table=table, used=count, longest=max(used))),
            **peers.optional("paged", device, dtype, table=table, used=count, page_size=page_size),
        },
        work=decoding_work(len(used) * heads, sum(used) * kv_heads, sum(used) * heads, widths[2], dtype),
        sizes={"sequences": len(used), "keys": sum(used), "heads": heads, "kv_heads": kv_heads, "page": page_size},
    )


def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    ends = torch.tensor(lengths, device=device).cumsum(0)
    return torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)


def _pages(used: tuple[int, ...], page_size: int) -> int:
    return sum(-(-n // page_size) for n in used)


def _table(used: tuple[int, ...], page_size: int, device: torch.device) -> Tensor:
    """Pages in random order."""
    order = list(range(_pages(used, page_size)))
    random.Random(0).shuffle(order)
    pages, widest = iter(order), -(-max(used) // page_size)
    rows = [[next(pages) if column * page_size < n else 0 for column in range(widest)] for n in used]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _same_sequence(lengths: tuple[int, ...], is_causal: bool, device: torch.device) -> peers.MaskMod:
    """FlexAttention's way to say that a query sees the keys of its sequence."""
    sequence = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)], device=device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = sequence[query] == sequence[key]
        return same & (query >= key) if is_causal else same

    return visible


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


def _torchs_varlen(device: torch.device, dtype: torch.dtype, call: Callable[..., Tensor]) -> dict[str, Function]:
    """torch's own function of this name, which is for GPUs and 16 bits; ``call`` takes it before the inputs."""
    if device.type != "cuda" or dtype == torch.float32:
        return {}
    from torch.nn.attention.varlen import varlen_attn

    return {"sdpa: varlen": partial(call, varlen_attn)}


def _varlen(
    function: Function, query: Tensor, key: Tensor, value: Tensor, *, starts: Tensor, longest: int, is_causal: bool
) -> Tensor:
    window = (-1, 0) if is_causal else (-1, -1)
    return function(query, key, value, starts, starts, longest, longest, window_size=window, enable_gqa=True)


def _decoded(
    function: Function, query: Tensor, key: Tensor, value: Tensor, *, table: Tensor, used: Tensor, longest: int
) -> Tensor:
    starts = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    cache = {"seqused_k": used, "block_table": table, "enable_gqa": True}
    return function(query, key, value, starts, None, 1, longest, **cache)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: bool) -> Tensor:
    return torch_functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, enable_gqa=query.shape[1] != key.shape[1]
    )


def _reference(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    return reference.attention(query, key, value, is_causal=is_causal)[0]


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, *, lengths: tuple[int, ...], attend: Attend) -> Tensor:
    """A call for each sequence."""
    parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, 2) for x in (query, key, value)))
    return torch.cat([attend(*part) for part in parts], 2).squeeze(0).transpose(0, 1)


def _as_one(query: Tensor, key: Tensor, value: Tensor, *, attend: Attend) -> Tensor:
    """A call on all the tokens, which knows where the sequences are."""
    output = attend(*(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)))
    return output.squeeze(0).transpose(0, 1)


def _padded(query: Tensor, key: Tensor, value: Tensor, *, lengths: tuple[int, ...], is_causal: bool) -> Tensor:
    """One call of torch's on a batch that is padded at the end of each sequence, and what is none taken out of it."""
    padded = [
        torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (query, key, value)
    ]
    mask = None  # a causal one hides the padding
    if not is_causal:
        ends = torch.tensor(lengths, device=query.device)
        mask = torch.arange(max(lengths), device=query.device) < ends[:, None, None, None]
    output = _sdpa(*padded, mask, is_causal=is_causal).transpose(1, 2)
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
    return _sdpa(query.unsqueeze(2), keys, values, mask, is_causal=False).squeeze(2)
