"""The log of a run, and the picture of its losses."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from fastformer.models.log import LOG_FILE, PICTURE_FILE, Log, Row, draw_losses, read_log


def row(step: int, held_out: float | None = None) -> Row:
    return Row(step, 5.0 - step / 7, held_out, 1e-3 / 3, step * 0.1)


def test_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    log = Log(path)
    for step in range(1, 6):
        log.add(row(step, 4.5 if step == 3 else None))
    log.flush()
    log.add(row(6))
    assert read_log(path) == [row(1), row(2), row(3, 4.5), row(4), row(5)]
    assert path.read_text().splitlines()[:2] == [
        "step,loss,held_out_loss,learning_rate,seconds",
        f"1,{5 - 1 / 7!r},,{1e-3 / 3!r},0.1",
    ]

    with path.open("a") as file:
        file.write("6,4.1")  # killed while writing
    resumed = Log(path, steps_done=3)
    resumed.add(row(4))
    resumed.flush()
    assert read_log(path) == [row(1), row(2), row(3, 4.5), row(4)]
    Log(path)
    assert read_log(path) == []


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\n", b""])
def test_other_files_are_no_logs(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / LOG_FILE
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: not a log of training"):
        Log(path, steps_done=3)
    assert path.read_bytes() == content
    path.write_text(",".join(Row._fields) + "\n1,2\n")
    with pytest.raises(ValueError, match=f"{path}, line 2: not a row"):
        Log(path)


def test_losses_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / PICTURE_FILE
    draw_losses([row(step, 4.0 if step % 2 else None) for step in range(1, 9)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^matplotlib is not installed: pip install matplotlib"):
        draw_losses([row(1)], path)


def test_no_loss_is_lost_in_the_log(tmp_path: Path) -> None:
    log = Log(tmp_path / LOG_FILE)
    log.add(row(1)._replace(loss=math.pi))
    log.flush()
    assert read_log(log.path)[0].loss == math.pi
