"""The machine that a run is on: what a reader needs to judge its numbers, or to repeat them."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import statistics
import subprocess
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

import fastformer
from fastformer import backends, tuning

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


def environment(device: torch.device) -> dict[str, str]:
    """What a reader needs to judge the numbers, or to repeat them. A number that comes first counts for reports."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "processor": f"{tuning.processor_name()}, torch at {torch.backends.cpu.get_cpu_capability()},"
        f" fastformer at {backends.CPU_LEVEL or 'none (not built)'}",
        "threads": f"{torch.get_num_threads()} of torch, {available_threads()} cores for this process",
        "tuning": backends.tables_in_use(),
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
