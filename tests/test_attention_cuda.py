"""The CUDA C++ attention in the emulator: features combined at random over several tiles, in every compiled width."""

import os
import random

import pytest
import torch
from attention_support import CUDA_16BIT, Case, attend, check_case, exact
from packed_support import Packed, check_packed
from support import Target, check, tensor

import fastformer
from fastformer import backends

#: `make simt` takes more.
COUNT = 64 if os.environ.get("FASTFORMER_SIMT_SCHEDULES") else 6
WIDTHS = (8, 40, 64, 65, 80, 96, 100, 128, 136, 256)

on_cuda = pytest.mark.parametrize("target", CUDA_16BIT, ids=str)


def random_case(number: int) -> Case:
    """With more rows a key head than attention_decode takes, and each feature in about two of five."""
    draw = random.Random(number)

    def perhaps(value: object, otherwise: object) -> object:
        return value if draw.random() < 0.4 else otherwise

    kv_heads = draw.randint(1, 2)
    fields = {
        "batch": draw.randint(1, 2),
        "heads": kv_heads * draw.randint(1, 2),
        "kv_heads": kv_heads,
        "seqlen_q": draw.randint(17, 150),
        "seqlen_k": draw.randint(40, 200),
        "head_dim": draw.choice(WIDTHS),
        "value_dim": draw.choice(WIDTHS),
        "layout": perhaps("awkward", "contiguous"),
        "window": perhaps((draw.randint(10, 90), draw.choice((None, 0, 20))), None),
        "causal_alignment": perhaps("bottom_right", "top_left"),
        "is_causal": perhaps(True, False),
    }
    if draw.random() < 0.6:
        fields |= {
            "mask": perhaps(draw.choice(("bool", "tiles", "infinite")), ""),
            "mask_over": draw.choice(("BHQK", "QK", "BK", "HQ")),
            "slopes": perhaps(draw.choice(("H", "BH")), ""),
            "sinks": perhaps(True, False),
            "softcap": perhaps(3.0, None),
            "dropout_p": perhaps(0.2, 0.0),
        }
    return Case(**fields)


@pytest.mark.parametrize("number", range(COUNT))
@on_cuda
def test_features_at_random(target: Target, number: int) -> None:
    check_case(target, random_case(number))


@on_cuda
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("softcap", [None, 50.0], ids=["plain", "any"])
def test_three_tiles_of_keys(target: Target, width: int, softcap: float | None) -> None:
    """Of each compiled kernel, all of whose tiles come and go."""
    options = {"is_causal": True, "causal_alignment": "bottom_right", "softcap": softcap}
    shapes = ((1, 1, 140, width), (1, 1, 185, width), (1, 1, 185, width))
    check(
        target,
        *(lambda *x, function=function: function(*x, **options) for function in (attend, attend, exact)),
        [tensor(target, *shape) for shape in shapes],
        grad=False,
    )


@on_cuda
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("softcap", [None, 50.0], ids=["plain", "any"])
def test_gradients_of_every_compiled_kernel(target: Target, width: int, softcap: float | None) -> None:
    shapes = ((1, 1, 40, width), (1, 1, 70, width), (1, 1, 70, width))
    check(
        target,
        *(lambda *x, function=function: function(*x, softcap=softcap) for function in (attend, attend, exact)),
        [tensor(target, *shape) for shape in shapes],
    )


@on_cuda
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("softcap", [None, 50.0], ids=["plain", "any"])
def test_packed_sequences_in_one_split(target: Target, width: int, softcap: float | None) -> None:
    """Decoding's kernels for any number of rows."""
    lengths = ((1, 70), (20, 40))
    check_packed(target, Packed(lengths, widths=(width, width), softcap=softcap, num_splits=1), grad=False)


@on_cuda
@pytest.mark.parametrize("sinks", [False, True])
def test_many_queries_without_keys(target: Target, sinks: bool) -> None:
    query, key, value = (tensor(target, 1, 2, length, 16) for length in (40, 0, 0))
    sink = tensor(target, 2).float() if sinks else None
    with fastformer.backend(target.backend):
        output, lse = attend(query, key, value, sinks=sink)
    assert (output == 0).all()
    expected = torch.full_like(lse, -torch.inf) if sink is None else sink[:, None].expand_as(lse)
    torch.testing.assert_close(lse, expected)


@on_cuda
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_values_of_an_odd_width_without_keys(target: Target, seqlen_q: int) -> None:
    query, key, value = (tensor(target, 1, 1, *shape) for shape in ((seqlen_q, 8), (0, 8), (0, 7)))
    with fastformer.backend(target.backend):
        output, lse = attend(query, key, value)
    assert output.shape == (1, 1, seqlen_q, 7)
    assert (output == 0).all()
    assert (lse == -torch.inf).all()


@on_cuda
@pytest.mark.parametrize("num_splits", [1, 3])
def test_nan_of_one_split_shows(target: Target, num_splits: int) -> None:
    query, key, value = (tensor(target, 1, 2, length, 64) for length in (1, 200, 200))
    key[:, 0, 20] = torch.nan
    operator = torch.ops.fastformer.attention_forward
    with fastformer.backend(target.backend):
        output, lse = operator(query, key, value, None, 0.125, False, False, num_splits=num_splits)
    assert output[:, 0].isnan().all()
    assert lse[:, 0].isnan().all()
    assert output[:, 1].isfinite().all()


@on_cuda
def test_a_scale_that_is_nan_leaves_rows_without_keys_alone(target: Target) -> None:
    query, key, value = (tensor(target, 1, 1, length, 16) for length in (40, 20, 20))
    operator = torch.ops.fastformer.attention_forward
    for backend in (target.backend, "cpu") if backends.CPU_LIBRARY and target.slow else (target.backend,):
        with fastformer.backend(backend):
            output, lse = operator(query, key, value, None, torch.nan, True, True)
        assert (output[:, :, :20] == 0).all()
        assert (lse[:, :, :20] == -torch.inf).all()
        assert output[:, :, 20:].isnan().all()
