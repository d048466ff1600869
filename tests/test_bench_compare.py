"""Comparing two benchmark results: noise is no finding, a slower kernel is one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import asdict

import pytest

from fastformer.benchmarks import compare, report
from fastformer.benchmarks.compare import Comparison
from fastformer.benchmarks.timing import Timing

# Operation -> shapes; each in two dtypes and two modes, which makes 152 rows.
OPERATIONS = {
    "softmax": 6,
    "layer_norm": 6,
    "add_layer_norm": 5,
    "rms_norm": 2,
    "attention": 7,
    "linear": 4,
    "feed_forward": 4,
    "linear_cross_entropy": 2,
    "rotary": 2,
}
RUNS = 40


def timing(rng: random.Random, seconds: float, spread: float, samples: int) -> dict:
    """Of samples with a long tail to the right: one in twenty is interrupted."""
    found = [
        seconds * (1 + spread * abs(rng.gauss(0, 1.5)) + (rng.expovariate(0.3) if rng.random() < 0.05 else 0))
        for _ in range(samples)
    ]
    return asdict(Timing.of(found))


def one_run(
    rng: random.Random, *, machine: float = 1.0, kernels: Callable[[str, str, str], float] | None = None
) -> dict:
    """Results of a run, as JSON has them: ``kernels`` gives the factor of an operation, shape and mode of ours.

    The machine drifts in the course of the run by some percent, peers alike; each row differs from run to run by a
    little more than its spread; one of ours in thirty, alone, takes half as long again, as where memory lies elsewhere.
    """
    drift, rows = 1.0, []
    for operation, shapes in OPERATIONS.items():
        for index in range(shapes):
            for dtype in ("fp32", "bf16"):
                for mode in ("fwd", "fwd_bwd"):
                    sizes = random.Random(f"{operation}{index}{dtype}{mode}")  # of the row, in all runs
                    seconds, spread = 10 ** sizes.uniform(-5, -1), sizes.choice((0.01, 0.02, 0.04, 0.1))
                    samples = 3 if seconds > 0.05 else 20 if seconds > 0.005 else 100
                    drift *= rng.gauss(1, 0.01)
                    here = machine * drift * seconds
                    mine = here * rng.gauss(1, 0.02) * (1.5 if rng.random() < 1 / 30 else 1)
                    if kernels is not None:
                        mine *= kernels(operation, str(index), mode)
                    peers = {"eager": timing(rng, 2 * here * rng.gauss(1, 0.01), spread, samples), "compile": "no time"}
                    rows.append(row(operation, str(index), dtype, mode, timing(rng, mine, spread, samples), peers))
    return results(rows)


def row(operation: str, shape: str, dtype: str, mode: str, ours: dict | None, peers: dict, problem: str = "") -> dict:
    names = {"operation": operation, "shape": shape, "dtype": dtype, "mode": mode, "backend": "cpu"}
    return {**names, "ours": ours, "peers": peers, "problem": problem, "spread": 0.02 if ours else None}


def results(rows: list[dict]) -> dict:
    return {
        "format": report.FORMAT,
        "environment": {
            "processor": "a processor",
            "threads": "2 of torch",
            "versions": "fastformer 0.1.0 (commit 1), torch 2.13.0",
        },
        "limits": {"copy": {"1": 1e9, "2": 2e9}, "read": {"1": 1e9}, "product": {"fp32": 1e11}, "drift": 0.0},
        "rows": rows,
        "interrupted": False,
    }


def scaled(run: dict, factor: float, *, of: Callable[[dict], bool] = lambda row: True, peers: bool = False) -> dict:
    """The run with ours (and its peers) so many times as slow in some rows."""
    run = copy.deepcopy(run)
    for found in filter(of, run["rows"]):
        for times in (found["ours"], *(found["peers"].values() if peers else ())):
            if isinstance(times, dict):
                times |= {name: factor * value for name, value in times.items() if name != "samples"}
    return run


def slower_operations(comparison: Comparison) -> set[str]:
    return {family.operation for family in comparison.families if family.factor > 1}


def test_two_runs_of_one_commit_have_no_finding() -> None:
    for seed in range(RUNS):
        rng = random.Random(seed)
        found = compare.compare(one_run(rng), one_run(rng, machine=rng.uniform(0.85, 1.15)))
        assert found.rows == 152
        assert (found.moved, found.families, found.worse) == ([], [], False), f"seed {seed}: {found.format()}"
        assert "None of 152 rows moved" in found.format()


def test_a_kernel_slowed_by_a_fifth_is_found_and_nothing_else() -> None:
    names, missed = list(OPERATIONS), []
    for seed in range(RUNS):
        rng, slow = random.Random(seed), names[seed % len(names)]
        new = one_run(rng, machine=1.05, kernels=lambda name, shape, mode, slow=slow: 1.2 if name == slow else 1.0)
        found = compare.compare(one_run(rng), new)
        assert slower_operations(found) <= {slow} and {change.key[0] for change in found.moved} <= {slow}
        if found.worse:
            assert any(change.key[0] == slow and change.factor > 1.1 for change in found.moved)
            assert slow in found.format().partition("operations that are slower")[2]
        else:
            missed.append(slow)
    assert len(missed) <= RUNS // 10, missed


def test_a_slower_backward_pass_is_found_in_its_mode() -> None:
    rng = random.Random(0)
    new = one_run(rng, kernels=lambda name, shape, mode: 1.25 if (name, mode) == ("attention", "fwd_bwd") else 1.0)
    found = compare.compare(one_run(rng), new)
    assert {(family.operation, family.mode) for family in found.families} >= {("attention", "fwd_bwd")}
    assert all(change.key[3] == "fwd_bwd" for change in found.moved) and len(found.moved) > 7


def test_faster_is_moved_and_not_worse() -> None:
    rng = random.Random(1)
    found = compare.compare(one_run(rng), one_run(rng, kernels=lambda name, *_: 0.7 if name == "softmax" else 1.0))
    assert {family.operation for family in found.families} == {"softmax"} and not found.worse
    assert "operations that are faster" in found.format() and "x faster" in found.format()


@pytest.mark.parametrize("drift", [0.85, 1.15, 2.0])
def test_a_machine_that_drifts_moves_nothing(drift: float) -> None:
    run = one_run(random.Random(2))
    found = compare.compare(run, scaled(run, drift, peers=True))
    assert found.machine == pytest.approx(drift) and found.scatter == pytest.approx(1)
    assert not found.moved and not found.families and not found.alone
    assert f"{drift:.2f}x as long" in found.format()


def test_a_row_on_its_own_is_told_and_is_a_finding_from_a_factor_of_two_on() -> None:
    run = one_run(random.Random(3))

    def chosen(row: dict) -> bool:
        return (row["operation"], row["shape"], row["dtype"], row["mode"]) == ("softmax", "0", "fp32", "fwd")

    once = compare.compare(run, scaled(run, 1.5, of=chosen))
    assert [change.key[0] for change in once.alone] == ["softmax"] and not once.worse
    assert "run again" in once.format()
    twice = compare.compare(run, scaled(run, 2.5, of=chosen))
    assert [change.key[1] for change in twice.moved] == ["0"] and twice.worse and not twice.alone
    assert twice.moved[0].factor == pytest.approx(2.5)
    for each in filter(chosen, run["rows"]):
        each["ours"]["samples"] = 5  # too few for an interval
    few = compare.compare(run, scaled(run, 2.5, of=chosen))
    assert not few.moved and not few.alone


def test_torch_of_another_version_is_no_control() -> None:
    """Its softmax has become twice as fast, and ours is the same."""
    run = one_run(random.Random(4))
    new = scaled(scaled(run, 0.5, of=lambda row: row["operation"] == "softmax", peers=True), 2.0)
    new["rows"] = [
        fast if fast["operation"] == "softmax" else old for fast, old in zip(new["rows"], copy.deepcopy(run["rows"]))
    ]
    assert slower_operations(compare.compare(run, new)) == {"softmax"}  # for all that can be told
    new["environment"]["versions"] = "fastformer 0.1.0 (commit 2), torch 2.14.0"
    found = compare.compare(run, new)
    assert not found.families and not found.moved
    assert "torch 2.14.0" in found.format()


def test_without_peers_the_limits_tell_of_the_machine() -> None:
    run = one_run(random.Random(5))
    for each in run["rows"]:
        each["peers"] = {}
    new = scaled(run, 1.3)
    assert compare.compare(run, new).worse
    new["limits"] |= {kind: {key: rate / 1.3 for key, rate in run["limits"][kind].items()} for kind in ("copy", "read")}
    found = compare.compare(run, new)
    assert not found.worse and not found.families and found.machine is None


def test_an_answer_that_became_wrong_is_worse() -> None:
    run = one_run(random.Random(6))
    new = copy.deepcopy(run)
    new["rows"][0] |= {"ours": None, "peers": {}, "problem": "wrong output: 12x the allowed error", "spread": None}
    found = compare.compare(run, new)
    assert found.worse and not found.moved and found.rows == 151
    assert found.broken == ["  softmax 0 fp32 fwd: wrong output: 12x the allowed error"]
    assert "wrong now:\n  softmax 0 fp32 fwd" in found.format()
    back = compare.compare(new, run)
    assert not back.worse and back.mended == ["  softmax 0 fp32 fwd"]


def test_new_and_gone_rows_are_listed_apart() -> None:
    run = one_run(random.Random(7))
    old, new = copy.deepcopy(run), copy.deepcopy(run)
    old["rows"] = [row for row in run["rows"] if row["operation"] != "rotary"]
    new["rows"] = [row for row in run["rows"] if row["operation"] != "linear"]
    found = compare.compare(old, new)
    assert len(found.new) == 8 and all("rotary" in name for name in found.new)
    assert len(found.gone) == 16 and all("linear" in name for name in found.gone)
    assert not found.worse and found.rows == 128
    assert "only in the new run:\n  rotary 0 fp32 fwd\n" in found.format()


def test_other_machines_are_compared_and_told() -> None:
    run = one_run(random.Random(8))
    new = copy.deepcopy(run)
    new["environment"] |= {"processor": "another", "gpu": "NVIDIA something"}
    new["interrupted"] = True
    new["limits"]["drift"] = -0.4
    text = compare.compare(run, new).format()
    for said in (
        "processor: a processor; now another",
        "gpu: none; now NVIDIA",
        "machines differ",
        "interrupted",
        "40%",
    ):
        assert said in text


def test_no_line_is_wider_than_a_terminal() -> None:
    rng = random.Random(9)
    old, new = one_run(rng), one_run(rng, kernels=lambda name, *_: 12.3 if name == "linear_cross_entropy" else 0.5)
    for run in (old, new):
        run["environment"]["versions"] += ", and many more packages" * 20
        for each in run["rows"]:
            each["shape"] += " 1024x384x1536 of a very long name"
    new["environment"]["versions"] += " 2.0"
    new["rows"][0] |= {"ours": None, "problem": "long " * 50}
    new["rows"][1]["shape"] = "another " * 30
    text = compare.compare(old, new).format()
    assert max(map(len, text.splitlines())) <= 100 and text.count("\n") > 100


def test_results_of_another_format_are_refused() -> None:
    with pytest.raises(ValueError, match="the old results have format None, must have 2"):
        compare.compare({"rows": []}, results([]))
