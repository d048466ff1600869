"""Deletes each barrier and each wait of a kernel once, and says which deletions no emulated test notices.

    python tests/simt/delete_barriers.py csrc/cuda/softmax.cu tests/test_softmax.py

A header (rows.cuh) will do as well. What follows the file goes to pytest, which runs those tests in the emulator and
stops at the first failure. What survives is needless, or no test needs it; the exit status is then 1.
"""

from __future__ import annotations

import fcntl
import filecmp
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DELETED = ROOT / "build" / "simt_deleted"
WAITS = ("cp_async_wait<[^>]+>", "barrier_sync", "mbarrier_wait", "tma_store_wait<[^>]+>", "bulk_wait_all")
WAITS += ("wait_for_count", "wgmma_wait<[^>]+>", "wgmma_fence", "fence_proxy_async", "fence_mbarrier_init")
WAITS += ("cluster_sync",)
BARRIER = re.compile(
    r"(__syncthreads\(\)|__syncwarp\([^()]*\)|[\w.]+\.wait_(full|empty)\([^;{}]*\)"
    rf"|(ptx::)?({'|'.join(WAITS)})\([^;{{}}]*\));"
)


def main(file: str, *tests: str) -> int:
    """How many deletions survived; 1 if the tests fail without any."""
    name = Path(file).resolve().relative_to(ROOT)
    copy = DELETED / name.name
    copy.mkdir(parents=True, exist_ok=True)
    with (copy / "lock").open("w") as lock:  # another run would put back what this one deletes
        fcntl.flock(lock, fcntl.LOCK_EX)
        for folder in ("csrc", "tests/simt"):
            shutil.copytree(ROOT / folder, copy / folder, dirs_exist_ok=True, copy_function=copy_if_different)
        return delete_each(copy, name, tests)


def delete_each(copy: Path, name: Path, tests: tuple[str, ...]) -> int:
    """``main`` in a copy of the sources."""
    source = (copy / name).read_text()
    if not BARRIER.search(source):
        print(f"{name} has no barriers")
        return 0
    print(f"{name} as it is: ", end="", flush=True)
    if failure := first_failure(copy, tests):
        print(f"fails already ({failure})")
        return 1
    print("passes")
    survivors = 0
    try:
        for barrier in BARRIER.finditer(source):
            line = source.count("\n", 0, barrier.start()) + 1
            if "//" in source[source.rfind("\n", 0, barrier.start()) + 1 : barrier.start()]:
                continue
            (copy / name).write_text(source[: barrier.start()] + ";" + source[barrier.end() :])
            failure = first_failure(copy, tests)
            survivors += failure == ""
            print(f"{name}:{line}: {barrier.group()} {failure or 'SURVIVED'}", flush=True)
    finally:
        (copy / name).write_text(source)
    return survivors


def copy_if_different(source: str, target: str) -> None:
    """What changes gets a new time: ninja must not take what it made of an earlier deletion for up to date."""
    if not Path(target).exists() or not filecmp.cmp(source, target, shallow=False):
        shutil.copyfile(source, target)


def first_failure(copy: Path, tests: tuple[str, ...]) -> str:
    """The first test that fails, with its error; empty if all pass."""
    environment = os.environ | {"FASTFORMER_SIMT_ROOT": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-k", "cuda-cpu", "--tb=short", *tests]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode == 0:
        return ""
    if result.returncode != 1:
        raise RuntimeError(f"pytest did not run the tests:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    found = re.search(r"^FAILED (.*)$", result.stdout, re.MULTILINE)
    report = re.search(
        r"^E? +(race|proxy|uninitialised|copy under way|block not running|deadlock|divergence|bad call|endless): .*$",
        result.stdout,
        re.MULTILINE,
    )
    return (found.group(1) if found else "fails") + (f" [{report.group().lstrip('E ')}]" if report else "")


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 1))
