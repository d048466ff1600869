"""Every feature of scaled_dot_product_attention on every target, alone and combined: values and all gradients."""

import itertools
import math
import sys
from functools import partial
from typing import Any

import pytest
import torch
from attention_support import (
    FAST_TARGETS,
    MASKS,
    TARGETS,
    Case,
    attend,
    check_case,
    check_tensors,
    composed,
    exact,
    on_fast_kernels,
    on_kernels,
    on_targets,
    without_chance,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import LAYOUTS, Target, check, tensor
from torch import Tensor

import fastformer
import fastformer.functional as F

CAUSAL_AT_THE_END = {"is_causal": True, "causal_alignment": "bottom_right"}

#: Each feature's arguments of Case; together they are every feature there is.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal at the end": CAUSAL_AT_THE_END,
    "window": {"window": (3, 1)},
    "window at the end": {"window": (4, 2), "causal_alignment": "bottom_right"},
    "window to the left": {"window": (3, None)},
    "window to the right": {"window": (None, 2)},
    "window to none at the left": {"window": (0, 3)},
    "wide window": {"window": (90, 40), "causal_alignment": "bottom_right"},
    "causal window": {"window": (4, 3), **CAUSAL_AT_THE_END},
    "alibi": {"slopes": "H"},
    "alibi of each sequence": {"slopes": "BH", **CAUSAL_AT_THE_END},
    "alibi with a gradient": {"slopes": "H", "learned_slopes": True, "causal_alignment": "bottom_right"},
    "alibi of each sequence with a gradient": {"slopes": "BH", "learned_slopes": True, "is_causal": True},
    "softcap": {"softcap": 2.0, "spread": 4.0},
    "sinks": {"sinks": True},
    "sinks and a window": {"sinks": True, "window": (2, 0)},
    "bool mask": {"mask": "bool"},
    "bool mask of tiles": {"mask": "tiles"},
    "added mask": {"mask": "added"},
    "added mask with -inf": {"mask": "infinite", "is_causal": True},
    "added mask without a gradient": {"mask": "constant"},
    "dropout": {"dropout_p": 0.3},
    "dropout and causal": {"dropout_p": 0.7, **CAUSAL_AT_THE_END},
    "dropout, mask and sinks": {"dropout_p": 0.2, "mask": "bool", "sinks": True},
    "heads without groups": {"heads": 2, "kv_heads": 2},
    "two groups of heads": {"heads": 4, "kv_heads": 2, "is_causal": True},
    "one key head": {"heads": 3, "kv_heads": 1, "mask": "bool"},
    "head_dim 1": {"head_dim": 1, "value_dim": 3},
    "head_dim 256": {"head_dim": 256, "value_dim": 200, "spread": 0.5},
    "wide values": {"head_dim": 5, "value_dim": 256, "spread": 0.5},
    "scale": {"scale": 0.25},
    "negative scale": {"scale": -0.25, "is_causal": True},
    "scale 0": {"scale": 0.0, "mask": "bool"},
    "scale 0 in float32": {"scale": 1e-60, "is_causal": True},
    "without the lse": {"return_lse": False, "window": (3, 1)},
    "everything": {
        "sinks": True,
        "slopes": "BH",
        "mask": "infinite",
        "softcap": 3.0,
        "dropout_p": 0.25,
        "window": (6, 2),
        "causal_alignment": "bottom_right",
        "scale": 0.5,
        "value_dim": 5,
    },
    "everything of a decoder": {
        "sinks": True,
        "slopes": "H",
        "mask": "bool",
        "softcap": 3.0,
        "dropout_p": 0.25,
        "window": (6, None),
        **CAUSAL_AT_THE_END,
    },
}

SUBSETS = ["".join(some) for count in range(5) for some in itertools.combinations("BHQK", count)]

#: Those that have all of them.
FEATURE_TARGETS = [target for target in TARGETS if target.backend != "torch"]
#: torch's own dropout has its own bits, which test_attention_dropout.py shows to be torch's.
ON_TARGETS = [
    pytest.param(target, feature, id=f"{feature}-{target}")
    for feature, target in itertools.product(FEATURES, TARGETS)
    if not (target.backend == "torch" and FEATURES[feature].get("dropout_p"))
]


@pytest.mark.parametrize(("target", "feature"), ON_TARGETS)
def test_features(target: Target, feature: str) -> None:
    check_case(target, Case(**FEATURES[feature]))


@on_fast_kernels
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("lengths", [(150, 300), (170, 130)], ids=str)
def test_features_over_several_blocks(target: Target, feature: str, lengths: tuple[int, int]) -> None:
    sizes = {"seqlen_q": lengths[0], "seqlen_k": lengths[1], "head_dim": 24, "value_dim": 20, "heads": 4, "kv_heads": 2}
    check_case(target, Case(**sizes | FEATURES[feature]))


@on_fast_kernels
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("lengths", [(3, 600), (1, 300)], ids=str)
def test_features_with_few_queries(target: Target, feature: str, lengths: tuple[int, int]) -> None:
    """The last ones, in windows 40 times as wide: of a few keys torch's error is a matter of luck."""
    sizes = {"seqlen_q": lengths[0], "seqlen_k": lengths[1], "head_dim": 24, "value_dim": 20, "heads": 4, "kv_heads": 2}
    fields = sizes | FEATURES[feature] | {"causal_alignment": "bottom_right"}
    if "window" in fields:
        fields["window"] = tuple(None if side is None else 40 * (side + 1) for side in fields["window"])
    check_case(target, Case(**fields))


@pytest.mark.parametrize("target", [t for t in TARGETS if not (t.slow and t.dtype == torch.float16)], ids=str)
@pytest.mark.parametrize("over", SUBSETS)
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks_that_broadcast(target: Target, over: str, kind: str) -> None:
    """Of an added one each dimension of size 1 sums its gradient."""
    check_case(target, Case(mask=kind, mask_over=over))


@on_fast_kernels
@pytest.mark.parametrize("over", SUBSETS)
@pytest.mark.parametrize("kind", ["tiles", "infinite"])
def test_masks_that_broadcast_over_several_blocks(target: Target, over: str, kind: str) -> None:
    check_case(target, Case(seqlen_q=140, seqlen_k=290, head_dim=16, mask=kind, mask_over=over, **CAUSAL_AT_THE_END))


def case_of(groups: int, kv_heads: int, head_dim: int, scale: float | None, **fields: Any) -> Case:
    scale = None if scale is None else scale / math.sqrt(head_dim)
    return Case(heads=groups * kv_heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, **fields)


LENGTHS = st.integers(16, 60)  # in tensors of a few elements torch's error is a matter of luck
CASES = st.builds(
    case_of,
    groups=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    batch=st.integers(1, 2),
    seqlen_q=LENGTHS,
    seqlen_k=LENGTHS,
    head_dim=st.integers(4, 48),
    value_dim=st.integers(4, 48),
    mask=st.sampled_from(("", "", *MASKS)),
    mask_over=st.sampled_from(SUBSETS),
    slopes=st.sampled_from(("", "", "H", "BH")),
    learned_slopes=st.booleans(),
    sinks=st.booleans(),
    is_causal=st.booleans(),
    causal_alignment=st.sampled_from(("top_left", "bottom_right")),
    window=st.none() | st.tuples(*[st.none() | st.integers(0, 50)] * 2),
    softcap=st.none() | st.floats(1.0, 30.0),
    scale=st.none() | st.integers(-15, 15).map(lambda tenths: tenths / 10),
    dropout_p=st.sampled_from((0.0, 0.0, 0.1, 0.5)),
    return_lse=st.booleans(),
    spread=st.floats(0.5, 1.5),
    layout=st.sampled_from(LAYOUTS),
)


@settings(max_examples=max(100, settings().max_examples))
@given(case=CASES, target=st.sampled_from([*FAST_TARGETS * 2, *FEATURE_TARGETS]))
def test_any_combination(case: Case, target: Target) -> None:
    def tensors() -> dict[str, Tensor]:
        drawn = case.tensors(target)
        seen = case.visible(drawn).sum(-1)
        assume(not seen.any() or (seen > 2).sum() >= 16)  # see test_a_query_that_sees_one_key
        return drawn

    without_chance(lambda: check_tensors(target, case, tensors()))


@on_kernels
def test_softcap_from_none_at_all_to_nothing_left(target: Target) -> None:
    """A large one leaves the scores as they are, a small one makes them all alike."""
    query, key, value = (tensor(target, 1, 2, 9, 16) for _ in range(3))
    with fastformer.backend(target.backend):
        plain = F.scaled_dot_product_attention(query, key, value)
        large, huge = (F.scaled_dot_product_attention(query, key, value, softcap=cap) for cap in (1e9, 1e38))
        small, tiny = (F.scaled_dot_product_attention(query, key, value, softcap=cap) for cap in (1e-9, 1e-60))
    bound = {"rtol": 0, "atol": 4 * torch.finfo(target.dtype).eps}
    torch.testing.assert_close(large, plain, **bound)
    torch.testing.assert_close(huge, plain, **bound)
    mean = value.double().mean(2, keepdim=True).expand_as(value)
    torch.testing.assert_close(small.double(), mean, **bound)
    torch.testing.assert_close(tiny.double(), mean, **bound)


def test_a_row_without_keys_and_without_a_sink_gives_zeros() -> None:
    x, mask = torch.randn(1, 2, 3, 4, requires_grad=True), torch.ones(3, 3, dtype=torch.bool)
    mask[0] = False
    sinks = torch.tensor([-math.inf, 0.0], requires_grad=True)
    out, lse = F.scaled_dot_product_attention(x, x, x, mask, sinks=sinks, return_lse=True)
    assert not out[:, :, 0].any() and lse[0, :, 0].tolist() == [-math.inf, 0.0]
    grads = torch.autograd.grad(out.sum(), (x, sinks))
    assert all(grad.isfinite().all() for grad in grads)


@on_targets
def test_a_window_beyond_every_key_is_none(target: Target) -> None:
    query, key, value = (tensor(target, 1, 2, length, 8) for length in (5, 7, 7))
    with fastformer.backend(target.backend):
        plain, left, both = (
            attend(query, key, value, window=window, causal_alignment="bottom_right")
            for window in (None, (sys.maxsize, None), (2**31, 2**70))
        )
    torch.testing.assert_close(left, plain)
    torch.testing.assert_close(both, plain)


@on_targets
def test_masks_wider_than_the_query(target: Target) -> None:
    """float32 masks are added in float32: their digits, and the range that float16 lacks."""
    query, key, value = (tensor(target, 1, 2, 6, 8) for _ in range(3))
    for shift in (100.0, -300.0, torch.finfo(torch.float32).min):
        mask = (torch.randn(6, 6) + shift).to(target.device)
        ways = (partial(way, attn_mask=mask, return_lse=False) for way in (attend, composed, exact))
        check(target, *ways, [query, key, value], grad=False)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"is_causal": "yes"}, TypeError, "is_causal is a str, must be a bool"),
        ({"is_causal": None}, TypeError, "is_causal is a NoneType"),
        ({"dropout_p": None}, TypeError, "dropout_p is a NoneType, must be a number"),
        ({"dropout_p": math.nan}, ValueError, r"dropout_p is nan, must be in \[0, 1\]"),
        ({"scale": 1j}, TypeError, "scale is a complex, must be a number"),
        ({"window": (True, None)}, ValueError, r"window is \(True, None\)"),
        ({"window": 3}, ValueError, "window is 3, must be"),
        ({"window": (1, -2)}, ValueError, r"window is \(1, -2\)"),
        ({"window": (1.5, None)}, ValueError, r"window is \(1.5, None\)"),
        ({"softcap": "2"}, TypeError, "softcap is a str, must be a number"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0, must be positive"),
        ({"softcap": math.nan}, ValueError, "softcap is nan"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks has shape \(3,\), must be \(2,\)"),
        ({"sinks": 1.0}, TypeError, "sinks is a float"),
        ({"sinks": torch.zeros(2, dtype=torch.int64)}, TypeError, "sinks has dtype torch.int64"),
        ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes has shape \(3,\), must be \(2,\) or \(1, 2\)"),
        ({"alibi_slopes": 0.5}, TypeError, "alibi_slopes is a float"),
        ({"alibi_slopes": torch.zeros(2).long()}, TypeError, "alibi_slopes has dtype torch.int64"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], words: str) -> None:
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(error, match=words):
        F.scaled_dot_product_attention(x, x, x, **options)
