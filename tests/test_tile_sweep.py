"""The sweep of the Triton kernels' tiles: neighbours within the budget, choices on a fake clock, what is written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.errors import OutOfResources

import fastformer
from fastformer.benchmarks import tile_entries, tile_sweep
from fastformer.benchmarks.pace import Pace
from fastformer.benchmarks.tile_entries import PRODUCT_BLOCKS, AnyTile, Entry, Sizes, Use, fields_of
from fastformer.benchmarks.tile_sweep import Found, sweep_entry
from fastformer.benchmarks.timing import Call, Staged, Timing, prepared
from fastformer.triton_kernels import attention_tiles, feed_forward, gemm

CPU = torch.device("cpu")
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton's kernels run
NAMES = [
    "attention forward d128",
    "attention forward d64",
    "feed-forward",
    "attention dkdv d128",
    "attention dq d128",
    "attention dkdv d64",
    "attention dq d64",
    "feed-forward, gated",
    "feed-forward backward",
    "linear_cross_entropy",
    "accumulate",
]
#: More than the rows and queries for which there are kernels of their own, and no multiples of blocks.
TINY = Sizes(batch=1, heads=1, tokens=40, rows=40, columns=24, hidden=48, words=72)
PACE = Pace(row_seconds=1e-9, min_rounds=10)
ROW = attention_tiles.Tiles(*(attention_tiles.Tile(*x) for x in ((128, 128, 8, 2), (32, 128, 8, 2), (128, 64, 8, 2))))
KEY = ("sm_90", 2)
OWN = gemm.Tile(128, 128, 64, num_warps=8, num_stages=3)
FAST = gemm.Tile(128, 128, 64, num_warps=8, num_stages=4)
ALIKE = gemm.Tile(128, 128, 64, num_warps=8, num_stages=2)
WRONG = gemm.Tile(64, 128, 64, num_warps=8, num_stages=3)
LARGE = gemm.Tile(128, 64, 64, num_warps=8, num_stages=3)
BROKEN = gemm.Tile(128, 128, 32, num_warps=8, num_stages=3)


def numbers(tile: AnyTile) -> tuple[int, ...]:
    return tuple(fields_of(tile).values())


# --- the entries of the real tables ---


@pytest.fixture(params=["sm_80", "sm_90", "sm_100"])
def real(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """The entries of a GPU of that class."""
    monkeypatch.setattr(attention_tiles, "architecture", lambda device: request.param)
    monkeypatch.setattr(gemm, "device_class", lambda x: "sm_80" if request.param == "sm_80" else "sm_90")
    return tile_entries.entries(CPU)


def test_candidates_are_neighbours_within_the_budget(real: list[Entry]) -> None:
    assert [entry.name for entry in real] == NAMES
    for entry in real:
        own, candidates = entry.own, entry.candidates()
        shared = 99 * 1024 if entry.key[0] == "sm_80" else 227 * 1024
        assert entry.use(own).shared <= shared and own not in candidates
        assert 5 <= len(candidates) == len(set(candidates)) <= 10
        most = max(128, entry.use(own).sums / (32 * own.num_warps))
        for tile in candidates:
            assert entry.use(tile).shared <= shared and entry.use(tile).sums / (32 * tile.num_warps) <= most
            assert tile.num_warps in (4, 8) and abs(tile.num_stages - own.num_stages) <= 1 <= tile.num_stages
            blocks = list(zip(numbers(own)[:-2], numbers(tile)[:-2]))
            assert all(new in (old // 2, old, 2 * old) and 16 <= new <= 256 for old, new in blocks)
            assert 1 <= sum(old != new for old, new in zip(numbers(own), numbers(tile))) <= 2


def test_neighbours_of_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 x 128 of attention's forward takes all of the registers: no block grows, four warps go with half of one."""
    monkeypatch.setattr(attention_tiles, "architecture", lambda device: "sm_90")
    monkeypatch.setitem(attention_tiles.TILES, ("sm_90", 128, 2, 0), ROW)
    entry = tile_entries.entries(CPU)[0]
    assert entry.use(entry.own) == Use(sums=128 * 256, shared=32 * 1024 + 2 * 64 * 1024)
    found = [(128, 128, 8, 3), (128, 128, 8, 1), (64, 128, 8, 2), (128, 64, 8, 2), (64, 128, 4, 2)]
    assert [numbers(tile) for tile in entry.candidates()] == found


@pytest.mark.parametrize("name", NAMES)
def test_operations_use_the_tile_in_the_table(name: str) -> None:
    """One of no rows can't be launched; a neighbour gives the same answers, and the wrong ones show."""
    (entry,) = (entry for entry in tile_entries.entries(HERE, torch.float16, TINY) if entry.name == name)
    row = entry.table[entry.key]
    with fastformer.backend("triton"):
        call = entry.make()
        expected = tile_sweep.answers(call)
        neighbour = tile_sweep.answers(tile_sweep.in_tile(entry, entry.candidates()[2], call))
        with pytest.raises(ZeroDivisionError):
            tile_sweep.answers(tile_sweep.in_tile(entry, type(entry.own)(*(0 for _ in numbers(entry.own))), call))
    assert entry.table[entry.key] is row
    assert len(neighbour) == len(expected) and all(x.abs().max() > 0.01 for x in expected)
    assert tile_sweep.difference(neighbour, expected, torch.float16) == ""
    off = [x + 0.02 * x.abs().max() for x in expected[-1:]]
    problem = tile_sweep.difference([*expected[:-1], *off], expected, torch.float16)
    assert problem.startswith(f"wrong answer {len(expected) - 1}: error ")


@pytest.mark.parametrize("part", ["forward", "dkdv", "dq"])
def test_a_tile_stands_in_the_table_for_a_while(part: str) -> None:
    """Also where an exception ends it; the row's other tiles stay."""
    (entry,) = (entry for entry in tile_entries.entries(CPU) if entry.name == f"attention {part} d64")
    row, tile = attention_tiles.TILES[entry.key], attention_tiles.Tile(16, 16, 4, 1)
    with pytest.raises(RuntimeError), entry.using(tile):
        assert attention_tiles.TILES[entry.key] == row._replace(**{part: tile}) and entry.own == tile
        raise RuntimeError
    assert attention_tiles.TILES[entry.key] is row


# --- sweeps of an operation that does nothing, on a fake clock ---


class Fake:
    """An operation whose answers and seconds depend on the tile in its table."""

    def __init__(self, seconds: dict[gemm.Tile, tuple[float, float]]) -> None:
        """Of each tile two that alternate; any other tile takes ten."""
        self.table = {KEY: OWN}
        self.ran: list[gemm.Tile] = []
        self.seconds = {tile: list(x) for tile, x in seconds.items()}
        self.entry = Entry(
            "fake", "gemm.FAKE_TILES", self.table, KEY, "", PRODUCT_BLOCKS, lambda tile: Use(0, 0), lambda: self.call
        )

    def call(self) -> Tensor:
        tile = self.table[KEY]
        self.ran.append(tile)
        if tile == LARGE:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if tile == BROKEN:
            raise RuntimeError("PassManager::run failed")
        return torch.ones(2, 3) + (0.1 if tile == WRONG else 0.001 if tile == FAST else 0.0)

    def timer(self, call: Call) -> float:
        prepared(call)()
        seconds = self.seconds.setdefault(self.ran[-1], [10.0, 10.0])
        seconds.reverse()
        return seconds[0]


#: The own tile takes 1.0 s, give or take 0.01, and so does what is alike, but for less than that.
SECONDS = {OWN: (0.99, 1.01), FAST: (0.79, 0.81), ALIKE: (0.98, 1.0)}


def swept(fake: Fake, is_over: Callable[[], bool] = lambda: False, **options: Any) -> Found:
    return sweep_entry(fake.entry, fake.timer, random.Random(0), is_over, pace=PACE, **options)


def test_the_faster_tile_is_chosen() -> None:
    advanced: list[int] = []
    fake = Fake(SECONDS)
    found = swept(fake, advance=partial(advanced.append, 1))
    assert (found.chosen, found.fastest) == (FAST, FAST) and found.gain == pytest.approx(1.0 / 0.8, abs=0.03)
    assert fake.table == {KEY: OWN} and len(advanced) == len(fake.entry.candidates()) == 10
    assert set(found.times) == {OWN, *fake.entry.candidates()} - {WRONG, LARGE, BROKEN}
    assert found.times[OWN].samples == 10 and not found.problem and not found.late


def test_what_is_wrong_or_cannot_run_is_dropped() -> None:
    found = swept(Fake({**SECONDS, WRONG: (0.1, 0.1), LARGE: (0.1, 0.1)}))
    assert list(found.wrong) == [WRONG] and found.wrong[WRONG].startswith("wrong answer 0: error 1.0")
    assert list(found.skipped) == [LARGE, BROKEN] and found.chosen == FAST
    assert found.skipped[LARGE].startswith("OutOfResources: out of resource: shared memory, Required: 300000")
    assert found.skipped[BROKEN] == "RuntimeError: PassManager::run failed"


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ((0.98, 1.0), OWN),  # its interval reaches into that of the table's tile
        ((0.97, 0.98), ALIKE),
    ],
)
def test_noise_chooses_nothing(seconds: tuple[float, float], chosen: gemm.Tile) -> None:
    found = swept(Fake({**SECONDS, FAST: (2.0, 2.0), ALIKE: seconds}))
    assert (found.fastest, found.chosen) == (ALIKE, chosen)


def test_too_small_a_gain_chooses_nothing() -> None:
    found = swept(Fake({OWN: (1.0, 1.0), ALIKE: (0.995, 0.995)}))
    assert (found.fastest, found.chosen) == (ALIKE, OWN) and found.gain == pytest.approx(1.005, abs=1e-4)


def test_no_tile_begins_when_the_time_is_over() -> None:
    answers: Iterator[bool] = iter([False, True])
    fake = Fake(SECONDS)
    found = swept(fake, lambda: next(answers))
    assert set(fake.ran) == set(found.times) == {OWN, FAST} and found.chosen == FAST
    assert found.late == 9


def test_the_own_tile_must_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(SECONDS)
    monkeypatch.setitem(fake.table, KEY, BROKEN)
    found = swept(fake)
    assert found.problem == "RuntimeError: PassManager::run failed" and found.chosen == BROKEN
    assert fake.ran == [BROKEN] and not found.times


def test_what_precedes_the_kernel_is_not_timed() -> None:
    fake = Fake(SECONDS)
    call = tile_sweep.in_tile(fake.entry, FAST, Staged(fake.call, lambda first: (first, fake.call())))
    first, then = call()
    assert fake.ran == [OWN, FAST] and isinstance(call, Staged) and not torch.equal(first, then)


# --- the command ---


def run(entries: list[Entry], timer: Callable, file: Path, is_over: Callable[[], bool] = lambda: False) -> int:
    return tile_sweep.run(entries, timer, {"gpu": "a GPU", "driver": "1.2"}, is_over, file, pace=PACE)


def test_a_sweep_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, fake = tmp_path / "new" / "tiles.json", Fake(SECONDS)
    before = fastformer.backends.requested()
    assert run([fake.entry], fake.timer, file) == 1  # an answer is wrong
    assert fastformer.backends.requested() == before
    data = json.loads(file.read_text())
    assert data["environment"] == {"gpu": "a GPU", "driver": "1.2"} and data["left out"] == []
    line = '("sm_90", 2): Tile(128, 128, 64, num_warps=8, num_stages=4),'
    assert data["paste"] == {"gemm.FAKE_TILES": [line]}
    (entry,) = data["entries"]
    assert (entry["entry"], entry["table"], entry["row"]) == ("fake", "gemm.FAKE_TILES", ["sm_90", 2])
    assert entry["own"] == fields_of(OWN) and entry["chosen"] == fields_of(FAST) and entry["late"] == 0
    times = {tuple(x["tile"].values()): x["ms"] for x in entry["tried"] if "ms" in x}
    assert len(times) == 8 and times[numbers(OWN)] == pytest.approx(1000) and times[numbers(FAST)] == pytest.approx(800)
    assert entry["tried"][1]["ci_ms"] == pytest.approx([790, 810])
    assert [tuple(x["tile"].values()) for x in entry["tried"] if "wrong" in x] == [numbers(WRONG)]
    assert [x["skipped"] for x in entry["tried"] if "skipped" in x][1] == "RuntimeError: PassManager::run failed"

    out, err = capsys.readouterr()
    assert "fake" in err  # the bar
    lines = out.splitlines()
    assert [" ".join(line.split()) for line in lines[:2]] == [
        "in the table fastest tiles",
        "entry tile ms tile ms gain tried skipped",
    ]
    cells = "fake 128x128x64 w8 s3 1000.000 128x128x64 w8 s4 800.000 1.250x 7 3"
    assert " ".join(lines[3].split()) == cells
    assert any(x.startswith("WRONG: fake 64x128x64 w8 s3: wrong answer 0: ") for x in lines)
    assert any(x.startswith("skipped: fake 128x64x64 w8 s3: OutOfResources") for x in lines)
    assert lines[-4:] == ["gemm.FAKE_TILES:", f"    {line}", "", "1 of 1 entries have a faster tile; 8 were timed"]


def test_attentions_row_has_all_that_was_chosen_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tiles, "architecture", lambda device: "sm_90")
    monkeypatch.setitem(attention_tiles.TILES, ("sm_90", 128, 2, 0), ROW)
    entries = {entry.name: entry for entry in tile_entries.entries(CPU)}
    results = []
    for part, chosen in (("dq", (64, 64, 4, 2)), ("forward", (64, 128, 8, 3)), ("dkdv", None)):
        entry = entries[f"attention {part} d128"]
        results.append(Found(entry, entry.own))
        results[-1].times[entry.own] = Timing.of([2.0])
        if chosen:
            results[-1].times[attention_tiles.Tile(*chosen)] = Timing.of([1.0])
    row = '("sm_90", 128, 2, 0): Tiles(Tile(64, 128, 8, 3), Tile(32, 128, 8, 2), Tile(64, 64, 4, 2)),'
    assert tile_sweep.lines_to_paste(results) == {"attention_tiles.TILES": [row]}
    assert tile_sweep.lines_to_paste(results[2:]) == {}


def test_entries_that_there_is_no_time_for_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    answers = iter([False, False, True, True])
    fake, file = Fake(SECONDS), tmp_path / "tiles.json"
    assert run([fake.entry, fake.entry], fake.timer, file, lambda: next(answers)) == 0
    assert json.loads(file.read_text())["left out"] == ["fake"]
    out = capsys.readouterr().out
    assert ["fake", "no", "time"] in [line.split() for line in out.splitlines()]
    assert "no time: 9 more of fake\n" in out


def test_an_interruption_keeps_what_ended(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fake, file = Fake({**SECONDS, WRONG: (1, 1)}), tmp_path / "tiles.json"

    def interrupted() -> Call:
        raise KeyboardInterrupt

    broken = Entry("broken", "gemm.X", fake.table, KEY, "", PRODUCT_BLOCKS, fake.entry.use, interrupted)
    assert run([fake.entry, broken], fake.timer, file) == 130
    data = json.loads(file.read_text())
    assert [x["entry"] for x in data["entries"]] == ["fake"] and data["left out"] == ["broken"]
    assert "1 of 1 entries have a faster tile" in capsys.readouterr().out


def test_a_real_kernel_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the operation itself, each tile launches its own grid; a fake clock prefers 64 columns."""
    (entry,) = (entry for entry in tile_entries.entries(HERE, torch.float16, TINY) if entry.name == "feed-forward")
    launched: list[tuple[int, int, int]] = []
    operands = feed_forward.operands

    def spy(*matrices: tuple[Tensor, int, int]) -> Any:
        launched.append((matrices[0][1], matrices[1][1], matrices[0][2]))
        return operands(*matrices)

    def timer(call: Call) -> float:
        launched.clear()
        prepared(call)()
        (blocks,) = launched
        return 1.0 if blocks[1] == 256 else 0.5

    monkeypatch.setattr(feed_forward, "operands", spy)
    monkeypatch.setattr(tile_entries, "MOST", 4)
    file, pace = tmp_path / "tiles.json", Pace(row_seconds=1e-9, min_rounds=2)
    assert tile_sweep.run([entry], timer, {}, lambda: False, file, torch.float16, pace) == 0
    (found,) = json.loads(file.read_text())["entries"]
    assert found["own"]["block_n"] == 256 and found["chosen"]["block_n"] == 128
    assert len(found["tried"]) == 5 and all("ms" in x for x in found["tried"])


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tile_sweep.main(["--seconds", "1", "--json", str(tmp_path / "tiles.json")]) == 2
    assert "a GPU are needed" in capsys.readouterr().err and not list(tmp_path.iterdir())
