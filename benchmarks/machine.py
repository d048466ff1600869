"""The machine: what it is, and what it can do at most, measured."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

import fastformer
from fastformer import backends, tuning

from .harness import Limits, Timer
from .timing import Call

SECONDS = 0.4  # of calls for each limit
# Whose versions matter, where they are installed: what is imported -> what pip calls it.
PACKAGES = {
    "triton": "triton",
    "transformers": "transformers",
    "liger_kernel": "liger-kernel",
    "flash_attn": "flash-attn",
    "quack": "quack-kernels",
}


def available_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_limits(
    device: torch.device, timer: Timer, dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16)
) -> Limits:
    """The best of many copies and matrix products; a limit is what can be reached, so no median here."""
    sizes = [2**20 * megabytes for megabytes in (1, 4, 12, 24)] if device.type == "cpu" else []
    sizes.append(memory_bytes(device))
    return Limits(
        copy={size: copy_rate(size, device, timer) for size in sizes},
        read={size: read_rate(size, device, timer) for size in sizes},
        product={dtype: product_rate(dtype, device, timer) for dtype in dtypes},
    )


def copy_drift(limits: Limits, device: torch.device, timer: Timer) -> float:
    """How far the rate of copies in main memory is from the one measured first, as a share: 0.1 is 10% faster."""
    size = memory_bytes(device)
    return copy_rate(size, device, timer) / limits.copy[size] - 1


def memory_bytes(device: torch.device) -> int:
    """Enough that caches don't hold it."""
    return 8 * cache_bytes(device)


def copy_rate(total: int, device: torch.device, timer: Timer) -> float:
    """Bytes/s, read and written, between two buffers of ``total`` bytes together."""
    source, target = torch.randn(2, total // 8, device=device)
    return 2 * source.nbytes / _best(partial(target.copy_, source), timer)


def read_rate(total: int, device: torch.device, timer: Timer) -> float:
    """Bytes/s of a sum or a dot product over ``total`` bytes."""
    halves = torch.randn(2, total // 8, device=device)
    return halves.nbytes / min(_best(halves.sum, timer), _best(partial(torch.dot, *halves), timer))


def product_rate(dtype: torch.dtype, device: torch.device, timer: Timer) -> float:
    """FLOP/s of a large square matrix product; of a small one where a large one takes seconds: float16 on most CPUs."""
    if device.type == "cuda":
        return _product_rate(8192, dtype, device, timer)
    rate = _product_rate(256, dtype, device, timer)
    return rate if 2 * 1536**3 / rate > 8.0 else max(rate, _product_rate(1536, dtype, device, timer))


def _product_rate(size: int, dtype: torch.dtype, device: torch.device, timer: Timer) -> float:
    a, b, out = torch.randn(3, size, size, device=device).to(dtype)
    seconds = _best(partial(torch.mm, a, b, out=out), timer)
    # torch.mm's library holds AMD processors to AVX2 in float32; torch's other one shows what the machine can do.
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if device.type == "cpu" and dtype == torch.float32 and onednn is not None:
        seconds = min(seconds, _best(partial(onednn, a, b, None, "none", [], ""), timer))
    return 2 * size**3 / seconds


def _best(call: Call, timer: Timer) -> float:
    times: list[float] = []
    while len(times) < 20 or sum(times) < SECONDS:
        times.append(timer(call))
    return min(times)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 16 MiB where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 2**10, "M": 2**20}
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=16 * 2**20)


def environment(device: torch.device) -> dict[str, str]:
    """What a reader needs to judge the numbers, or to repeat them. A number that comes first counts for reports."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "processor": f"{tuning.processor_name()}, torch at {torch.backends.cpu.get_cpu_capability()},"
        f" fastformer at {backends.CPU_LEVEL or 'none (not built)'}",
        "threads": f"{torch.get_num_threads()} of torch, {available_threads()} cores for this process",
        "clock": _clock(),
        "system": platform.platform(),
        "versions": f"fastformer {fastformer.__version__}{_commit()}, {_versions()}",
    }
    if device.type == "cuda":
        facts |= _gpu(device)
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f} processes at the start"
    return {name: text for name, text in facts.items() if text}


def _clock() -> str:
    """MHz of the processor's cores, as far as the system says."""
    info, frequency = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu/cpu0/cpufreq")
    lines = info.read_text().splitlines() if info.exists() else []
    now = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    text = f"{statistics.median(now):.0f} MHz at the start" if now else ""
    if (frequency / "cpuinfo_max_freq").exists():
        most = int((frequency / "cpuinfo_max_freq").read_text()) / 1000
        text += f"{', ' if text else ''}{most:.0f} MHz at most, governor {_text(frequency / 'scaling_governor')}"
    return text


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else "unknown"


def _gpu(device: torch.device) -> dict[str, str]:
    """The GPU as torch knows it, and what nvidia-smi says of its driver and clocks, if it is there."""
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "gpu": f"{properties.name}, {properties.multi_processor_count} multiprocessors,"
        f" {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    }
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    if hasattr(properties, "uuid"):  # its numbers need not be torch's
        command.append(f"--id=GPU-{properties.uuid}")
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        driver, sm, max_sm, memory, max_memory, power = found.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return facts
    facts["driver"] = driver
    facts["gpu clocks"] = (
        f"{sm} at the start, {max_sm} at most; memory {memory}, {max_memory} at most; power limit {power}"
    )
    return facts


def _versions() -> str:
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module):
            try:
                versions.append(f"{package} {metadata.version(package)}")
            except metadata.PackageNotFoundError:  # installed under another name, or not by pip
                versions.append(package)
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
