"""The emulator's mbarriers, TMA and wgmma in clusters: arrivals at other blocks, and copies to several.

The kernels are those of tests/simt/kernels/cluster_copies.cu and cluster_product.cu; "kernel: bug" is the kernel with
that bug.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import simt
import torch
from test_simt import Planted, expect_report, expect_silence, line, run

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="needs a C++ compiler")

CLUSTERS, STEPS = 2, 5


def store(hopper: ModuleType, name: str, blocks: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    own, of_cluster = torch.randn(CLUSTERS, blocks, STEPS, 256), torch.randn(CLUSTERS, 1, STEPS, 256)
    out = torch.zeros(CLUSTERS, blocks, STEPS, 2, 256)
    run(hopper, name, [own, of_cluster], [out], CLUSTERS, blocks, STEPS)
    return out, torch.stack([own, of_cluster.expand_as(own)], 3)


def product(hopper: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    a, b, c = torch.randn(256, 320).bfloat16(), torch.randn(128, 320).bfloat16(), torch.zeros(256, 128)
    run(hopper, name, [a, b], [c], 256, 320)
    return c, (a.double() @ b.double().T).float()


def run_by_name(hopper: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return (product if name.startswith("cluster_product") else store)(hopper, name)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("end", ["", ", awaited"])
def test_right_copies_are_right_and_silent_on_every_schedule(hopper: ModuleType, blocks: int, end: str) -> None:
    expect_silence(hopper, lambda: store(hopper, "cluster_copies" + end, blocks))


def test_right_product_is_right_and_silent_on_every_schedule(hopper: ModuleType) -> None:
    expect_silence(hopper, lambda: product(hopper, "cluster_product"), rtol=1e-5, atol=1e-4)


SEND, LOAD_OWN = "cluster_copies.cu: ptx::tma_load_to(", "cluster_copies.cu: // its own"
STORE_BOX, READ = "cluster_copies.cu: ptx::tma_store(", "cluster_copies.cu: // by threads"
RELEASE = "cluster_copies.cu: // to each block"
SEND_HALF, STEP = "cluster_product.cu: ptx::tma_load_to(", "cluster_product.cu: ptx::wgmma<"
STORE, RESULT = "cluster_product.cu: ptx::tma_store(", "cluster_product.cu: // the result"
OF_BLOCK_1 = "of block 1 of its cluster"

BUGS = [
    Planted("cluster_copies: no sync after init", "block not running", 0, SEND, address="shared + 2048 "),
    Planted("cluster_copies: init after sync", "race", 0, SEND, 0, "cluster_copies.cu: auto& full", address=OF_BLOCK_1),
    Planted("cluster_copies: no init fence", "bad call", 0, SEND),
    Planted("cluster_copies: empty not fenced", "bad call", 33, RELEASE),
    Planted("cluster_copies: empty of one block", "bad call", 64, RELEASE, block=1),
    Planted("cluster_copies: empty of one block", "race", 0, SEND, 64, STORE_BOX, address="shared + 2048 "),
    Planted("cluster_copies: released to itself", "race", 0, SEND, 64, STORE_BOX, address=OF_BLOCK_1),
    Planted("cluster_copies: released by other", "race", 0, SEND, 64, STORE_BOX, block=1, address="shared + 2560 "),
    Planted("cluster_copies: released under way", "race", 0, SEND, 64, STORE_BOX, address="shared + 2048 "),
    Planted("cluster_copies: released under way", "copy under way", 0, SEND, 64, STORE_BOX, address="shared + 2048 "),
    Planted("cluster_copies: reads by threads", "race", 0, SEND, 64, READ, address="shared + 2048 "),
    Planted("cluster_copies: reads by threads", "race", 0, LOAD_OWN, 32, READ, address="shared + 0 "),
    Planted("cluster_copies: not awaited empty", "bad call", 0, "cluster_copies.cu: ptx::mbarrier_arrive_expect("),
    Planted("cluster_copies: not awaited full", "race", 64, STORE_BOX, 0, SEND, address="shared + 2048 "),
    Planted("cluster_copies: not awaited full", "copy under way", 64, STORE_BOX, 0, SEND, address="shared + 2048 "),
    Planted("cluster_copies: expects its part", "bad call", 0, LOAD_OWN, block=1),
    Planted("cluster_copies: to itself", "deadlock", 0, "cluster_copies.cu: ptx::mbarrier_wait(e", block=1),
    Planted("cluster_copies: to nobody", "bad call", 0, SEND),
    Planted("cluster_copies: to one more", "bad call", 0, SEND),
    Planted("cluster_copies: release to one more", "bad call", 34, RELEASE),
    Planted("cluster_copies: release not shared", "bad call", 32, RELEASE),
    Planted("cluster_copies: same part", "copy under way", 0, SEND, 0, SEND, block=1, address="shared + 2048 "),
    Planted("cluster_copies: never awaited", "copy under way", 0, SEND, address="shared + 3072 "),
    Planted("cluster_copies: no last sync", "block not running", 32, RELEASE, block=1, address="shared + 4120 "),
    Planted("cluster_product: released before wait", "race", 0, SEND_HALF, 128, STEP, address="shared + 16384 "),
    Planted("cluster_product: released to itself", "race", 0, SEND_HALF, 128, STEP, address=OF_BLOCK_1),
    Planted("cluster_product: no proxy fence", "proxy", 128, STORE, 128, RESULT),
    Planted("cluster_product: no store wait", "copy under way", 128, STORE),
    Planted("cluster_product: sent first", "copy under way", 128, STEP, 0, SEND_HALF),
    Planted("cluster_product: adds", "bad call", 128, "cluster_product.cu: ptx::bulk_add("),
]


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bug_is_found_on_every_schedule(hopper: ModuleType, bug: Planted) -> None:
    expect_report(hopper, bug, run_by_name, random_orders=5)


def test_deadlock_says_what_an_mbarrier_of_each_block_lacks(hopper: ModuleType) -> None:
    with pytest.raises(RuntimeError) as error:
        store(hopper, "cluster_copies: to itself")
    for rank in range(2):
        wait = f"threads 32-95 of block {rank} wait in mbarrier_wait of shared + 4096 (of 4128 bytes) of block {rank} "
        assert wait in str(error.value)
    assert "lacks 0 of 1 arrivals and expects 2048 bytes, with 1536 under way" in str(error.value)


def test_a_report_names_the_block_that_began_the_copy(hopper: ModuleType) -> None:
    with pytest.raises(RuntimeError) as error:
        store(hopper, "cluster_copies: same part")
    at = f"at {line(SEND)}"
    wrote = f"thread 0 of block 1 wrote 16 bytes at shared + 2048 (of 4128 bytes) of block 0 of its cluster {at}"
    assert wrote in str(error.value)
    assert f"thread 0 of block 0 began a tma_load to it {at}" in str(error.value)


def test_a_launch_after_a_report_starts_afresh(hopper: ModuleType) -> None:
    for name in ("to itself", "same part", "no last sync"):
        with pytest.raises(RuntimeError):
            store(hopper, f"cluster_copies: {name}", 4)
        for blocks in (4, 1, 2):
            output, expected = store(hopper, "cluster_copies", blocks)
            torch.testing.assert_close(output, expected, rtol=0, atol=0)
