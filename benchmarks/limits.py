"""What the machine can do at most, measured in the run that is judged by it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .case import Case, Work
from .checking import as_tuple
from .timing import Call, CpuTimer, Timer

SECONDS = 0.4  # of calls for each limit
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Limits:
    """What the machine can do, measured in this run. Bytes/s depend on how many bytes there are: caches."""

    copy: dict[int, float]  # bytes read and written -> bytes/s
    read: dict[int, float]  # bytes -> bytes/s
    product: dict[torch.dtype, float]  # FLOP/s
    drift: float = 0.0  # how far the copy rates at the run's end are from the first ones, as a share

    def bound(self, work: Work, dtype: torch.dtype, resident: float = 0.0) -> tuple[str, float]:
        """(name, seconds) of the limit that binds: "copy", "read", "product", or "resident", see resident_seconds.

        ("", 0.0) where nothing was measured.
        """
        if not self.copy:
            return "", 0.0
        name, rates = ("read", self.read) if work.reads else ("copy", self.copy)
        measured = max((size for size in rates if size <= work.bytes), default=min(rates))
        limits = {
            name: work.bytes / rates[measured],
            "product": work.flops / self.product[dtype],
            "resident": resident,
        }
        binding = max(limits, key=limits.__getitem__)
        return binding, limits[binding]


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


def cache_bytes(device: torch.device, level: int | None = None) -> int:
    """Size of the last cache, or on a CPU of a core's cache of that level; 16 MiB or 256 KiB where nothing says it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 2**10, "M": 2**20}
    sizes = {}
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = (cache / "size").read_text().strip()
        if size[-1] in units:
            sizes[int((cache / "level").read_text())] = int(size[:-1]) * units[size[-1]]
    if level is not None:
        return sizes.get(level, 256 * 2**10)
    return max(sizes.values(), default=16 * 2**20)


def resident_seconds(case: Case) -> float:
    """The CPU kernel's forward over rows that don't leave a core's own caches: what its arithmetic alone takes.

    From what one thread needs for 16 rows more than for 8, so that the call itself doesn't count. 0 where those caches
    don't hold so many.
    """
    if case.few is None:
        return 0.0
    most = case.few(24)
    with torch.no_grad():
        results = as_tuple(case.ours(**most))
    if sum(x.nbytes for x in (*most.values(), *results)) > cache_bytes(CPU, level=2):
        return 0.0
    threads, timer = torch.get_num_threads(), CpuTimer()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            calls = {rows: partial(case.ours, **case.few(rows)) for rows in (8, 24)}
            best = {rows: min(timer(call) for _ in range(1000)) for rows, call in calls.items()}
    finally:
        torch.set_num_threads(threads)
    return (best[24] - best[8]) / 16 * case.rows / threads
