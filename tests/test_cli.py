"""The command line, run in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastformer import cli


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong command prints."""
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("fastformer: error: ")
    return lines[0]


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train", "--steps", "many"], ["generate", "--device", "moon"]])
def test_unknown_arguments_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_missing_package_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    line = error_of(["train", "--steps", "1", "--out", str(tmp_path)], capsys)
    assert line.endswith("tokenizers is not installed: pip install fastformer[models]")


def test_env_names_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    assert f"instruction-set level {torch.ops.fastformer.cpu_isa()}" in output
    assert "Triton " in output
    assert "tokenizers " in output


def test_env_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("fastformer.backends.CPU_LIBRARY", False)
    assert cli.main(["env"]) == 0
    output = capsys.readouterr().out
    assert "missing; CPU tensors run torch's own kernels. Install a C++ compiler" in output
    assert "missing: a CUDA build of torch brings Triton" in output
    assert "missing numpy, safetensors, tokenizers, tqdm: pip install fastformer[models]" in output
