"""The emulator's clusters: right kernels run as they should on every schedule, and each planted bug is found.

The kernels are those of tests/simt/kernels/cluster*.cu; "kernel: bug" is the kernel with that bug.
"""

from __future__ import annotations

from itertools import combinations
from random import Random
from types import ModuleType

import pytest
import simt
import torch
from test_simt import Planted, expect_report, expect_silence, line, run

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="needs a C++ compiler")

CLUSTERS, ROWS, WIDTH, THREADS = 2, 3, 80, 64


def normalise(
    hopper: ModuleType, name: str, blocks: int = 2, clusters: int = CLUSTERS, threads: int = THREADS
) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(ROWS, clusters, blocks, WIDTH) + 0.1
    out, shifted = torch.zeros_like(x), torch.zeros_like(x)
    run(hopper, name, [x], [out, shifted], blocks, clusters, ROWS, WIDTH, threads)
    return torch.stack([out, shifted]), torch.stack([x / x.sum((2, 3), keepdim=True), x.roll(-1, 2)])


def read(hopper: ModuleType, name: str, blocks: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.zeros(4, THREADS)
    run(hopper, name, [], [torch.zeros(0), out], blocks, CLUSTERS, ROWS, WIDTH, THREADS)
    return out, torch.tensor([1.0, 0, 3, 0])[:, None].expand(4, THREADS)


def pass_on(hopper: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    out, passed = torch.zeros(8), torch.zeros(8 * 32)
    run(hopper, name, [], [torch.zeros(0), out, passed])
    return passed, torch.full((8 * 32,), 3.0)


def run_by_name(hopper: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if name.startswith("cluster read"):
        return read(hopper, name)
    if name.startswith("cluster pass"):
        return pass_on(hopper, name)
    return normalise(hopper, name)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_right_kernel_is_right_and_silent_on_every_schedule(hopper: ModuleType, blocks: int) -> None:
    expect_silence(hopper, lambda: normalise(hopper, "cluster", blocks), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cluster read", "cluster read, after a barrier", "cluster pass"])
def test_right_access_is_silent_on_every_schedule(hopper: ModuleType, name: str) -> None:
    expect_silence(hopper, lambda: run_by_name(hopper, name))


def test_the_largest_cluster_runs(hopper: ModuleType) -> None:
    output, expected = normalise(hopper, "cluster", 8, 1, 1024)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


TELL, READ_SUMS, READ_TILE = (
    "cluster.cu: // to each block",
    "cluster.cu: // of each block",
    "cluster.cu: // of the neighbour",
)
LOAD, OF_NEXT = "cluster.cu: mine[i] = in[begin + i]", "cluster.cu: : ptx::of_block(mine, next);"
FIRST, READ_SECOND = "cluster.cu: ptx::cluster_sync();  // the first", "cluster.cu: // of block 1"

BUGS = [
    Planted("cluster: no first sync", "block not running", 1, TELL, address="shared + 0 (of 352 bytes) of block 1 "),
    Planted("cluster: no sync", "uninitialised", 0, READ_SUMS, address="shared + 4 (of 352 bytes) of block 0 "),
    Planted("cluster: no sync", "race", 0, TELL, 0, READ_SUMS, block=1, address="shared + 4 "),
    Planted("cluster: block's barrier", "race", 0, READ_SUMS, 0, TELL, address="shared + 4 "),
    Planted("cluster: no last sync", "block not running", 0, READ_TILE, block=1, address="shared + 32 "),
    Planted("cluster: no sync before reuse", "race", 0, READ_TILE, 0, LOAD, block=1, address="of block 0 "),
    Planted("cluster: no sync before reuse", "race", 0, LOAD, 0, READ_TILE, block=1, address="of block 1 "),
    Planted("cluster: wrong rank", "bad call", 0, OF_NEXT, block=1),
    Planted("cluster: wrong slot", "race", 0, TELL, 0, TELL, block=1, address="shared + 0 (of 352 bytes) of block 0 "),
    Planted("cluster: not shared", "bad call", 0, "cluster.cu: ptx::of_block(of, thread)"),
    Planted(
        "cluster: beyond shared", "out of bounds", 15, READ_TILE, address="shared + 352 (of 352 bytes) of block 1 "
    ),
    Planted("cluster: unwritten", "uninitialised", 0, READ_SUMS, address="shared + 8 (of 352 bytes) of block 1 "),
    Planted("cluster: thread ended", "divergence", 0, FIRST),
    Planted("cluster: block ended", "divergence", 0, FIRST),
    Planted("cluster: half warps", "divergence", 16, FIRST, 0, "cluster.cu: // of half a warp"),
    Planted("cluster: not all", "deadlock", 31, "cluster.cu: // of one warp", block=1),
    Planted("cluster: copies to peer", "bad call", 0, "cluster.cu: ptx::cp_async<4>"),
    Planted(
        "cluster read: too late", "block not running", 0, READ_SECOND, address="shared + 0 (of 256 bytes) of block 1 "
    ),
    Planted(
        "cluster pass: to another", "race", 0, "cluster.cu: // of a block before", 0, "cluster.cu: = 3.0f", block=4
    ),
]


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bug_is_found_on_every_schedule(hopper: ModuleType, bug: Planted) -> None:
    expect_report(hopper, bug, run_by_name, random_orders=5)


def test_another_blocks_numbers_are_wrong(hopper: ModuleType) -> None:
    output, expected = normalise(hopper, "cluster: wrong block")
    assert (output[1] - expected[1]).abs().max() > 0.1


def test_deadlock_says_what_each_block_waits_for(hopper: ModuleType) -> None:
    with pytest.raises(RuntimeError) as error:
        normalise(hopper, "cluster: not all")
    message, one_warp = str(error.value), line("cluster.cu: // of one warp")
    assert f"threads 0-63 of block 0 wait in cluster_sync at {line(FIRST)}" in message
    assert f"threads 32-63 of block 1 wait in cluster_sync at {line(FIRST)}" in message
    assert f"threads 0-31 of block 1 wait in barrier_sync of barrier 1 at {one_warp}" in message


@pytest.mark.parametrize("name", ["cluster: not all", "cluster: thread ended"])
def test_a_launch_after_a_report_starts_afresh(hopper: ModuleType, name: str) -> None:
    with pytest.raises(RuntimeError):
        normalise(hopper, name, 8)
    for blocks in (8, 1, 2):
        output, expected = normalise(hopper, "cluster", blocks)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


BLOCKS, STEPS = 3, 6
Access = tuple[int, int, bool, bool, tuple[int, range]]  # thread, step, whether it writes and is atomic, rank and bytes


def random_program(random: Random) -> tuple[torch.Tensor, list[Access], dict[int, list[range]]]:
    """What each thread does at each step, its accesses, and which threads meet at which steps."""
    program = torch.zeros(STEPS, BLOCKS * THREADS, dtype=torch.int32)
    accesses: list[Access] = []
    meetings: dict[int, list[range]] = {}
    busy = random.sample(range(BLOCKS * THREADS), 4)
    # Of a thread's read and atomic access of the same bytes the emulator remembers one.
    ways = random.choice([[1, 1, 2], [2, 3, 3]])
    for step in range(STEPS):
        kind = random.choice([0, 0, 0, 4, 5, 6])
        if kind == 0:
            for thread in random.sample(busy, random.randint(1, 3)):
                how, rank = random.choice(ways), random.randrange(BLOCKS)
                log_bytes = 2 if how == 3 else random.choice([0, 2, 4])
                address = random.randrange(0, 32, 1 << log_bytes)
                program[step, thread] = how + 8 * log_bytes + 64 * address + 4096 * rank
                touched = (rank, range(address, address + (1 << log_bytes)))
                accesses.append((thread, step, how > 1, how == 3, touched))
        else:
            size = {4: 32, 5: THREADS, 6: BLOCKS * THREADS}[kind]
            firsts = range(0, BLOCKS * THREADS, size)
            meetings[step] = [range(i, i + size) for i in random.sample(firsts, random.randint(1, len(firsts)))]
            for threads in meetings[step]:
                program[step, threads] = kind
    return program, accesses, meetings


def has_race(accesses: list[Access], meetings: dict[int, list[range]]) -> bool:
    """Two threads' accesses race if they share a byte, one writes, not both are atomic, and the two never meet."""
    for (thread, step, writes, atomic, (rank, touched)), (other, later, *how, at) in combinations(accesses, 2):
        if thread == other or not (writes or how[0]) or (atomic and how[1]):
            continue
        if rank != at[0] or not set(touched) & set(at[1]):
            continue
        between = [threads for when in range(step + 1, later) for threads in meetings.get(when, [])]
        if not any(thread in threads and other in threads for threads in between):
            return True
    return False


@pytest.mark.parametrize("seed", range(4))
def test_a_race_is_reported_exactly_where_there_is_one(hopper: ModuleType, seed: int) -> None:
    random, racy = Random(seed), 0
    for _ in range(50):
        program, accesses, meetings = random_program(random)
        out = torch.zeros(BLOCKS * THREADS, dtype=torch.int32)
        hopper.set_seed(random.choice([None, random.randrange(1000)]))
        expected = has_race(accesses, meetings)
        racy += expected
        if expected:
            with pytest.raises(RuntimeError, match="race: "):
                run(hopper, "cluster program", [program], [out], BLOCKS, THREADS, STEPS)
        else:
            run(hopper, "cluster program", [program], [out], BLOCKS, THREADS, STEPS)
    assert 5 < racy < 45


@pytest.mark.parametrize(
    "blocks, grid, threads, capability, refused",
    [
        (2, 4, 64, 90, ""),
        (1, 3, 33, 80, ""),
        (9, 9, 64, 90, "a cluster of 0 or more than 8 blocks"),
        (0, 2, 64, 90, "a cluster of 0 or more than 8 blocks"),
        (2, 3, 64, 90, "a grid that is not of whole clusters"),
        (2, 4, 64, 89, "a cluster on a device that has none"),
        (2, 4, 48, 90, "a cluster, and blocks that are not of whole warps"),
    ],
)
def test_launches_are_checked(
    hopper: ModuleType, blocks: int, grid: int, threads: int, capability: int, refused: str
) -> None:
    hopper.set_device(compute_capability=capability)
    if refused:
        with pytest.raises(RuntimeError, match=f"simt: a launch with {refused}"):
            run(hopper, "cluster launch", [], [], blocks, grid, threads)
    else:
        run(hopper, "cluster launch", [], [], blocks, grid, threads)
