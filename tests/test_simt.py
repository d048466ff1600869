"""The emulator of tests/simt: right kernels run as they should, and each planted bug is found, named and located.

The kernels are those of tests/simt/kernels; "kernel: bug" is the kernel with that bug.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace

import pytest
import simt
import torch
from simt import every_kernel
from tensor_layouts import CopyAtom, Layout, atoms_nv, size

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="needs a C++ compiler")

KERNELS = Path(__file__).parent / "simt" / "kernels"
SEEDS = [None, *range(20)]


@pytest.fixture
def emulator() -> Iterator[ModuleType]:
    module = simt.load()
    module.set_patience(accesses=10_000, synchronisations=1000, seconds=0.2)
    yield module
    module.set_seed(None)
    module.set_device()
    module.set_patience()


def run(
    emulator: ModuleType,
    name: str,
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
    *numbers: int,
    use: str = "write",
) -> None:
    """`inputs` may be read, `outputs` read and written; with `use` "fill" nobody has written them yet."""
    tensors = [(tensor, "read") for tensor in inputs] + [(tensor, use) for tensor in outputs]
    sized = [(tensor.data_ptr(), tensor.numel() * tensor.element_size(), how) for tensor, how in tensors]
    emulator.run(name, sized, numbers)


def line(place: str) -> str:
    """file.cu:line of the only line of tests/simt/kernels/file.cu that contains the text after "file.cu: "."""
    file, _, text = place.partition(": ")
    found = [i for i, source in enumerate((KERNELS / file).read_text().splitlines(), 1) if text in source]
    assert len(found) == 1, f"{place} is on lines {found}"
    return f"{file}:{found[0]}"


class Runs:
    """Each kernel with arguments of its own, and what must come out."""

    @staticmethod
    def block_sum(emulator: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        x, out = torch.randn(3, 301), torch.zeros(3)
        run(emulator, name, [x], [out], 3, 301, 128)
        return out, x.sum(1)

    @staticmethod
    def copy_reversed(emulator: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(2, 5, 64 * 4)
        out = torch.zeros_like(x)
        inputs, outputs = ([], [x, out]) if name.endswith("source written") else ([x], [out])
        run(emulator, name, inputs, outputs, 2, 5, 64)
        return out, x.flip(2)

    @staticmethod
    def product(emulator: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.float16 if name.endswith("of halves") else torch.bfloat16
        a, b, out = torch.randn(64, 80, dtype=dtype), torch.randn(48, 80, dtype=dtype), torch.zeros(64, 48)
        run(emulator, name, [a, b], [out], 64, 48, 80)
        return out, (a.double() @ b.double().T).float()

    @staticmethod
    def pipeline(emulator: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(5, 32)
        out = torch.zeros_like(x)
        run(emulator, name, [x], [out], 5)
        return out, 2 * x.flip(1)

    @staticmethod
    def warp_scan(emulator: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        x, count = torch.randn(2, 3, 32), torch.zeros(1, dtype=torch.int32)
        out = torch.zeros_like(x)
        run(emulator, name, [x], [out, count], 2, 96)
        assert count.item() == (x > 0).sum()
        return out, x.cumsum(2)

    @staticmethod
    def accesses(emulator: ModuleType, name: str) -> None:
        x, count = torch.randn(2 * 64 * 8).bfloat16(), torch.zeros(1, dtype=torch.int32)
        run(emulator, name, [x], [torch.zeros_like(x), count], 2, 64)

    @staticmethod
    def mistakes(emulator: ModuleType, name: str) -> None:
        run(emulator, name, [torch.zeros(64, dtype=torch.int32)], [torch.zeros(64, dtype=torch.int32)], 6)

    loop = memory = local = halves = heads = mistakes


RIGHT = {
    "block_sum": Runs.block_sum,
    "copy_reversed": Runs.copy_reversed,
    "product": Runs.product,
    "product of halves": Runs.product,
    "pipeline": Runs.pipeline,
    "warp_scan": Runs.warp_scan,
}


def expect_silence(
    emulator: ModuleType, kernel: Callable[[], tuple[torch.Tensor, torch.Tensor]], rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Runs a kernel, which gives (output, expected), on every schedule: it is right, and nothing is found."""
    for seed in SEEDS:
        emulator.set_seed(seed)
        output, expected = kernel()
        torch.testing.assert_close(output, expected, rtol=rtol, atol=atol)
        assert emulator.findings() == []


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernel_is_right_and_silent_on_every_schedule(emulator: ModuleType, name: str) -> None:
    expect_silence(emulator, lambda: RIGHT[name](emulator, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["neighbours", "atomically", "packs"])
def test_right_access_is_silent(emulator: ModuleType, name: str) -> None:
    Runs.accesses(emulator, name)


@pytest.mark.parametrize("name", ["memory", "memory by a struct"])
def test_arguments_by_value_may_be_read(emulator: ModuleType, name: str) -> None:
    numbers, out = torch.arange(32, dtype=torch.int32), torch.full((32,), -1, dtype=torch.int32)
    run(emulator, name, [numbers], [out])
    copied = torch.where(numbers < 4, numbers, 0)
    torch.testing.assert_close(out, copied if name == "memory" else copied + numbers, rtol=0, atol=0)


THREADS, STEPS, BYTES = 96, 5, 64
Access = tuple[int, bool, range]  # step, whether it writes, bytes


def random_program(random: Random) -> tuple[torch.Tensor, list[list[Access]], dict[int, set[int]]]:
    """What each thread does at each step, its accesses, and which warps meet at which steps."""
    program = torch.zeros(STEPS, THREADS, dtype=torch.int32)
    accesses: list[list[Access]] = [[] for _ in range(THREADS)]
    meetings: dict[int, set[int]] = {}
    busy = random.sample(range(THREADS), 4)
    for step in range(STEPS):
        kind = random.choice(["access", "access", "block", "warps"])
        if kind == "block":
            program[step] = 3
            meetings[step] = {-1}
        elif kind == "warps":
            meetings[step] = set(random.sample(range(THREADS // 32), 2))
            for warp in meetings[step]:
                program[step, warp * 32 : warp * 32 + 32] = 4
        else:
            for thread in random.sample(busy, random.randint(1, 3)):
                log_bytes, writes = random.choice([0, 1, 2, 4]), random.random() < 0.4
                address = random.randrange(0, BYTES // 2, 1 << log_bytes)
                program[step, thread] = (2 if writes else 1) + 8 * log_bytes + 64 * address
                accesses[thread].append((step, writes, range(address, address + (1 << log_bytes))))
    return program, accesses, meetings


def has_race(accesses: list[list[Access]], meetings: dict[int, set[int]]) -> bool:
    """Two threads' accesses race if they share a byte, one writes, and neither block nor warp meets in between."""
    for thread in range(THREADS):
        for other in range(thread):
            for step, writes, touched in accesses[thread]:
                for other_step, other_writes, other_touched in accesses[other]:
                    if not (writes or other_writes) or not set(touched) & set(other_touched):
                        continue
                    between = range(min(step, other_step) + 1, max(step, other_step))
                    met = [meetings.get(when, set()) for when in between]
                    same_warp = thread // 32 == other // 32
                    if not any(-1 in warps or (same_warp and thread // 32 in warps) for warps in met):
                        return True
    return False


@pytest.mark.parametrize("seed", range(4))
def test_a_race_is_reported_exactly_where_there_is_one(emulator: ModuleType, seed: int) -> None:
    random, racy = Random(seed), 0
    for _ in range(50):
        program, accesses, meetings = random_program(random)
        out = torch.zeros(THREADS, dtype=torch.int32)
        emulator.set_seed(random.choice([None, random.randrange(1000)]))
        expected = has_race(accesses, meetings)
        racy += expected
        if expected:
            with pytest.raises(RuntimeError, match="race: "):
                run(emulator, "program", [program], [out], THREADS, STEPS)
        else:
            run(emulator, "program", [program], [out], THREADS, STEPS)
    assert 5 < racy < 45


@dataclass
class Planted:
    """A bug and the first report it must bring: its kind, where and in which thread, and the other side's."""

    name: str
    kind: str
    thread: int
    place: str
    other_thread: int = -1
    other_place: str = ""
    block: int = 0
    address: str = ""

    def __str__(self) -> str:
        return self.name


def expect_report(
    emulator: ModuleType, bug: Planted, kernel: Callable[[ModuleType, str], object], random_orders: int = 0
) -> None:
    """Runs the kernel with the bug: what is found on the ordered schedule, and that something is on so many others."""
    for seed in range(random_orders):
        emulator.set_seed(seed)
        with pytest.raises(RuntimeError, match="simt: "):
            kernel(emulator, bug.name)
    emulator.set_seed(None)
    with pytest.raises(RuntimeError, match=f"  {bug.kind}: "):
        kernel(emulator, bug.name)
    found = [
        finding
        for finding in emulator.findings()
        if finding.kind == bug.kind and finding.thread == bug.thread and line(bug.place) in finding.lines
    ]
    assert found, emulator.findings()
    assert found[0].block == bug.block
    assert found[0].other_thread == bug.other_thread
    assert bug.address in found[0].address
    if bug.other_place:
        assert line(bug.other_place) in found[0].other_lines


SUM_PARTIALS = "block_sum.cu: partial[thread] += partial[thread + half]"
CP_ASYNC = "copy_reversed.cu: ptx::cp_async<16>("
READ_TILE = "copy_reversed.cu: = buffer[width - 1 - i]"
READ_BUFFER = "pipeline.cu: out[tile * kWarp + lane] ="
WAIT_FULL = "pipeline.cu: ptx::barrier_sync(1 + tile % 2"
SHUFFLE = "warp_scan.cu: __shfl_up_sync("
FIRST_BARRIER, SECOND_BARRIER = (
    "warp_scan.cu: __syncthreads();  // of the first",
    "warp_scan.cu: __syncthreads();  // of the o",
)

BUGS = [
    Planted("block_sum: no barrier", "uninitialised", 0, SUM_PARTIALS, address="shared + 256 "),
    Planted(
        "block_sum: no barrier",
        "race",
        64,
        "block_sum.cu: partial[thread + (kBug",
        0,
        SUM_PARTIALS,
        address="shared + 256",
    ),
    Planted("block_sum: no last barrier", "race", 127, "block_sum.cu: out[blockIdx.x] =", 0, SUM_PARTIALS),
    Planted(
        "block_sum: column beyond",
        "out of bounds",
        45,
        "block_sum.cu: sum += row[i]",
        block=2,
        address="argument 0 + 3612 ",
    ),
    Planted(
        "block_sum: shared beyond",
        "out of bounds",
        127,
        "block_sum.cu: partial[thread + (kBug",
        address="shared + 512 (of 512",
    ),
    Planted("copy_reversed: no wait", "copy under way", 0, READ_TILE, 63, CP_ASYNC, address="shared + 1020 "),
    Planted("copy_reversed: group too many", "copy under way", 0, READ_TILE, 63, CP_ASYNC, address="shared + 1020 "),
    Planted("copy_reversed: no barrier after wait", "race", 13, CP_ASYNC, 11, READ_TILE),
    Planted("copy_reversed: no barrier before reuse", "race", 13, CP_ASYNC, 11, READ_TILE),
    Planted(
        "copy_reversed: source written", "copy under way", 0, "copy_reversed.cu: const_cast<float*>(row)", 0, CP_ASYNC
    ),
    Planted("copy_reversed: misaligned", "misaligned", 0, CP_ASYNC, address="argument 0 + 4 "),
    Planted(
        "product: no wait", "copy under way", 0, "product.cu: (fragment_a, tile_a", 0, "product.cu: ptx::cp_async<16>("
    ),
    Planted(
        "product: no barrier before reuse",
        "race",
        0,
        "product.cu: ptx::cp_async<16>(",
        32,
        "product.cu: (fragments_b, tile_b",
        address="shared + 1536 ",
    ),
    Planted("pipeline: two blocks", "race", 32, READ_BUFFER, 32, READ_BUFFER, block=1, address="argument 1 + 0 "),
    Planted("pipeline: never empty", "deadlock", 63, WAIT_FULL),
    Planted(
        "pipeline: not awaited full", "race", 32, READ_BUFFER, 31, "pipeline.cu: = 2.0f * in", address="shared + 124 "
    ),
    Planted("pipeline: not awaited empty", "race", 0, "pipeline.cu: = 2.0f * in", 63, READ_BUFFER),
    Planted("pipeline: wrong count", "bad call", 32, WAIT_FULL),
    Planted(
        "warp_scan: no syncwarp", "race", 1, "warp_scan.cu: again += scratch[i]", 0, "warp_scan.cu: scratch[lane] = x"
    ),
    Planted("warp_scan: missing lane", "divergence", 5, "warp_scan.cu: __syncwarp()", 0, SHUFFLE),
    Planted("warp_scan: ended lane", "divergence", 8, SHUFFLE),
    Planted("warp_scan: divergent", "divergence", 32, SECOND_BARRIER, 0, FIRST_BARRIER),
    Planted("warp_scan: lane past mask", "bad call", 3, SHUFFLE),
    Planted(
        "same by blocks",
        "race",
        0,
        "accesses.cu: out[threadIdx.x] = in[at]",
        0,
        "accesses.cu: out[threadIdx.x] = in[at]",
        block=1,
    ),
    Planted("packs one further", "misaligned", 0, "accesses.cu: load<8>(in + at * 8 + 1)", address="argument 0 + 2 "),
    Planted(
        "writes input", "written where only reads are allowed", 0, "accesses.cu: const_cast", address="argument 0 + 0 "
    ),
    Planted("loop: on memory", "endless", 0, "mistakes.cu: const_cast<const volatile"),
    Planted("loop: without an access", "endless", 0, "mistakes.cu: // stays odd"),
    Planted("loop: on a barrier", "endless", 0, "mistakes.cu: __syncthreads();  // without end"),
    Planted("loop: on a vote", "endless", 0, "mistakes.cu: while (__any_sync"),
    Planted("memory: host's stack", "out of bounds", 0, "mistakes.cu: // of a pointer"),
    Planted("memory: host's heap", "out of bounds", 0, "mistakes.cu: // of a pointer"),
    Planted("memory: struct of host's stack", "out of bounds", 0, "mistakes.cu: += from.data["),
    Planted("memory: struct of host's heap", "out of bounds", 0, "mistakes.cu: += from.data["),
    Planted("memory: neighbour's", "out of bounds", 1, "mistakes.cu: = *shared[0]", address="local memory of thread 0"),
    Planted("local: array", "out of bounds", 4, "mistakes.cu: = sums[thread]"),
    Planted("local: pack", "out of bounds", 4, "mistakes.cu: = pack.values[thread]"),
    Planted("local: cast", "misaligned", 1, "mistakes.cu: // of a cast pointer", address="argument 0 + 4 "),
    Planted("halves: one", "deadlock", 63, "mistakes.cu: if constexpr (kHalf == Half::one) __syncthreads()"),
    Planted("halves: one, the other ends", "divergence", 0, "mistakes.cu: // of one half"),
    Planted("halves: each its own", "bad call", 16, "mistakes.cu: // another for each half"),
    Planted("heads: read", "uninitialised", 0, "mistakes.cu: // to what was there"),
    Planted("reads output", "race", 1, "accesses.cu: out[at] = out[at + 1]", 0, "accesses.cu: out[at] = out[at + 1]"),
]


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bug_is_found_on_the_ordered_schedule(emulator: ModuleType, bug: Planted) -> None:
    expect_report(emulator, bug, getattr(Runs, bug.name.split(":")[0], Runs.accesses))


def test_ldmatrix_reads_for_lanes_that_did_not_name_the_row(emulator: ModuleType) -> None:
    rows, registers = torch.zeros(32, 8, dtype=torch.int16), torch.zeros(32, 8, dtype=torch.int16)
    with pytest.raises(RuntimeError, match="race: thread 1 of block 0 read"):
        run(emulator, "ldmatrix: no syncwarp", [rows], [registers])
    assert line("fragments.cu: ldmatrix_x4<kTransposed>(to") in emulator.findings()[0].lines


def test_output_that_nobody_wrote_is_reported_when_read(emulator: ModuleType) -> None:
    x, out, count = torch.randn(1024).bfloat16(), torch.empty(1024).bfloat16(), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"uninitialised: thread 0 of block 0 read 2 bytes at argument 1 \+ 2 "):
        run(emulator, "reads output", [x], [out, count], 2, 64, use="fill")


def test_output_of_an_earlier_launch_is_written(emulator: ModuleType) -> None:
    x, count = torch.randn(128).bfloat16(), torch.zeros(1, dtype=torch.int32)
    between, out = torch.empty_like(x), torch.empty_like(x)
    run(emulator, "two launches", [x], [between, count, out], 2, 64, use="fill")
    torch.testing.assert_close(out, x, rtol=0, atol=0)


def test_deadlock_says_what_each_thread_waits_for(emulator: ModuleType) -> None:
    with pytest.raises(RuntimeError) as error:
        Runs.pipeline(emulator, "pipeline: never empty")
    empty, full = line("pipeline.cu: ptx::barrier_sync(3 + tile % 2"), line(WAIT_FULL)
    assert f"threads 0-31 wait in barrier_sync of barrier 3 at {empty}" in str(error.value)
    assert f"threads 32-63 wait in barrier_sync of barrier 1 at {full}" in str(error.value)


def test_findings_need_no_addr2line(emulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match=r"divergence: thread 32 of block 0 in __syncthreads at 0x\w+; thread 0 "):
        Runs.warp_scan(emulator, "warp_scan: divergent")
    assert len(emulator.kernels()) >= len(emulator.launched()) > 0
    assert emulator.findings()[0].kernel in emulator.kernels().values()


@pytest.mark.parametrize("parameter, refused", [("const int&", True), ("int", False)])
def test_parameters_that_are_references_are_refused(tmp_path: Path, parameter: str, refused: bool) -> None:
    source = tmp_path / "launch.cpp"
    source.write_text(
        f'#include "simt.h"\n__global__ void kernel({parameter}) {{}}\n'
        "void run(int x) { simt::launch(&kernel, 1, 1, 1, 0, x); }\n"
    )
    command = [simt.compiler(), "-std=c++20", "-fsyntax-only", f"-I{KERNELS.parent}", str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert ("can't refer to the host's memory" in result.stderr) == refused, result.stderr
    assert (result.returncode != 0) == refused


def test_shared_memory_is_limited_to_the_device_s(emulator: ModuleType) -> None:
    emulator.set_device(shared_bytes=512)
    Runs.block_sum(emulator, "block_sum")
    emulator.set_device(shared_bytes=511)
    with pytest.raises(RuntimeError, match="more shared memory than a block can have"):
        Runs.block_sum(emulator, "block_sum")


def test_what_was_launched_is_known(emulator: ModuleType) -> None:
    Runs.accesses(emulator, "packs")
    launched = [name for address, name in emulator.kernels().items() if address in emulator.launched()]
    assert any(name.startswith("touch<(What)3>(") for name in launched)


@pytest.mark.parametrize(
    "launched, option, failed", [({1}, {}, True), ({1, 2}, {}, False), ({1}, {"keyword": "softmax"}, False)]
)
def test_a_whole_run_fails_if_a_kernel_was_not_launched(
    monkeypatch: pytest.MonkeyPatch, launched: set[int], option: dict[str, str], failed: bool
) -> None:
    module = SimpleNamespace(kernels=lambda: {1: "launched", 2: "forgotten"}, launched=lambda: launched)
    monkeypatch.setitem(sys.modules, "fastformer_simt", module)
    monkeypatch.setattr(every_kernel, "_launched", set())
    monkeypatch.setattr(every_kernel, "_missing", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = SimpleNamespace(**{"keyword": "", "markexpr": "", "collectonly": False, **option})
    config = SimpleNamespace(args_source=pytest.Config.ArgsSource.TESTPATHS, args=[], option=options)
    session = SimpleNamespace(config=config, testsfailed=0, exitstatus=0)
    every_kernel.pytest_sessionfinish(session)
    assert (session.exitstatus != 0) == failed
    assert every_kernel._missing == (["forgotten"] if failed else [])


def test_wrong_fragments_give_a_wrong_product(emulator: ModuleType) -> None:
    output, expected = Runs.product(emulator, "product: wrong fragment")
    assert (output - expected).abs().max() > 1


def test_a_launch_after_a_report_starts_afresh(emulator: ModuleType) -> None:
    with pytest.raises(RuntimeError):
        Runs.block_sum(emulator, "block_sum: column beyond")
    Runs.block_sum(emulator, "block_sum")
    assert emulator.findings() == []


@pytest.mark.parametrize("name, dtype", [("mma of bfloat16", torch.bfloat16), ("mma of halves", torch.float16)])
def test_mma_has_the_fragments_of_tensor_layouts(emulator: ModuleType, name: str, dtype: torch.dtype) -> None:
    atom = atoms_nv.SM80_16x8x16_F32BF16BF16F32_TN if dtype == torch.bfloat16 else atoms_nv.SM80_16x8x16_F32F16F16F32_TN
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)

    def fragments(layout: Layout, matrix: torch.Tensor) -> torch.Tensor:  # [lane, value]
        by_columns = matrix.T.reshape(-1)
        return by_columns[
            torch.tensor([[layout(lane, value) for value in range(size(layout) // 32)] for lane in range(32)])
        ]

    d = fragments(atom.c_layout, c)
    run(
        emulator,
        name,
        [fragments(atom.a_layout, a), fragments(atom.b_layout, b)],
        [d],
    )
    expected = (a.double() @ b.double().T + c.double()).float()
    torch.testing.assert_close(d, fragments(atom.c_layout, expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name, atom",
    [("ldmatrix", atoms_nv.SM75_U32x4_LDSM_N), ("ldmatrix transposed", atoms_nv.SM75_U16x8_LDSM_T)],
    ids=["plain", "transposed"],
)
def test_ldmatrix_has_the_layout_of_tensor_layouts(emulator: ModuleType, name: str, atom: CopyAtom) -> None:
    rows = torch.arange(32 * 8, dtype=torch.int16)  # as bits; lane l gives the address of elements 8 l .. 8 l + 7
    registers = torch.zeros(32, 8, dtype=torch.int16)
    run(emulator, name, [rows], [registers])
    for lane in range(32):
        for value in range(8):
            bit = atom.dst_layout_bits(lane, value * 16)
            assert registers[lane, value] == rows[bit // 16], (lane, value)
