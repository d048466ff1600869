"""The machine: what it is, and what it can do at most, measured."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

import fastformer
from fastformer import backends

from .harness import Limits, Timer

DTYPES = (torch.float32, torch.bfloat16)


def available_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_limits(device: torch.device, timer: Timer, seconds: float = 0.4) -> Limits:
    """The best of many copies and matrix products; a limit is what can be reached, so no median here."""
    sizes = [2**20 * megabytes for megabytes in (1, 4, 12, 24)] if device.type == "cpu" else []
    sizes.append(8 * cache_bytes(device))

    def best(function: partial) -> float:
        times: list[float] = []
        while len(times) < 20 or sum(times) < seconds:
            times.append(timer(function))
        return min(times)

    def copy_rate(total: int) -> float:
        """Bytes/s, read and written, between two buffers of ``total`` bytes together."""
        source, target = torch.randn(2, total // 8, device=device)
        return 2 * source.nbytes / best(partial(target.copy_, source))

    def read_rate(total: int) -> float:
        halves = torch.randn(2, total // 8, device=device)
        return halves.nbytes / min(best(halves.sum), best(partial(torch.dot, *halves)))

    def product_rate(dtype: torch.dtype) -> float:
        size = 8192 if device.type == "cuda" else 1536
        a, b, out = torch.randn(3, size, size, device=device).to(dtype)
        seconds = best(partial(torch.mm, a, b, out=out))
        # torch.mm's library holds AMD processors to AVX2 in float32; torch's other one shows what the machine can do.
        onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if device.type == "cpu" and dtype == torch.float32 and onednn is not None:
            seconds = min(seconds, best(partial(onednn, a, b, None, "none", [], "")))
        return 2 * size**3 / seconds

    return Limits(
        copy={size: copy_rate(size) for size in sizes},
        read={size: read_rate(size) for size in sizes},
        product={dtype: product_rate(dtype) for dtype in DTYPES},
    )


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 16 MiB where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 2**10, "M": 2**20}
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=16 * 2**20)


def environment(device: torch.device) -> dict[str, str]:
    """What a reader needs to judge the numbers, or to repeat them."""
    processor = (
        f"{processor_name()}, {torch.get_num_threads()} threads, torch at {torch.backends.cpu.get_cpu_capability()}"
    )
    facts = {
        "processor": f"{processor}, fastformer at {backends.CPU_LEVEL or 'none (not built)'}",
        "system": platform.platform(),
        "versions": f"fastformer {fastformer.__version__}{_commit()}, {_versions()}",
    }
    if device.type == "cuda":
        facts["gpu"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f} processes at the start"
    return facts


def processor_name() -> str:
    """What the system calls its processor."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> str:
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if importlib.util.find_spec("triton"):
        versions.append(f"triton {metadata.version('triton')}")
    return ", ".join(versions)


def _commit() -> str:
    """The commit of the checkout that runs, with a + if files differ from it; nothing outside of a checkout."""
    folder = Path(fastformer.__file__).parent
    if not (folder.parent / ".git").exists():
        return ""
    git = partial(subprocess.run, cwd=folder, capture_output=True, text=True, check=False)
    try:
        commit = git(["git", "rev-parse", "--short", "HEAD"])
        changed = git(["git", "status", "--porcelain"]).stdout.strip()
    except FileNotFoundError:
        return ""
    return f" (commit {commit.stdout.strip()}{'+' if changed else ''})" if commit.returncode == 0 else ""
