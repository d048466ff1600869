"""The Triton kernels compile for GPUs that are not here, within their registers and shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPERATIONS = (
    "attention",
    "attention_decode",
    "feed_forward",
    "layer_norm",
    "linear_cross_entropy",
    "rotary",
    "softmax",
)
TARGETS = ("sm_80", "sm_90")
MOST_REGISTERS = 255  # that a thread can have
MOST_SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024}


def compile_cases(folder: Path, *operations: str) -> tuple[list[dict], subprocess.CompletedProcess]:
    """The outcomes of the operations' cases, compiled in a process that does not interpret Triton."""
    report = folder / "outcomes.json"
    command = [sys.executable, "-m", "tests.ahead_of_time", *TARGETS, "--quick", "--json", str(report)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [*command, "--operations", *operations], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert report.exists(), ended.stdout + ended.stderr
    return json.loads(report.read_text()), ended


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Every operation's, compiled once for all tests; the thorough cases are left to `make compile-matrix`."""
    return compile_cases(tmp_path_factory.mktemp("compiled"), *OPERATIONS)[0]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_within_limits(outcomes: list[dict], operation: str, target: str) -> None:
    found = [outcome for outcome in outcomes if (outcome["operation"], outcome["target"]) == (operation, target)]
    assert found, f"{operation} has no cases"
    assert not [f"{outcome['case']}: {outcome['problem']}" for outcome in found if outcome["problem"]]
    for outcome in found:
        assert 0 < outcome["registers"] <= MOST_REGISTERS, outcome
        assert 0 <= outcome["shared"] <= MOST_SHARED[target], outcome


def test_broken_kernels_are_reported(tmp_path: Path) -> None:
    outcomes, ended = compile_cases(tmp_path, "broken")
    assert ended.returncode == 1
    assert len(outcomes) == 3 * len(TARGETS)
    for outcome in outcomes:
        expected = {"shared": "bytes of shared memory, the limit is", "spills": "spills"}
        assert expected.get(outcome["case"], "does not compile") in outcome["problem"], outcome
        if outcome["case"] == "shared":
            assert outcome["shared"] >= 256 * 256 * 4
        if outcome["case"] == "spills":
            assert outcome["spilled"] > 0
