"""Caches: paged keys, a few new queries against many keys, and whole generations."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_support import CUDA_16BIT, Case, attend, composed, exact
from packed_support import FEWER_TARGETS, Packed, Problem, check_packed, on_fewer_targets, starts
from support import KERNEL_TARGETS, TARGETS, Target, check
from torch import Tensor

import fastformer
import fastformer.functional as F

on_cuda = pytest.mark.parametrize("target", CUDA_16BIT, ids=str)
on_fast_targets = pytest.mark.parametrize("target", [target for target in TARGETS if not target.slow], ids=str)
CAUSAL = {"window": (-1, 0)}


@on_fewer_targets
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {**CAUSAL, "sinks": "fixed", "sliced": True},
        {"window": (20, 3), "softcap": 2.0, "alibi": 2, "widths": (16, 40), "rest": 2},
    ],
)
def test_pages(target: Target, page_size: int, options: dict[str, Any]) -> None:
    lengths = ((18, 33), (0, 5), (5, 70), (2, 0), (1, 16))
    check_packed(target, Packed(lengths, page_size=page_size, **options), grad=False)


@on_fast_targets
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_pages_over_several_blocks(target: Target, page_size: int) -> None:
    lengths = ((97, 300), (200, 200), (6, 513))
    options = {"page_size": page_size, "widths": (40, 24), "sinks": "fixed", "alibi": 1}
    check_packed(target, Packed(lengths, window=(150, 0), **options), grad=False)
    check_packed(target, Packed(lengths, **options), grad=False)


@on_fewer_targets
@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("num_splits", [None, 1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 16, **CAUSAL},
        {"room": 9, "window": (50, 0), "softcap": 2.0, "sinks": "fixed", "alibi": 2, "heads": (4, 2), "rest": 1},
    ],
)
def test_new_queries(target: Target, queries: int, num_splits: int | None, options: dict[str, Any]) -> None:
    lengths = tuple((queries, keys) for keys in (70, 0, 1, 33))
    check_packed(target, Packed(lengths, num_splits=num_splits, **options), grad=False)


@on_fast_targets
@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("num_splits", [None, 1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {**CAUSAL},
        {"page_size": 64, "heads": (8, 1), "widths": (64, 128), **CAUSAL},
        {"page_size": 16, "window": (700, 0), "sinks": "fixed", "softcap": 5.0, "alibi": 1},
    ],
)
def test_new_queries_against_long_caches(
    target: Target, queries: int, num_splits: int | None, options: dict[str, Any]
) -> None:
    lengths = tuple((queries, keys) for keys in (2000, 1, 1025, 130))
    check_packed(target, Packed(lengths, num_splits=num_splits, **options), grad=False)


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("target", KERNEL_TARGETS + CUDA_16BIT, ids=str)
def test_one_split_makes_sequences_independent_to_the_bit(target: Target, page_size: int) -> None:
    """Whatever the others are: new queries beside prompts, and fewer or more of them."""
    lengths = ((1, 40), (1, 70), (2, 33), (18, 20), (5, 64), (70, 70))
    lengths = lengths if target.slow else (*lengths, (1, 1500), (130, 400))
    problem = Problem(target, Packed(lengths, page_size=page_size, room=3, num_splits=1, sinks="fixed", **CAUSAL))
    query, key, value, _ = problem.inputs
    _, options = problem.arguments()

    def attend(members: list[int]) -> list[Tensor]:
        """Outputs and lse of these sequences, in a call with nothing else."""
        chosen = torch.tensor(members, device=target.device)
        counts = [lengths[i][0] for i in members]
        ends = torch.tensor(starts(counts), dtype=torch.int32, device=target.device)
        own = torch.cat([query[problem.ends_q[i] : problem.ends_q[i + 1]] for i in members])
        keys, own_starts, changes = [key, value], None, {"seqused_k": options["seqused_k"][chosen]}
        if page_size:
            changes["block_table"] = problem.table[chosen]
        else:
            spans = [slice(problem.ends_k[i], problem.ends_k[i + 1]) for i in members]
            keys = [torch.cat([x[span] for span in spans]) for x in keys]
            own_starts = torch.tensor(starts(lengths[i][1] + 3 for i in members), dtype=torch.int32)
            own_starts = own_starts.to(target.device)
        longest = max(counts), max(lengths[i][1] for i in members)
        output, lse = F.varlen_attn(own, *keys, ends, own_starts, *longest, sinks=problem.sinks, **options | changes)
        return [torch.cat((output, lse.T.unsqueeze(-1).to(output)), -1)[a:b] for a, b in itertools.pairwise(ends)]

    with fastformer.backend(target.backend):
        together = attend(list(range(len(lengths))))
        for i, expected in enumerate(together):
            assert torch.equal(attend([i])[0], expected), f"sequence {i} alone"
        for i, found in zip((4, 0, 2), attend([4, 0, 2])):
            assert torch.equal(found, together[i]), f"sequence {i} among others"


# --- the splits of CUDA C++: a block's four warps have every fourth 16 or 32 keys each, two tiles ahead


@on_cuda
@pytest.mark.parametrize("seed", range(16))
def test_options_of_packed_sequences_together(target: Target, seed: int) -> None:
    draw = random.Random(seed)
    queries = draw.choice([1, 1, 2, 5, 16])
    heads = draw.choice([(2, 2), (3, 1), (8, 1), (6, 2)])
    num_splits = draw.choice([None, 1, 2, 5, 50])
    lengths = [(draw.choice([queries, queries, 0]), draw.choice([0, 1, 15, 16, 17])), (queries, 200)]
    lengths.append((queries, draw.choice([63, 64, 65, 300])))
    paged = draw.random() < 0.5
    case = Packed(
        tuple(lengths),
        heads=heads,
        widths=draw.choice([(64, 64), (40, 72), (128, 128), (256, 100)]),
        window=draw.choice([(-1, -1), (-1, 0), (50, 0), (70, 3)]),
        is_causal=draw.random() < 0.3,
        softcap=draw.choice([None, None, 2.0]),
        alibi=draw.choice([0, 0, 1, 2]),
        sinks=draw.choice(["", "fixed"]),
        page_size=draw.choice([16, 64]) if paged else 0,
        room=0 if paged else draw.choice([0, 7]),
        rest=draw.choice([0, 3]),
        num_splits=num_splits,
    )
    check_packed(target, case, grad=False)


@on_cuda
@pytest.mark.parametrize("seed", range(8))
def test_masks_and_dropout_of_few_queries(target: Target, seed: int) -> None:
    draw = random.Random(seed)
    heads, kv_heads = draw.choice([(2, 2), (3, 1), (8, 1)])
    case = Case(
        heads=heads,
        kv_heads=kv_heads,
        seqlen_q=draw.choice([1, 2]),
        seqlen_k=draw.choice([1, 65, 300]),
        head_dim=draw.choice([24, 64, 128]),
        value_dim=draw.choice([64, 96]),
        mask=draw.choice(["bool", "tiles", "added", "infinite"]),
        mask_over=draw.choice(["BHQK", "BK", "QK"]),
        slopes=draw.choice(["", "BH"]),
        sinks=draw.random() < 0.5,
        is_causal=draw.random() < 0.3,
        causal_alignment="bottom_right",
        softcap=draw.choice([None, 3.0]),
        dropout_p=draw.choice([0.0, 0.3]),
    )
    tensors = case.tensors(target)
    state = tensors.pop("dropout_state", None)

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: function(**dict(zip(tensors, given)), dropout_state=state, **case.options())

    check(target, bound(attend), bound(composed), bound(exact), list(tensors.values()), grad=False)


# --- generation

LAYERS, H, G, D, V = 2, 4, 2, 16, 23
PAGE = 16

#: (layer, query [T, H, D], key and value [T, G, D]) -> [T, H, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Transformer:
    """A decoder of random weights. Tokens of several sequences may follow one another: attention tells them apart."""

    def __init__(self, device: str, rotary: bool) -> None:
        def matrix(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns) / rows**0.5).to(device)

        width = H * D
        self.rotary = rotary
        self.embedding, self.head = torch.randn(V, width).to(device), matrix(width, V)
        # Attention has twice the say that it has at the start of training.
        self.layers = [(matrix(width, (H + 2 * G) * D) * 2, matrix(width, width)) for _ in range(LAYERS)]
        angles = torch.arange(100).unsqueeze(1) * 100 ** -torch.linspace(0, 1, D // 2)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def logits(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """[T, V] for tokens [T]."""
        x = self.embedding[tokens]
        for layer, (projection, output) in enumerate(self.layers):
            projected = F.rms_norm(x, x.shape[-1:]) @ projection
            query, key, value = projected.unflatten(-1, (-1, D)).split((H, G, G), 1)  # slices, not contiguous
            if self.rotary:
                query, key = (x.transpose(0, 1).unsqueeze(0) for x in (query, key))
                query, key = F.rotary(query, key, self.cos[positions], self.sin[positions])
                query, key = (x[0].transpose(0, 1) for x in (query, key))
            x = x + attend(layer, query, key, value).flatten(1) @ output
        return x @ self.head


def generate_by_full_passes(model: Transformer, prompt: list[int], count: int, options: dict[str, Any]) -> list[int]:
    def attend(_: int, *tensors: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1) for x in tensors)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, **options)
        return output.transpose(0, 1)

    device = model.embedding.device
    tokens = list(prompt)
    for _ in range(count):
        logits = model.logits(torch.tensor(tokens, device=device), torch.arange(len(tokens), device=device), attend)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


class Cache:
    """Of every layer's keys and values, with room for ``most`` tokens of each sequence; what is not written is NaN."""

    def __init__(self, model: Transformer, sequences: int, most: int, paged: bool) -> None:
        self.model, self.device = model, model.embedding.device
        pages = -(-most // PAGE)
        rows = sequences * pages * PAGE
        self.pools = [torch.full((2, rows, G, D), torch.nan, device=self.device) for _ in range(LAYERS)]
        self.lengths = torch.zeros(sequences, dtype=torch.int32, device=self.device)
        numbers = torch.randperm(sequences * pages) if paged else torch.arange(sequences * pages)
        self.pages = numbers.view(sequences, pages).to(self.device)
        self.layout = (-1, PAGE, G, D) if paged else (-1, G, D)
        self.block_table = self.pages.int() if paged else None
        self.cu_seq_k = None if paged else self._int32([i * pages * PAGE for i in range(sequences + 1)])

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def next_tokens(self, new: list[list[int]], options: dict[str, Any]) -> list[int]:
        """The likeliest ones behind these new tokens of each sequence, which are cached."""
        counts = self._int32([len(tokens) for tokens in new])
        cu_seq_q = self._int32(starts(map(len, new)))
        sequence = torch.arange(len(new), device=self.device).repeat_interleave(counts)
        positions = torch.arange(len(sequence), device=self.device) - (cu_seq_q[:-1] - self.lengths)[sequence]
        rows = self.pages[sequence, positions // PAGE] * PAGE + positions % PAGE
        self.lengths = self.lengths + counts

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.pools[layer][:, rows] = torch.stack((key, value))
            keys_and_values = (x.view(self.layout) for x in self.pools[layer])
            longest = int(counts.max()), int(self.lengths.max())
            cached = {"seqused_k": self.lengths, "block_table": self.block_table, "enable_gqa": True}
            return F.varlen_attn(
                query, *keys_and_values, cu_seq_q, self.cu_seq_k, *longest, is_causal=True, **cached, **options
            )

        tokens = self._int32([token for tokens in new for token in tokens])
        logits = self.model.logits(tokens, positions, attend)
        return logits[cu_seq_q[1:] - 1].argmax(-1).tolist()


def generate_with_a_cache(
    model: Transformer, prompts: list[list[int]], count: int, options: dict[str, Any], paged: bool
) -> list[list[int]]:
    """All prompts at once, then one token of each at a time."""
    cache = Cache(model, len(prompts), max(map(len, prompts)) + count, paged)
    steps = [cache.next_tokens(prompts, options)]
    while len(steps) < count:
        steps.append(cache.next_tokens([[token] for token in steps[-1]], options))
    return [list(tokens) for tokens in zip(*steps)]


#: Options of scaled_dot_product_attention, and the same of varlen_attn.
VARIANTS = {
    "plain": ({}, {}),
    "window": ({"window": (6, 0)}, {"window_size": (6, 0)}),
    "softcap": ({"softcap": 1.0, "window": (20, None)}, {"softcap": 1.0, "window_size": (20, -1)}),
}


@pytest.mark.parametrize(
    ("target", "variant", "rotary"),
    [
        (target, variant, rotary)
        for target in FEWER_TARGETS
        for variant in VARIANTS
        for rotary in (False, True)
        if target.dtype == torch.float32 and (not target.slow or (variant, rotary) == ("softcap", True))
    ],
    ids=str,
)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_generating_with_a_cache_gives_the_tokens_of_full_passes(
    target: Target, variant: str, rotary: bool, paged: bool
) -> None:
    model = Transformer(target.device, rotary)
    full, cached = VARIANTS[variant]
    lengths, count = ((17, 3), 4) if target.slow else ((3, 17, 1, 28), 12)
    prompts = [torch.randint(V, (length,)).tolist() for length in lengths]
    with fastformer.backend("torch"):
        expected = [generate_by_full_passes(model, prompt, count, full) for prompt in prompts]
    with fastformer.backend(target.backend):
        assert generate_with_a_cache(model, prompts, count, cached, paged) == expected
    assert len({token for tokens in expected for token in tokens}) > 3
