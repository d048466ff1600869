"""`make gpu`: the tests on an NVIDIA GPU, compute-sanitizer over each CUDA C++ kernel, and the benchmarks.

Needs no network, and the installed fastformer is what is tested, which may come from a wheel. Exit status 0 if all of
it went well.
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent.resolve()
RESULTS = TESTS.parent / "benchmarks" / "results"
# About builds and emulators, which need no GPU; and what measures this project's own files.
ELSEWHERE = ("test_build.py", "test_simt.py", "test_cuda_static.py", "test_ahead_of_time.py", "test_matrix.py")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
CUDA_OPERATIONS = (
    "softmax",
    "layer_norm",
    "rotary",
    "feed_forward",
    "linear_cross_entropy",
    "attention",
    "attention_window",
    "varlen_attn",
)


def run(title: str, command: list[str], **environment: str) -> bool:
    """Runs a command from the folder of the tests, so that the repository's own packages are not on the path."""
    print(f"\n== {title}: {' '.join(command)}", flush=True)
    return subprocess.run(command, cwd=TESTS, env={**os.environ, **environment}).returncode == 0


def sanitize() -> bool:
    """compute-sanitizer's tools, one after the other; it is part of the CUDA toolkit."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        print("\ncompute-sanitizer is not on PATH or in /usr/local/cuda")
        return False
    # Each tensor in memory of its own: in a piece of torch's cache an access past its end would not show.
    return all(
        [
            run(
                tool,
                [program, "--tool", tool, "--error-exitcode", "1", sys.executable, "gpu_cases.py"],
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )
            for tool in SANITIZERS
        ]
    )


def bench() -> bool:
    """Both families of kernels; the results' names have the day and the GPU."""
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    name = f"{datetime.date.today()}-{gpu}"
    fastformer = "from fastformer.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", fastformer, "bench", "--device", "cuda"]

    def bench_family(title: str, family: str, *options: str) -> bool:
        places = ["--out", str(RESULTS / f"{name}-{family}"), "--json", str(RESULTS / f"{name}-{family}.json")]
        return run(f"benchmarks, {title}", [*command, *places, *options])

    operations = ",".join(CUDA_OPERATIONS)
    triton = bench_family("Triton", "triton", "--suite", "gpu")
    cuda = bench_family("CUDA C++", "cuda", "--suite", "gpu", "--backend", "cuda", "--op", operations)
    # Without the host's time, which hides what kernels of small shapes take. Its JSON stays in its folder.
    graphs = [*command, "--cuda-graphs", "--op", operations, "--out", str(RESULTS / f"{name}-graphs")]
    return all([triton, cuda, run("benchmarks, CUDA graphs", graphs)])


def main() -> int:
    """Everything, whatever fails."""
    if not torch.cuda.is_available():
        print("torch finds no GPU", file=sys.stderr)
        return 2
    ignored = [f"--ignore={name}" for name in ELSEWHERE]
    passed = [run("tests", [sys.executable, "-m", "pytest", "-q", "-n", "4", ".", *ignored]), sanitize(), bench()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
