"""Packed attention: equal to one dense attention for each sequence, whatever the options and lengths."""

import dataclasses
from typing import Any

import pytest
from attention_support import CUDA_16BIT, KERNEL_TARGETS, TARGETS, without_chance
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_support import FEWER_TARGETS, Packed, check_packed
from support import Target

LENGTHS = ((17, 30), (20, 20), (1, 9))
EMPTY = ((0, 0), (17, 0), (0, 20), (18, 20), (0, 0))
EVERYTHING = {
    "lengths": ((17, 30), (0, 3), (20, 19), (3, 0)),
    "heads": (4, 2),
    "widths": (16, 24),
    "window": (9, -1),
    "is_causal": True,
    "scale": 0.3,
    "softcap": 1.5,
    "alibi": 2,
    "sinks": "learned",
    "room": 5,
    "rest": 3,
    "sliced": True,
    "spread": 2.0,
}

CASES = {
    "one sequence": Packed(((20, 20),)),
    "several": Packed(LENGTHS),
    "causal": Packed(LENGTHS, is_causal=True),
    "more queries than keys": Packed(((20, 6), (18, 24)), window=(-1, 0)),
    "empty": Packed(EMPTY, window=(-1, 0)),
    "empty, with sinks": Packed(EMPTY, sinks="fixed"),
    "window": Packed(LENGTHS, window=(6, 0)),
    "window to both sides": Packed(LENGTHS, window=(5, 3)),
    "window to the left": Packed(((17, 30), (25, 20)), window=(4, -1)),
    "window to the right": Packed(LENGTHS, window=(-1, 2)),
    "window, cut by is_causal": Packed(LENGTHS, window=(8, 3), is_causal=True),
    "softcap": Packed(LENGTHS, softcap=2.0, spread=3.0),
    "alibi": Packed(LENGTHS, alibi=1),
    "alibi of each sequence": Packed(LENGTHS, alibi=2, is_causal=True),
    "sinks": Packed(LENGTHS, heads=(4, 2), sinks="learned", is_causal=True),
    "scale": Packed(LENGTHS, scale=-0.7),
    "several key heads": Packed(LENGTHS, heads=(6, 2), widths=(20, 12)),
    "a key head for each": Packed(LENGTHS, heads=(3, 3), widths=(8, 40)),
    "rows of no sequence": Packed(LENGTHS, rest=4, is_causal=True),
    "keys not there yet": Packed(((17, 30), (20, 0), (1, 20)), room=7, window=(-1, 0)),
    "slices of a projection": Packed(((21, 21), (18, 18)), sliced=True, is_causal=True),
    "paged": Packed(LENGTHS, page_size=16, window=(20, 0)),
    "paged, everything": Packed(**EVERYTHING, page_size=16),
    "everything": Packed(**EVERYTHING),
    "over the edges of tiles": Packed(((63, 65), (64, 64), (65, 63), (1, 129)), heads=(2, 1), window=(40, 0)),
}
ALL_AT_ONCE = [name for name in CASES if "everything" in name]


@pytest.mark.parametrize(
    ("target", "case"),
    [
        pytest.param(target, case, id=f"{target}-{name}")
        for target in TARGETS
        for name, case in CASES.items()
        if target in FEWER_TARGETS + CUDA_16BIT or name in ALL_AT_ONCE
    ],
)
def test_equals_dense_attention_of_each_sequence(target: Target, case: Packed) -> None:
    check_packed(target, case)


EDGES = ((95, 95), (96, 128), (97, 127), (128, 129), (193, 192), (5, 256), (4, 257))


@pytest.mark.parametrize("target", [t for t in TARGETS if not t.slow or t in CUDA_16BIT[:1]], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "heads": (8, 2), "sinks": "learned", "sliced": True},
        {"window": (64, 0), "room": 70, "softcap": 3.0},
        {"window": (50, 20), "alibi": 2, "rest": 100},
        {"is_causal": True, "page_size": 64, "alibi": 1},
    ],
)
def test_over_several_blocks(target: Target, options: dict[str, Any]) -> None:
    check_packed(target, Packed(EDGES, widths=(32, 24), **options))


FAST_KERNEL_TARGETS = [target for target in KERNEL_TARGETS if not target.slow]


def sequences(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    """(queries, keys), seldom fewer keys than queries, and any number of keys for the few queries of decoding."""
    queries, more = st.integers(least, most), st.integers(-2, 40 if most > 5 else 70)
    return st.tuples(queries, more).map(lambda pair: (pair[0], max(0, sum(pair))))


@settings(max_examples=max(50, settings().max_examples))
@given(
    target=st.sampled_from([TARGETS[0], *KERNEL_TARGETS, *FAST_KERNEL_TARGETS * 2]),
    case=st.builds(
        Packed,
        heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)]),
        # In tensors of a few elements torch's error is a matter of luck: one sequence is of some length.
        lengths=st.tuples(
            st.lists(sequences(0, 40), max_size=3), sequences(24, 60), st.lists(sequences(0, 5), max_size=3)
        ).map(lambda parts: (*parts[0], parts[1], *parts[2])),
        widths=st.tuples(st.integers(16, 40), st.integers(16, 40)),
        window=st.sampled_from([(-1, -1), (-1, 0), (-1, 3), (20, 0), (7, 4), (12, -1)]),
        is_causal=st.booleans(),
        scale=st.sampled_from([None, 0.15, -0.1]),
        softcap=st.sampled_from([None, 0.7, 30.0]),
        alibi=st.integers(0, 2),
        sinks=st.sampled_from(["", "fixed", "learned"]),
        room=st.sampled_from([0, 0, 3]),
        rest=st.sampled_from([0, 0, 5]),
        page_size=st.sampled_from([0, 0, 16, 32]),
        sliced=st.booleans(),
        num_splits=st.sampled_from([None, 1, 3]),
    ).map(lambda case: dataclasses.replace(case, heads=(8, 2)) if case.sinks == "learned" else case),
    grad=st.booleans(),
)
def test_any_packed_combination(target: Target, case: Packed, grad: bool) -> None:
    without_chance(lambda: check_packed(target, case, grad=grad))
