"""The attention kernels for sm_90a: in the emulator, which is told that it is such a GPU, or on one."""

import os
import random
from collections.abc import Iterator

import pytest
import torch
from attention_support import CUDA_16BIT, Case, check_case
from packed_support import Packed, check_packed
from support import Target, check, tensor
from test_attention import check_attention
from test_attention_determinism import results

import fastformer
import fastformer.functional as F
from fastformer import reference

#: `make simt` takes more.
COUNT = 40 if os.environ.get("FASTFORMER_SIMT_SCHEDULES") else 4

on_kernels = pytest.mark.parametrize("target", CUDA_16BIT, ids=str)
on_one_kernel = pytest.mark.parametrize("target", CUDA_16BIT[:1], ids=str)


def become_hopper(multiprocessors: int = 3, l2_bytes: int = 1 << 20) -> None:
    """The emulated device is as an H200 is, but smaller: blocks have several tiles, and heads several sections."""
    if torch.cuda.is_available():
        return
    import simt

    simt.load().set_device(
        shared_bytes=227 * 1024, multiprocessors=multiprocessors, compute_capability=90, l2_bytes=l2_bytes
    )


@pytest.fixture(autouse=True)
def _hopper() -> Iterator[None]:
    become_hopper()
    yield
    if not torch.cuda.is_available():
        import simt

        simt.load().set_device()


def launched() -> set[str]:
    """Names of the emulated kernels that were launched so far."""
    import simt

    emulator = simt.load()
    names, addresses = emulator.kernels(), emulator.launched()
    return {name for address, name in names.items() if address in addresses}


CASES = {
    "one tile": Case(seqlen_q=65, seqlen_k=40, head_dim=64, value_dim=64),
    "causal": Case(seqlen_q=300, seqlen_k=300, head_dim=64, value_dim=64, is_causal=True),
    "wide": Case(seqlen_q=270, seqlen_k=150, head_dim=128, value_dim=128, batch=1),
    "causal and wide": Case(seqlen_q=260, seqlen_k=260, head_dim=128, value_dim=128, is_causal=True, batch=1),
    "narrow": Case(seqlen_q=140, seqlen_k=131, head_dim=8, value_dim=40),
    "padded": Case(seqlen_q=70, seqlen_k=129, head_dim=65, value_dim=3, batch=1),
    "of two widths": Case(seqlen_q=130, seqlen_k=257, head_dim=64, value_dim=96, batch=1, scale=-0.2),
    "few keys": Case(seqlen_q=66, seqlen_k=1, heads=8, batch=1),
    "four heads a key head": Case(seqlen_q=129, seqlen_k=200, heads=8, kv_heads=2, batch=1, is_causal=True),
    "bottom right": Case(seqlen_q=257, seqlen_k=140, is_causal=True, causal_alignment="bottom_right", sinks=True),
    "few rows see": Case(seqlen_q=400, seqlen_k=30, causal_alignment="bottom_right", is_causal=True, batch=1),
    "window": Case(seqlen_q=420, seqlen_k=400, window=(40, 10), batch=1, sinks=True),
    "window beyond the keys": Case(seqlen_q=500, seqlen_k=130, window=(20, 20), batch=1),
    "keys that none sees": Case(seqlen_q=100, seqlen_k=400, is_causal=True, batch=1),
    "widest": Case(seqlen_q=270, seqlen_k=200, head_dim=256, value_dim=256, batch=1, is_causal=True),
    "widest and few keys": Case(seqlen_q=390, seqlen_k=70, head_dim=130, value_dim=16, batch=1, window=(90, 0)),
    "strided": Case(seqlen_q=150, seqlen_k=150, head_dim=64, value_dim=64, layout="awkward", is_causal=True),
    "large scores": Case(seqlen_q=130, seqlen_k=140, head_dim=32, value_dim=32, spread=200.0, batch=1),
}


@pytest.mark.parametrize("name", CASES)
@on_kernels
def test_cases(target: Target, name: str) -> None:
    check_case(target, CASES[name])


def random_case(number: int) -> Case:
    draw = random.Random(number)
    kv_heads = draw.randint(1, 2)
    return Case(
        batch=draw.randint(1, 2),
        heads=kv_heads * draw.randint(1, 3),
        kv_heads=kv_heads,
        seqlen_q=draw.randint(65, 420),
        seqlen_k=draw.randint(1, 420),
        head_dim=draw.choice((8, 33, 64, 80, 128)),
        value_dim=draw.choice((8, 40, 64, 100, 128)),
        window=draw.choice((None, (draw.randint(0, 200), draw.choice((None, 0, 30))))),
        is_causal=draw.random() < 0.5,
        causal_alignment=draw.choice(("top_left", "bottom_right")),
        sinks=draw.random() < 0.3,
    )


@pytest.mark.parametrize("number", range(COUNT))
@on_one_kernel
def test_features_at_random(target: Target, number: int) -> None:
    check_case(target, random_case(number))


LENGTHS = ((70, 90), (0, 20), (200, 140), (3, 1), (130, 0), (65, 260))
PACKED = {
    "": Packed(LENGTHS, heads=(4, 2)),
    "wide and causal": Packed(LENGTHS, widths=(128, 72), is_causal=True),
    "unused keys": Packed(LENGTHS, widths=(64, 64), room=3, rest=40),
    "widest": Packed(LENGTHS, widths=(256, 200), room=3),
    "window": Packed(LENGTHS, widths=(24, 64), window=(70, 20), room=130, sinks="fixed"),
    "one": Packed(((130, 140),), rest=1),
}


@pytest.mark.parametrize("name", PACKED)
@on_kernels
def test_packed(target: Target, name: str) -> None:
    """Rows that no sequence uses are NaN: neither they nor those of the next sequence may be seen."""
    check_packed(target, PACKED[name])


@pytest.mark.parametrize("multiprocessors", [1, 2, 100])
@pytest.mark.parametrize("l2_bytes", [1, 1 << 17, 1 << 30])
@on_one_kernel
def test_devices(target: Target, multiprocessors: int, l2_bytes: int) -> None:
    """Tiles and heads are shared out in other orders: each is computed once, whatever the order."""
    become_hopper(multiprocessors, l2_bytes)
    check_case(target, Case(batch=2, heads=6, kv_heads=3, seqlen_q=194, seqlen_k=140, is_causal=True))


@on_kernels
def test_the_same_bits_each_time(target: Target) -> None:
    case = Case(batch=1, heads=4, kv_heads=2, seqlen_q=330, seqlen_k=300, head_dim=64, value_dim=64, window=(150, 3))
    tensors = case.tensors(target)
    first, again = results(target, case, tensors), results(target, case, tensors)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@on_one_kernel
@pytest.mark.parametrize("expanded", ["batch", "head"])
def test_expanded_tensors(target: Target, expanded: str) -> None:
    """TMA has no stride of 0: the kernels for other GPUs have."""
    batch, heads = (1, 2) if expanded == "batch" else (2, 1)
    query = tensor(target, 2, 2, 130, 64)
    key, value = (tensor(target, batch, heads, 140, 64) for _ in range(2))

    def attend(query, key, value):
        return F.scaled_dot_product_attention(query, *(x.expand(2, 2, 140, 64) for x in (key, value)))

    def exact(query, key, value):
        return reference.attention(query, *(x.expand(2, 2, 140, 64) for x in (key, value)))[0]

    check(target, attend, attend, exact, (query, key, value))


@on_one_kernel
def test_keys_beyond_the_last_are_not_seen(target: Target) -> None:
    """What lies behind the tensors in memory may be anything."""
    storage = torch.full((1, 1, 200, 64), torch.nan, dtype=target.dtype, device=target.device)
    key, value = storage[:, :, :133], storage.clone()[:, :, :133]
    key.copy_(tensor(target, 1, 1, 133, 64))
    value.copy_(tensor(target, 1, 1, 133, 64))
    check_attention(target, tensor(target, 1, 1, 131, 64), key, value)


@on_one_kernel
def test_packed_sequences_without_keys(target: Target) -> None:
    query, key, value = (tensor(target, rows, 2, 64) for rows in (150, 0, 0))
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32, device=target.device) for ends in ((0, 80, 150), (0, 0, 0)))
    with fastformer.backend(target.backend):
        output = F.varlen_attn(query, key, value, ends_q, ends_k, 80, 5)
    assert (output == 0).all()


@on_one_kernel
def test_short_sequences_are_not_for_hopper(target: Target) -> None:
    """Their backward pass would want more memory for sums than they have themselves."""
    check_packed(target, Packed(((70, 70), *[(3, 4)] * 5), widths=(64, 64)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks the emulator what ran")
@on_one_kernel
def test_hopper_s_kernels_run(target: Target) -> None:
    check_case(target, Case(seqlen_q=65))
    assert {name.split("<")[0] for name in launched()} >= {
        "attention_hopper_kernel",
        "attention_backward_hopper_kernel",
        "attention_grad_query_kernel",
    }
