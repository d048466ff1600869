"""Hooks of pytest: a run of all tests fails if there is a kernel, for any types and widths, that none launched."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

_launched: set[int] = set()  # by pytest-xdist's workers
_missing: list[str] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker says what it launched; who started the workers, or does without, compares."""
    emulator = sys.modules.get("fastformer_simt")
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["launched_kernels"] = sorted(emulator.launched()) if emulator else []
        return
    if emulator is not None:
        _launched.update(emulator.launched())
    if _launched and _is_whole(session):
        import simt

        kernels = simt.load().kernels()
        _missing.extend(sorted(name for address, name in kernels.items() if address not in _launched))
        if _missing:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended."""
    _launched.update(getattr(node, "workeroutput", {}).get("launched_kernels", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the kernels."""
    if _missing:
        terminalreporter.section("kernels that no test launched")
        for name in _missing:
            terminalreporter.line(name)


def _is_whole(session: pytest.Session) -> bool:
    """Whether all tests ran, and passed, and where there is no GPU."""
    option = session.config.option
    all_files = session.config.args_source is pytest.Config.ArgsSource.TESTPATHS or [
        Path(argument).resolve() for argument in session.config.args
    ] == [Path(__file__).parents[1]]
    chosen = any(getattr(option, name, None) for name in ("keyword", "markexpr", "collectonly", "deselect", "ignore"))
    return all_files and not chosen and session.testsfailed == 0 and not torch.cuda.is_available()
