"""The emulator's order between the blocks of a cluster: who arrives at an mbarrier of which block, who waits for it.

The kernels are those of tests/simt/kernels/cluster_messages.cu; "kernel: bug" is the kernel with that bug.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from random import Random
from types import ModuleType

import pytest
import simt
import torch
from test_simt import Planted, expect_report, expect_silence, run

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="needs a C++ compiler")


def run_by_name(hopper: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if name.startswith("box"):
        x, out = torch.randn(32), torch.zeros(32)
        run(hopper, name, [x], [out])
        return out, x
    out = torch.zeros(2)
    run(hopper, name, [], [out, torch.zeros(1)])
    return out, torch.tensor([3.0, 4.0])


@pytest.mark.parametrize("name", ["tell", "tell within the block", "box"])
def test_right_message_is_right_and_silent_on_every_schedule(hopper: ModuleType, name: str) -> None:
    expect_silence(hopper, lambda: run_by_name(hopper, name))


TOLD, WRITE = "cluster_messages.cu: // as told", "cluster_messages.cu: ->value = 3.0f"
TOLD_GLOBALLY, WRITE_GLOBALLY = "cluster_messages.cu: // in global memory", "cluster_messages.cu: told[0] = 4.0f"
ARRIVE, SEND = "cluster_messages.cu: ptx::mbarrier_arrive_at(&message.ready, 1)", "cluster_messages.cu: // to block 1"
OF_BLOCK_1 = "of block 1 of its cluster"

BUGS = [
    Planted("tell: not synced", "race", 1, TOLD, 33, WRITE, block=1, address=OF_BLOCK_1),
    Planted("tell: not synced", "race", 1, TOLD_GLOBALLY, 33, WRITE_GLOBALLY, block=1, address="argument 1 + 0 "),
    Planted("tell: by another", "race", 1, TOLD, 33, WRITE, block=1, address=OF_BLOCK_1),
    Planted("tell: by another", "race", 1, TOLD_GLOBALLY, 33, WRITE_GLOBALLY, block=1, address="argument 1 + 0 "),
    Planted("tell: relaxed within the block", "race", 1, TOLD, 33, WRITE, block=1, address=OF_BLOCK_1),
    Planted("tell: no last sync", "block not running", 33, WRITE, address=OF_BLOCK_1),
    Planted("tell: no mbarrier", "bad call", 33, ARRIVE),
    Planted("tell: twice", "bad call", 33, ARRIVE),
    Planted("box: block ended", "copy under way", 0, SEND, address=OF_BLOCK_1),
    Planted(
        "box: changed by other",
        "proxy",
        0,
        "cluster_messages.cu: ptx::tma_store(out",
        5,
        "cluster_messages.cu: // of the neighbour's box",
        block=1,
    ),
    Planted("box: registers", "divergence", 32, "cluster_messages.cu: // the last", block=1),
]


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bug_is_found_on_every_schedule(hopper: ModuleType, bug: Planted) -> None:
    expect_report(hopper, bug, run_by_name, random_orders=5)


BLOCKS, THREADS, STEPS = 3, 32, 30
READS, WRITES, ARRIVES, WAITS = range(1, 5)
Steps = dict[int, int]  # by thread


@dataclass
class Access:
    thread: int
    step: int
    writes: bool
    rank: int  # of the block whose number it is
    known: Steps  # until when it is ordered after each thread
    told: Steps  # the same if arrivals at other blocks released


def random_program(random: Random, racy: bool) -> tuple[torch.Tensor, list[Access]]:
    """What each thread does at each step; and its accesses. One races, at most."""
    as_told = random.random() < 0.5  # but wouldn't if arrivals at other blocks released
    program = torch.zeros(STEPS, BLOCKS * THREADS, dtype=torch.int32)
    busy = [*random.sample(range(THREADS), 2), THREADS, THREADS + 7, 2 * THREADS]
    known: dict[int, Steps] = {thread: {} for thread in busy}
    told: dict[int, Steps] = {thread: {} for thread in busy}
    arrived: list[tuple[int, int]] = []  # the step, also the mbarrier's number; and at which block
    released: dict[int, tuple[Steps, Steps]] = {}  # by that step
    accesses: list[Access] = []
    for step in range(STEPS):
        arriving = random.choice(busy) if random.random() < 0.8 else None
        before = list(arrived)
        for thread in busy:
            block = thread // THREADS
            here = [number for number, rank in before if rank == block]
            if thread == arriving:
                rank = random.choice([block, random.randrange(BLOCKS)])
                program[step, thread] = ARRIVES + 8 * step + 4096 * rank
                arrived.append((step, rank))
                released[step] = (
                    known[thread] | {thread: step} if rank == block else {},
                    told[thread] | {thread: step},
                )
            elif here and random.random() < 0.5:
                number = random.choice(here[-2:])
                program[step, thread] = WAITS + 8 * number
                for mine, its in zip((known[thread], told[thread]), released[number]):
                    for other, until in its.items():
                        mine[other] = max(mine.get(other, -1), until)
            elif random.random() < 0.4:
                writes, rank = random.random() < 0.5, random.randrange(BLOCKS)
                access = Access(thread, step, writes, rank, dict(known[thread]), dict(told[thread]))
                more = [*accesses, access]
                races = not has_race(accesses) and not (as_told and has_race(more, "told"))
                if not has_race(more) or (racy and races):
                    program[step, thread] = (WRITES if writes else READS) + 4096 * rank
                    accesses.append(access)
    return program, accesses


def has_race(accesses: list[Access], order: str = "known") -> bool:
    """Two threads' accesses race if one writes, and the later is not ordered after the earlier."""
    for a, b in combinations(accesses, 2):
        ordered = a.thread == b.thread or getattr(b, order).get(a.thread, -1) >= a.step
        if a.rank == b.rank and (a.writes or b.writes) and not ordered:
            return True
    return False


@pytest.mark.parametrize("seed", range(4))
def test_a_race_is_reported_exactly_where_there_is_one(hopper: ModuleType, seed: int) -> None:
    random, racy, relaxed, ordered = Random(seed), 0, 0, 0
    for i in range(100):
        program, accesses = random_program(random, racy=i % 2 == 0)
        out = torch.zeros(BLOCKS * THREADS, dtype=torch.int32)
        hopper.set_seed(random.choice([None, random.randrange(1000)]))
        expected = has_race(accesses)
        racy += expected
        relaxed += expected and not has_race(accesses, "told")
        if expected:
            with pytest.raises(RuntimeError, match="race: "):
                run(hopper, "messages", [program], [out], BLOCKS, THREADS, STEPS)
        else:
            run(hopper, "messages", [program], [out], BLOCKS, THREADS, STEPS)
            # Were there no mbarriers, there would be a race.
            ordered += has_race([replace(access, known={}) for access in accesses])
    assert racy > 30
    assert relaxed > 5
    assert ordered > 20
