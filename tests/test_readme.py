"""Every code block of README.md runs, and its measurements are the newest ones that are kept."""

import re
from pathlib import Path

import pytest

from fastformer.benchmarks import readme_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_in_order(capsys: pytest.CaptureFixture) -> None:
    names: dict[str, object] = {}
    python = [code for language, code in BLOCKS if language == "python"]
    assert len(python) >= 3
    for code in python:
        exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "13 layers swapped" in printed and "softmax: " in printed
    assert names["output"].shape == (1, 8, 128, 64) and names["lse"].shape == (1, 8, 128)


def test_the_shell_block_names_targets_of_the_makefile() -> None:
    (shell,) = [code for language, code in BLOCKS if language == ""]
    targets = re.findall(r"^make (\S+)", shell, re.MULTILINE)
    assert targets == ["bench", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_target_named_for_development_exists() -> None:
    (line,) = re.findall(r"^`make (build [^`]*)`", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in line.split())


def test_measurements_are_the_newest_that_are_kept() -> None:
    assert readme_table.outdated(ROOT) == [], "make readme-table"
