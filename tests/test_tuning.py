"""The tables of ``fastformer tune``: the file, and what ``auto``, ``explain`` and ``fastformer env`` make of it."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import needs_library

import fastformer
import fastformer.functional as F
from fastformer import backends, cli, tuning
from fastformer.tuning import NEVER, Entry, Table

FP32, BF16 = torch.float32, torch.bfloat16
MACHINE = {"device": "cpu", "name": "a processor", "level": "avx2", "threads": 2, "torch": "2.13.0", "fastformer": "1"}
ENTRY = Entry("softmax", FP32, "cpu", (100, NEVER), "1.2x to 3.4x")
TABLE = Table(MACHINE, "2026-01-31", (ENTRY, Entry("rotary", BF16, "cpu", (0, 7), "", broken=True)))


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "tuning.json"
    assert tuning.read(file) == []
    other = Table(MACHINE | {"threads": 4}, "2026-02-01", ())
    tuning.write(file, [TABLE, other])
    assert tuning.read(file) == [TABLE, other] and list(file.parent.iterdir()) == [file]
    assert tuning.find([TABLE, other], dict(MACHINE)) == TABLE
    for name, value in MACHINE.items():
        assert tuning.find([TABLE], MACHINE | {name: f"{value}1"}) is None


def test_a_table_takes_the_place_of_its_machines() -> None:
    new = Table(dict(MACHINE), "2026-03-01", (ENTRY,))
    other = Table(MACHINE | {"threads": 4}, "2026-02-01", (ENTRY,))
    assert tuning.replaced([TABLE, other], new) == [other, new]
    assert tuning.replaced([], new) == [new]


DAMAGED = {
    "no JSON": "{",
    "another format": '{"format": 2, "tables": []}',
    "no tables": '{"format": 1}',
    "a list": "[]",
    "deeply nested": "[" * 100_000,
    "a machine of lists": '{"format": 1, "tables": [{"machine": {"threads": [2]}, "made": "", "entries": []}]}',
    "no machine": '{"format": 1, "tables": [{"made": "", "entries": []}]}',
    **{
        f"{name} {value!r}": json.dumps(
            {"format": 1, "tables": [{"machine": {}, "made": "", "entries": [ENTRY.to_json() | {name: value}]}]}
        )
        for name, value in (
            ("dtype", "int8"),
            ("kernel", "torch"),
            ("least", [1]),
            ("least", ["1", 2]),
            ("operation", 1),
            ("broken", 1),
        )
    },
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_a_warning_that_names_it(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tuning.json"
    file.write_text(text)
    monkeypatch.setenv("FASTFORMER_TUNING", str(file))
    with pytest.raises(ValueError, match=r"tuning.json holds no tables of fastformer tune: .+"):
        tuning.read(file)
    with pytest.warns(UserWarning, match=r"tuning.json .*ignored; `fastformer tune --reset` deletes it"):
        assert tuning.read_or_warn() == []


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.path() is None and backends.TABLES == [] and backends.TUNED == {}  # for all tests
    monkeypatch.setenv("FASTFORMER_TUNING", "/some/file")
    assert tuning.path() == Path("/some/file")
    monkeypatch.delenv("FASTFORMER_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert tuning.path() == Path("/cache/fastformer/tuning.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert tuning.path() == Path("/home/me/.cache/fastformer/tuning.json")


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes ``auto`` go by these entries, as tuned on this machine's processor and GPU."""

    def use(*entries: Entry) -> None:
        found = backends._tuned(Table(MACHINE, "2026-01-31", entries))
        for name in ("FASTER", "FASTER_ON_GPU"):
            monkeypatch.setattr(backends, name, found)
        monkeypatch.setattr(backends, "_SMALL", {key: min(row.least) for key, row in found.items()})
        monkeypatch.setattr(backends, "_decided", {})

    return use


@needs_library
def test_auto_goes_by_the_table_and_explain_names_it(tuned: Callable[..., None]) -> None:
    tuned(ENTRY, Entry("rotary", FP32, "cpu", (NEVER, NEVER), ""), Entry("rms_norm", FP32, "cpu", (NEVER, 4), "2x"))
    small, large = torch.ones(3, 33), torch.ones(4, 25)
    said = "tuned on this machine 2026-01-31: ours is faster from 100 elements on, never with gradients"
    assert fastformer.explain(F.softmax, small, -1) == f"softmax: torch ({said})"
    assert fastformer.explain(F.softmax, large, -1) == f"softmax: cpu ({said})"
    assert fastformer.explain(F.softmax, large.requires_grad_(), -1) == f"softmax: torch ({said})"
    assert backends.is_small("softmax", small) and not backends.is_small("softmax", large)
    assert fastformer.explain(F.softmax, large.bfloat16(), -1).startswith("softmax: torch (no measurement")
    heads = torch.ones(1, 2, 3, 4)
    assert "ours is never faster" in fastformer.explain(F.rotary, heads, heads, torch.ones(3, 2), torch.ones(3, 2))
    assert fastformer.explain(F.rms_norm, small, (33,)).startswith("rms_norm: torch (tuned")
    said = "ours is faster with gradients alone, from 4 elements on"
    assert said in fastformer.explain(F.rms_norm, torch.ones(2, 2, requires_grad=True), (2,))


@needs_library
@pytest.mark.parametrize(("least", "ours"), [((10**6, NEVER), True), ((NEVER, NEVER), False)])
def test_compiled_code_takes_ours_unless_it_never_is_faster(
    least: tuple[int, int], ours: bool, tuned: Callable[..., None]
) -> None:
    tuned(ENTRY._replace(least=least))
    called: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(lambda x: F.softmax(x, -1), backend=look, fullgraph=True)(torch.ones(2, 3))
    assert any("fastformer" in name for name in called) is ours


@needs_library
def test_the_table_is_that_of_the_threads_that_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {
        threads: Table(MACHINE, f"day {threads}", (ENTRY._replace(least=(50 * threads,) * 2),)) for threads in (1, 2)
    }
    monkeypatch.setattr(backends, "TUNED", tables)
    for name in ("FASTER", "_SMALL", "_decided", "_threads"):  # which are given back at the end
        monkeypatch.setattr(backends, name, getattr(backends, name))
    x, before = torch.ones(5, 15), torch.get_num_threads()
    try:
        for threads, kernel in ((1, "cpu"), (2, "torch"), (1, "cpu")):
            torch.set_num_threads(threads)
            assert backends.is_small("softmax", x) is (kernel == "torch")
            assert backends.choose("softmax", x) == kernel
            said = f"tuned on this machine day {threads}: ours is faster from {50 * threads} elements on"
            assert fastformer.explain(F.softmax, x, -1).startswith(f"softmax: {kernel} ({said}")
        torch.set_num_threads(3)
        assert "tuned" not in fastformer.explain(F.softmax, x, -1)
        torch.set_num_threads(1)
        assert backends.choose("softmax", x) == "cpu"  # without is_small before it
    finally:
        torch.set_num_threads(before)


def test_tables_by_threads() -> None:
    def table(**changes: object) -> Table:
        return Table(tuning.cpu("avx2", 2) | changes, "2026-01-31", (ENTRY,))

    others = [table(level="avx512"), table(torch="1.0"), TABLE, Table({"device": "cuda"}, "", ()), Table({}, "", ())]
    assert tuning.by_threads([*others, table(), table(threads=4)], "avx2") == {2: table(), 4: table(threads=4)}


@needs_library
def test_a_broken_kernel_is_not_chosen_where_torch_has_no_function_either(tuned: Callable[..., None]) -> None:
    tuned(ENTRY._replace(least=(NEVER, NEVER), broken=True))
    x = torch.ones(5, 5)
    said = "softmax: torch (tuned on this machine 2026-01-31: ours had wrong answers, or couldn't run)"
    assert fastformer.explain(F.softmax, x, is_causal=True) == said
    torch.testing.assert_close(F.softmax(x, is_causal=True)[1], torch.tensor([0.5, 0.5, 0, 0, 0]))
    with fastformer.backend("cpu"):
        assert fastformer.explain(F.softmax, x, -1) == "softmax: cpu (requested)"


def test_a_gpus_table_gives_the_kernel(tuned: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON", True)
    monkeypatch.setattr(backends, "CUDA_DEVICES", {"cuda"})
    tuned(Entry("softmax", FP32, "cuda", (100, 200), "2x"), Entry("rotary", FP32, "triton", (0, 0), "3x"))
    on_gpu = types.SimpleNamespace(dtype=FP32, is_cpu=False, device=torch.device("cuda"))
    for elements, record, kernel in (
        (99, False, "torch"),
        (100, False, "cuda"),
        (100, True, "torch"),
        (200, True, "cuda"),
    ):
        on_gpu.numel = lambda elements=elements: elements
        assert backends.choose("softmax", on_gpu, record=record) == kernel
    assert backends.decide("rotary", "cuda", FP32, "auto").kernel == "triton"
    assert backends.decide("layer_norm", "cuda", FP32, "auto").kernel == "torch"
    assert backends.decide("rotary", "mps", FP32, "auto").kernel == "torch"
    assert backends.preferred("softmax", torch.empty(2, 3, device="meta")) == "cuda"
    # a kernel that has no such dtype; forms of an operation run its operators; what torch lacks is the same kernel's
    tuned(Entry("attention", FP32, "cuda", (0, 0), "2x"), Entry("rms_norm", FP32, "cuda", (0, 0), "2x"))
    assert backends.decide("attention", "cuda", FP32, "auto").kernel == "torch"
    assert "not torch.float32" in backends.decide("attention", "cuda", FP32, "auto").reason
    assert backends.preferred("attention", torch.empty(2, 3, device="meta")) == "triton"
    assert backends.preferred("layer_norm", torch.empty(2, 3, device="meta")) == "cuda"
    assert backends.decide("rms_norm", "cuda", FP32, "auto", torch_lacks="this").kernel == "cuda"
    tuned(Entry("rotary", FP32, "triton", (0, 0), "3x"))
    monkeypatch.setattr(backends, "TRITON", False)
    assert backends.decide("rotary", "cuda", FP32, "auto") == ("torch", "Triton is not installed")


def test_gpus_of_one_kind_have_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["H200", "H200"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    machine = tuning.gpu()
    assert machine["name"] == "H200" and machine["device"] == "cuda" and machine["torch"] == torch.__version__
    names[1] = "A100"
    assert tuning.gpu() is None


def test_env_names_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> str:
        assert cli.main(["env"]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tuning "))

    assert "no table is used (FASTFORMER_TUNING=off)" in said()
    monkeypatch.setenv("FASTFORMER_TUNING", "/some/file")
    none = "no table of this machine, these versions and so many threads in /some/file: `fastformer tune` measures one"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here, gpu = tuning.cpu(backends.CPU_LEVEL, torch.get_num_threads()), {**tuning.cpu("", 0), "device": "cuda"}
    del gpu["threads"], gpu["level"]
    on_gpu = Table(gpu | {"name": "H200"}, "2026-03-01", (ENTRY,))
    monkeypatch.setattr(backends, "TABLES", [TABLE, on_gpu])
    assert none in said()
    monkeypatch.setattr(backends, "TABLES", [TABLE._replace(machine=here), on_gpu])
    assert said().endswith("/some/file: cpu of 2026-01-31, 2 entries")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H200")
    assert said().endswith("/some/file: cpu of 2026-01-31, 2 entries; cuda of 2026-03-01, 1 entries")
