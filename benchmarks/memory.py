"""The most memory that a call holds at once."""

from __future__ import annotations

import torch
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy
from torch.autograd.profiler import record_function

from .timing import Call, prepared

MARK = "fastformer.benchmarks: what is measured"


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes allocated at once during a call, beyond what was there before it; its results are among them.

    What torch's allocators were asked for, so that it is the same in every run. On a GPU what a kernel allocates
    without torch is not seen. On a CPU neither is that (the scratch memory of oneDNN and MKL, std::vector), nor what
    threads other than the calling one allocate in the middle of an operator.
    """
    if device.type == "cuda":
        once = prepared(call)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = once()
        del result
        return torch.cuda.max_memory_allocated(device) - before
    # Not torch.profiler's: that one writes to stderr at each start and takes milliseconds.
    options = torch._C._profiler._ExperimentalConfig()
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, options))
    try:
        once = prepared(call)
        with record_function(MARK):
            result = once()
            del once, result
    finally:
        threads = _disable_profiler_legacy()
    return next(filter(None, map(_peak_behind_mark, threads)), 0)


def _peak_behind_mark(records: list) -> int:
    """Of the records of a thread; 0 if it hasn't the mark."""
    held = peak = 0
    counts = False
    for record in records:
        counts = counts or (record.kind() == "push" and record.name() == MARK)
        if counts and record.kind() == "memory_alloc":
            held += record.cpu_memory_usage()
            peak = max(peak, held)
    return peak
