"""``pytest benchmarks/`` runs the cases of ``fastformer bench`` through pytest-benchmark; see test_operations.py."""

from __future__ import annotations

import pytest
import torch

from fastformer.benchmarks.checking import Check
from fastformer.benchmarks.harness import COMPILE, MODES, OURS, Case
from fastformer.benchmarks.suite import BACKENDS, SUITES, cases_of


def pytest_addoption(parser: pytest.Parser) -> None:
    """The few options of ``fastformer bench`` that matter here; -k chooses among the cases."""
    group = parser.getgroup("fastformer")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", choices=list(BACKENDS), default=device, help=f"of the cases ({device})")
    group.addoption("--suite", choices=list(SUITES), default="quick", help="whose cases (quick)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case, mode and contestant, in this order."""
    if "contestant" not in metafunc.fixturenames:
        return
    suite, device = metafunc.config.option.suite, torch.device(metafunc.config.option.device)
    arguments, ids = [], []
    for case in cases_of(SUITES[suite].parts, suite, device, BACKENDS[device.type], (torch.float32, torch.bfloat16)):
        peers = [name for name, peer in case.peers.items() if not isinstance(peer, str)]
        for mode in (mode for mode in MODES if mode in case.work):
            for name in (OURS, *peers, *([COMPILE] if case.compiled else [])):
                arguments.append((case, mode, name))
                ids.append("-".join((str(case), mode, name)).replace(" ", "-"))
    metafunc.parametrize("check,mode,contestant", arguments, indirect=["check"], ids=ids)


@pytest.fixture(scope="module")
def check(request: pytest.FixtureRequest) -> tuple[Case, Check]:
    """A case and the right answers to it, which its modes and contestants share."""
    torch.manual_seed(0)
    return request.param, Check(request.param)
