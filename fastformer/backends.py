"""Which kernel runs: one table, one pure function, and the request that the user can make.

A kernel is one of ``cpu`` (C++), ``triton``, ``cuda`` (C++), ``torch`` (torch's own function) and ``reference`` (the
float64 definition). ``auto`` takes ours where EVIDENCE says that it is faster on that kind of device, or where torch
can't do what was asked; else torch's own.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

from fastformer import library

NAMES = ("auto", "triton", "cuda", "cpu", "torch", "reference")

#: Whether the C++ kernels for the CPU were built into this installation.
CPU_LIBRARY = library.load()
#: Whether Triton can be imported, and whether it interprets its kernels, which lets them run on CPU tensors.
TRITON = importlib.util.find_spec("triton") is not None
TRITON_INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"

_ZEN5 = "fastformer bench, 2-core Zen 5 (AVX512-BF16), torch 2.13.0"
#: (operation, device type) -> (kernel that auto takes, its evidence).
EVIDENCE: dict[tuple[str, str], tuple[str, str]] = {
    ("softmax", "cpu"): ("cpu", _ZEN5),
    ("layer_norm", "cpu"): ("cpu", _ZEN5),
    ("attention", "cpu"): ("cpu", _ZEN5),
    ("feed_forward", "cpu"): ("cpu", _ZEN5),
    ("linear_cross_entropy", "cpu"): ("cpu", _ZEN5),
    ("rotary", "cpu"): ("cpu", _ZEN5),
}


class Choice(NamedTuple):
    kernel: str
    reason: str


def available(kernel: str, device: str) -> bool:
    """Whether ``kernel`` can run on tensors of a device type at all."""
    if kernel in ("torch", "reference"):
        return True
    if kernel == "cpu":
        return device == "cpu" and CPU_LIBRARY
    if kernel == "triton":
        return TRITON and (device == "cuda" or (device == "cpu" and TRITON_INTERPRETED))
    return False


class Explained(Exception):
    """Carries the choice out of a call that is only to be explained."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice


_explaining = False


def choose(operation: str, device: str, request: str, *, unsupported: str = "", torch_lacks: str = "") -> Choice:
    """``decide``, but inside ``explain`` the call ends here, with Explained."""
    choice = decide(operation, device, request, unsupported=unsupported, torch_lacks=torch_lacks)
    if _explaining:
        raise Explained(choice)
    return choice


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which kernel ``function(*args, **kwargs)`` would run under the backend now asked for, and why; nothing is run.

    Args:
        function: one that fastformer.functional accelerates.
        args, kwargs: its arguments.

    Raises:
        TypeError, ValueError: what the call itself would raise for these arguments.
    """
    global _explaining
    if not str(getattr(function, "__module__", "")).startswith("fastformer."):
        return f"{getattr(function, '__name__', function)}: torch (fastformer leaves this function alone)"
    _explaining = True
    try:
        function(*args, **kwargs)
    except Explained as explained:
        return f"{function.__name__}: {explained.choice.kernel} ({explained.choice.reason})"
    finally:
        _explaining = False
    return f"{function.__name__}: torch (these arguments are torch's own case)"


def decide(operation: str, device: str, request: str, *, unsupported: str = "", torch_lacks: str = "") -> Choice:
    """The kernel for one call, and why: a function of its arguments and EVIDENCE alone.

    Args:
        operation: softmax, layer_norm, attention, feed_forward, linear_cross_entropy or rotary.
        device: device type of the tensors.
        request: one of NAMES.
        unsupported: what our kernels can't do here (a dtype, a size), or empty.
        torch_lacks: what torch's own function can't do here, or empty.

    Raises:
        ValueError: the request names a kernel that can't do this.
    """
    if request in ("torch", "reference"):
        return Choice(request, "requested")
    if request != "auto":
        if not available(request, device):
            raise ValueError(f"backend {request!r} can't run {operation} on {device}: {_missing(request, device)}")
        if unsupported:
            raise ValueError(f"backend {request!r} can't run {operation}: {unsupported}")
        return Choice(request, "requested")
    if unsupported:
        return Choice("torch", f"our kernels don't have {unsupported}")
    if torch_lacks:
        for kernel in ("cpu", "triton"):
            if available(kernel, device):
                return Choice(kernel, f"torch's own function has no {torch_lacks}")
    kernel, evidence = EVIDENCE.get(
        (operation, device), ("torch", f"no measurement on {device} says that ours is faster")
    )
    if available(kernel, device):
        return Choice(kernel, evidence)
    return Choice("torch", _missing(kernel, device))


def _missing(kernel: str, device: str) -> str:
    if kernel == "cpu" and device == "cpu":
        return "this installation was built without a C++ compiler"
    if kernel == "triton" and not TRITON:
        return "Triton is not installed"
    if kernel == "triton" and device == "cpu":
        return "Triton runs on the CPU only when TRITON_INTERPRET=1 is set before fastformer is imported"
    if kernel == "cuda":
        return "this version has no CUDA C++ kernels"
    return f"{kernel} has no kernels for {device}"


def _checked(name: str, argument: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{argument} is {name!r}, must be one of {', '.join(NAMES)}")
    return name


_request = _checked(os.environ.get("FASTFORMER_BACKEND", "auto"), "FASTFORMER_BACKEND")


def requested() -> str:
    """The backend asked for: of the innermost ``backend(...)``, else of ``set_backend``, else FASTFORMER_BACKEND."""
    return _request


def set_backend(name: str) -> None:
    """Ask for a backend from now on, in the whole process: one of auto, triton, cuda, cpu, torch, reference."""
    global _request
    _request = _checked(name, "name")


class backend:
    """Context manager that asks for a backend inside its block, in the whole process (like torch's ``sdpa_kernel``).

    Raises ValueError for an unknown name; a call inside the block raises ValueError if that backend can't do it.
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "name")

    def __enter__(self) -> None:
        self.previous = requested()
        set_backend(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        set_backend(self.previous)
