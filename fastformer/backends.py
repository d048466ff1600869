"""Which kernel runs: one table, one pure function, and the request that the user can make.

A kernel is one of ``cpu`` (C++), ``triton``, ``cuda`` (C++), ``torch`` (torch's own function) and ``reference`` (the
float64 definition). ``auto`` takes ours where a table of ``fastformer tune``, or else EVIDENCE, says that it is faster
on that kind of device, or where torch can't do what was asked; else torch's own. EVIDENCE has nothing on GPUs yet.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch

from fastformer import library, tuning

#: Element types that our kernels have; torch's own functions take the rest.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

NAMES = ("auto", "triton", "cuda", "cpu", "torch", "reference")

#: The instruction-set level of the C++ kernels for the CPU; empty if this installation was built without them.
CPU_LEVEL = library.load()
CPU_LIBRARY = bool(CPU_LEVEL)
#: Why the CUDA C++ kernels are not here; empty if they are.
CUDA_PROBLEM = library.load_cuda()
CUDA_LIBRARY = not CUDA_PROBLEM
#: The device types on which the CUDA C++ kernels run.
CUDA_DEVICES: set[str] = {"cuda"} if CUDA_LIBRARY else set()
#: Whether Triton can be imported, and whether it interprets its kernels, which lets them run on CPU tensors.
TRITON = importlib.util.find_spec("triton") is not None
TRITON_INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"


class Measurement(NamedTuple):
    """Says where our kernel of an operation, or of a form of it, is faster than torch's."""

    operation: str
    levels: tuple[str, ...]  # instruction-set levels
    dtypes: tuple[torch.dtype, ...]
    speedup: str  # over torch's own kernel, forward and with backward
    # Elements of the input (or key, or linear's weight) from which it is so: without, with gradients.
    least: tuple[int, int] = (0, 0)
    kernel: str = "cpu"
    tuned: str = ""  # the day on which ``fastformer tune`` found it on this machine
    broken: bool = False  # whether it found wrong answers, or that ours can't run


_FP32, _BF16, _FP16 = torch.float32, torch.bfloat16, torch.float16
_TOP, _AVX512, _AVX2 = ("avx512_bf16",), ("avx512", "avx512_bf16"), ("avx2",)
#: Two cores of a Zen 5 with torch 2.13.0, 2026-11-20: `fastformer bench`, the same sizes in float16, and both sides
#: held to AVX2, and to AVX-512 without bfloat16 instructions. Not listed, because torch's is as fast: linear of more
#: than 32 rows in bfloat16 (1.0x). rms_norm is measured without a residual, and stands for both. Below the sizes in
#: ``least`` a call's fixed cost decides, where torch's own has less: one thread, 8 to 512 rows of 64 and 768.
EVIDENCE = (
    Measurement("softmax", _AVX512, (_FP32, _FP16), "1.0x to 5.5x", least=(16384, 65536)),
    Measurement("softmax", _AVX512, (_BF16,), "1.4x to 5.6x", least=(16384, 65536)),
    Measurement("softmax", _AVX2, (_FP32, _BF16, _FP16), "1.2x to 1.3x", least=(16384, 65536)),
    Measurement("layer_norm", _AVX512, (_FP32,), "1.0x to 3.2x", least=(49152, 131072)),
    Measurement("layer_norm", _AVX512, (_FP16,), "1.6x to 1.9x", least=(49152, 49152)),
    Measurement("layer_norm", _TOP, (_BF16,), "1.5x to 4.2x", least=(49152, 49152)),
    Measurement("add_layer_norm", _AVX512, (_FP32,), "1.0x to 4.9x", least=(49152, 131072)),
    Measurement("add_layer_norm", _AVX512, (_FP16,), "1.4x", least=(32768, 32768)),
    Measurement("add_layer_norm", _TOP, (_BF16,), "1.5x to 4.1x", least=(32768, 32768)),
    Measurement("rms_norm", _AVX512, (_FP32, _FP16), "2.1x to 23x"),
    Measurement("rms_norm", _TOP, (_BF16,), "4.8x to 7.4x"),
    Measurement("attention", _AVX512, (_FP32,), "1.0x to 7x", least=(2048, 4096)),
    Measurement("attention", _AVX512, (_FP16,), "1.0x to 36x"),
    Measurement("attention", _AVX512, (_BF16,), "3.3x to 24x"),
    Measurement("attention", _AVX2, (_FP32,), "1.2x to 2.3x", least=(2048, 4096)),
    Measurement("attention", _AVX2, (_BF16, _FP16), "1.8x to 25x"),
    Measurement("linear", _AVX512, (_FP32, _FP16), "1.6x to 10x", least=(32768, 32768)),
    Measurement("linear", ("avx512",), (_BF16,), "1.9x to 4.9x", least=(65536, 65536)),
    Measurement("linear", _AVX2, (_BF16, _FP16), "3.8x to 22x", least=(65536, 65536)),
    Measurement("linear_few_rows", _AVX512, (_FP32,), "1.0x to 4x", least=(524288, 524288)),
    Measurement("linear_few_rows", _AVX512, (_FP16,), "1.2x to 10x", least=(65536, 65536)),
    Measurement("linear_few_rows", _TOP, (_BF16,), "1.1x to 3.7x", least=(4096, 65536)),
    Measurement("linear_few_rows", ("avx512",), (_BF16,), "1.0x to 5.8x", least=(65536, 65536)),
    Measurement("linear_few_rows", _AVX2, (_FP32,), "1.0x to 3.0x", least=(1048576, 1048576)),
    Measurement("linear_few_rows", _AVX2, (_BF16, _FP16), "1.1x to 8x", least=(65536, 65536)),
    Measurement("feed_forward", _AVX512, (_FP32,), "2.0x to 9x", least=(16384, 16384)),
    Measurement("feed_forward", _TOP, (_BF16,), "1.04x to 1.5x", least=(393216, 393216)),
    Measurement("feed_forward_few_rows", _AVX512, (_FP32,), "1.4x to 2.2x", least=(65536, 65536)),
    Measurement("feed_forward_few_rows", _TOP, (_BF16,), "1.0x to 2.7x", least=(16384, 65536)),
    Measurement("feed_forward", _AVX512, (_FP16,), "2.0x to 9x", least=(4096, 0)),
    Measurement("linear_cross_entropy", _AVX512, (_FP32, _FP16), "1.05x to 9x", least=(4096, 4096)),
    Measurement("linear_cross_entropy", _TOP, (_BF16,), "0.9x to 1.4x", least=(6144, 32768)),
    Measurement("linear_cross_entropy", _AVX2, (_FP32,), "1.1x"),
    Measurement("rotary", _AVX512, (_FP32, _FP16), "1.8x to 3.4x"),
    Measurement("rotary", _TOP, (_BF16,), "1.7x to 3.8x"),
    Measurement("rotary", _AVX2, (_FP32,), "1.8x"),
)


def faster_at(level: str) -> dict[tuple[str, torch.dtype], Measurement]:
    """(operation, dtype) -> what was measured of our CPU kernels at an instruction-set level."""
    return {(row.operation, dtype): row for row in EVIDENCE if level in row.levels for dtype in row.dtypes}


def _tuned(table: tuning.Table | None) -> dict[tuple[str, torch.dtype], Measurement]:
    """The entries of a table of ``fastformer tune`` as measurements."""
    return {
        (x.operation, x.dtype): Measurement(
            x.operation, (), (x.dtype,), x.speedup, x.least, x.kernel, table.made, x.broken
        )
        for x in (table.entries if table else ())
    }


#: All tables of ``fastformer tune``.
TABLES = tuning.read_or_warn()
#: What it found on this machine's processor, by the threads that torch had.
TUNED = tuning.by_threads(TABLES, CPU_LEVEL) if TABLES else {}
#: What ``auto`` goes by on this machine, with the threads that torch has; see ``_go_by``.
FASTER: dict[tuple[str, torch.dtype], Measurement] = {}
#: Likewise on its GPU, where nothing but ``fastformer tune`` has measured.
FASTER_ON_GPU: dict[tuple[str, torch.dtype], Measurement] = {}
if any(table.machine.get("device") == "cuda" for table in TABLES):
    # To ask for the GPU's name starts CUDA, which importing must not: so it waits for the program to do that.
    torch.cuda._lazy_call(lambda: FASTER_ON_GPU.update(_tuned(tuning.find(TABLES, tuning.gpu()))))
_Tensor, _is_compiling = torch.Tensor, torch.compiler.is_compiling  # looked up once, for is_small
#: (operation, dtype) -> elements below which torch's own function is faster, with gradients or without.
_SMALL: dict[tuple[str, torch.dtype], int] = {}
#: What ``decide`` said: to look it up takes 0.4 us, to decide 3.
_decided: dict[tuple[str, str, torch.dtype, str, str, str, bool], str] = {}
#: The threads that FASTER is for.
_threads = 0


def _go_by(threads: int) -> None:
    """Makes FASTER, and what comes from it, that of so many threads."""
    global FASTER, _SMALL, _decided, _threads
    FASTER = faster_at(CPU_LEVEL) | _tuned(TUNED.get(threads))
    _SMALL = {key: min(row.least) for key, row in FASTER.items()}
    _decided, _threads = {}, threads


def _follow_threads() -> None:
    """Called where there are tables: torch.set_num_threads may have been. While a graph is made nothing changes."""
    if not _is_compiling() and (threads := torch.get_num_threads()) != _threads:
        _go_by(threads)


_go_by(torch.get_num_threads() if TUNED else 0)


def tables_in_use() -> str:
    """Which tables of ``fastformer tune`` hold for this process, "" if none does."""
    found = [tuning.find(TABLES, machine) for machine in tuning.here(CPU_LEVEL)] if TABLES else []
    return "; ".join(f"{x.machine['device']} of {x.made}, {len(x.entries)} entries" for x in found if x)


class Preference(NamedTuple):
    """Says which of Triton's and CUDA C++'s kernels of an operation runs on a GPU where neither was requested."""

    operation: str
    kernel: str
    reason: str
    from_row_bytes: int = 0  # of the first tensor


_NOTHING_TELLS = "neither was measured, and the CUDA C++ kernels have run in an emulator only"
#: For calls of the raw operators. Published, for softmax and norms on an H100: plain Triton kernels are as fast as the
#: best up to 64 KB a row, and fall off beyond (QuACK's benchmarks, 2025). Nothing of ours was measured on a GPU yet.
#: Operations that are not here have no CUDA C++ kernels: linear.
PREFERENCES = (
    Preference("softmax", "triton", "published: as fast as the best up to 64 KB a row"),
    Preference("softmax", "cuda", "published: Triton falls off beyond 64 KB a row", from_row_bytes=65537),
    Preference("layer_norm", "triton", "published: as fast as the best up to 64 KB a row"),
    Preference("layer_norm", "cuda", "published: Triton falls off beyond 64 KB a row", from_row_bytes=65537),
    Preference("rotary", "triton", _NOTHING_TELLS),
    Preference("feed_forward", "triton", _NOTHING_TELLS),
    Preference("linear_cross_entropy", "triton", _NOTHING_TELLS),
    Preference("attention", "triton", _NOTHING_TELLS),
)
#: Compute capability from which on GPUs can run the CUDA C++ kernels.
OLDEST_GPU = (8, 0)
#: The operations that have CUDA C++ kernels; forms of them that were measured by themselves go by their names here.
CUDA_OPERATIONS = {row.operation for row in PREFERENCES}
#: The dtypes of the CUDA C++ kernels that don't take all of KERNEL_DTYPES.
CUDA_DTYPES = {"attention": (torch.bfloat16, torch.float16)}
FORMS = {
    "add_layer_norm": "layer_norm",
    "rms_norm": "layer_norm",
    "feed_forward_few_rows": "feed_forward",
    "linear_few_rows": "linear",
}


def forms_of(operation: str) -> list[str]:
    """The operation, and the forms of it that were measured by themselves."""
    return [operation, *(form for form, of in FORMS.items() if of == operation)]


def preferred(operation: str, tensor: torch.Tensor) -> str:
    """``triton`` or ``cuda``, on a GPU that has both, for a raw operator whose first argument is ``tensor``."""
    for form in forms_of(operation) if FASTER_ON_GPU else ():
        measured = FASTER_ON_GPU.get((form, tensor.dtype))
        if measured and not (measured.kernel == "cuda" and cuda_lacks(operation, tensor.dtype)):
            return measured.kernel
    row_bytes = tensor.shape[-1:].numel() * tensor.element_size()
    rows = [row for row in PREFERENCES if row.operation == operation and row_bytes >= row.from_row_bytes]
    kernel = rows[-1].kernel
    if kernel == "cuda" and tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < OLDEST_GPU:
        return "triton"
    return kernel


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
    return kernel == "cuda" and device in CUDA_DEVICES


class Explained(Exception):
    """Carries the choice out of a call that is only to be explained."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice


#: Whether ``explain`` is at work.
explaining = False


def choose(
    operation: str, tensor: torch.Tensor, *, unsupported: str = "", torch_lacks: str = "", record: bool = False
) -> str:
    """The kernel for a call on ``tensor`` under the backend now asked for; see ``decide``.

    ``record``: autograd records the call. Inside ``explain`` it ends in Explained. Compiled code takes no notice of how
    small a tensor is: it would be compiled once more for small ones, and spares the calls' cost anyway.
    """
    request, dtype = _request, tensor.dtype
    if TUNED:
        _follow_threads()
    if tensor.is_cpu:
        device, measured = "cpu", FASTER.get((operation, dtype))
    else:
        device = tensor.device.type
        measured = FASTER_ON_GPU.get((operation, dtype)) if device == "cuda" else None
    if torch.compiler.is_compiling():
        never = measured is not None and measured.least[record] == tuning.NEVER
        return decide(
            operation, device, dtype, request, unsupported=unsupported, torch_lacks=torch_lacks, small=never
        ).kernel
    elements = tensor.numel()
    small = measured is not None and type(elements) is int and elements < measured.least[record]
    key = (operation, device, dtype, request, unsupported, torch_lacks, small)
    kernel = _decided.get(key)
    if kernel is None or explaining:
        choice = decide(
            operation, device, dtype, request, unsupported=unsupported, torch_lacks=torch_lacks, small=small
        )
        if explaining:
            raise Explained(choice)
        kernel = _decided[key] = choice.kernel
    return kernel


def is_small(operation: str, input: object) -> bool:
    """Whether ``auto`` leaves this call to torch's own function for nothing but the input's size.

    Functions ask it first: a small call takes torch 3.4 us, and to look at anything else takes a third of that.
    """
    if type(input) is not _Tensor or _request != "auto" or explaining or _is_compiling():
        return False
    if TUNED:
        _follow_threads()
    return input.is_cpu and input.numel() < _SMALL.get((operation, input.dtype), 0)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which kernel ``function(*args, **kwargs)`` would run under the backend now asked for, and why; nothing is run.

    Args:
        function: one that fastformer.functional accelerates.
        args, kwargs: its arguments.

    Raises:
        TypeError, ValueError: what the call itself would raise for these arguments.
    """
    global explaining
    if not str(getattr(function, "__module__", "")).startswith("fastformer."):
        return f"{getattr(function, '__name__', function)}: torch (fastformer leaves this function alone)"
    explaining = True
    try:
        function(*args, **kwargs)
    except Explained as explained:
        return f"{function.__name__}: {explained.choice.kernel} ({explained.choice.reason})"
    finally:
        explaining = False
    return f"{function.__name__}: torch (these arguments are torch's own case)"


def decide(
    operation: str,
    device: str,
    dtype: torch.dtype,
    request: str,
    *,
    unsupported: str = "",
    torch_lacks: str = "",
    small: bool = False,
) -> Choice:
    """The kernel for one call, and why: a function of its arguments and of what this installation has.

    Args:
        operation: an operation of EVIDENCE.
        device, dtype: device type and dtype of the tensors.
        request: one of NAMES.
        unsupported: what our kernels can't do here (a dtype, a size), or empty.
        torch_lacks: what torch's own function can't do here, or empty.
        small: the tensors are below the size from which ours was measured to be faster.

    Raises:
        ValueError: the request names a kernel that can't do this.
    """
    if request in ("torch", "reference"):
        return Choice(request, "requested")
    if not unsupported and dtype not in KERNEL_DTYPES:
        unsupported = f"a kernel for {dtype}"
    if request != "auto":
        if not available(request, device):
            raise ValueError(f"backend {request!r} can't run {operation} on {device}: {_missing(request, device)}")
        if request == "cuda" and (lacks := cuda_lacks(operation, dtype)):
            raise ValueError(f"backend 'cuda' can't run {operation}: {lacks}")
        if unsupported:
            raise ValueError(f"backend {request!r} can't run {operation}: {unsupported}")
        return Choice(request, "requested")
    if unsupported:
        return Choice("torch", f"our kernels don't have {unsupported}")
    measured = {"cpu": FASTER, "cuda": FASTER_ON_GPU}.get(device, {}).get((operation, dtype))
    if measured is not None and measured.broken:
        return Choice("torch", f"tuned on this machine {measured.tuned}: ours had wrong answers, or couldn't run")
    if torch_lacks:
        for kernel in (*((measured.kernel,) if measured else ()), "cpu", "triton", "cuda"):
            if available(kernel, device) and not (kernel == "cuda" and cuda_lacks(operation, dtype)):
                return Choice(kernel, f"torch's own function has no {torch_lacks}")
    if device == "cpu" and not CPU_LIBRARY:
        return Choice("torch", _missing("cpu", device))
    if measured is None:
        return Choice("torch", f"no measurement says that ours is faster on {device} in {dtype}")
    if not available(measured.kernel, device):
        return Choice("torch", _missing(measured.kernel, device))
    if measured.kernel == "cuda" and (lacks := cuda_lacks(operation, dtype)):
        return Choice("torch", lacks)
    kernel = "torch" if small else measured.kernel
    if measured.tuned:
        return Choice(kernel, f"tuned on this machine {measured.tuned}: {_where(measured)}")
    if small:
        return Choice(kernel, _where(measured))
    return Choice(kernel, f"measured {measured.speedup} as fast as torch's own, see fastformer/backends.py")


def _where(measured: Measurement) -> str:
    """From which sizes on ours is faster."""
    without, recorded = measured.least
    if without == tuning.NEVER:
        never = recorded == tuning.NEVER
        return "ours is never faster" if never else f"ours is faster with gradients alone, from {recorded} elements on"
    also = "never" if recorded == tuning.NEVER else str(recorded)
    return f"ours is faster from {without} elements on, {also} with gradients"


def cuda_lacks(operation: str, dtype: torch.dtype) -> str:
    """Why the CUDA C++ kernels can't run an operation in a dtype that others can, or the empty string."""
    operation = FORMS.get(operation, operation)
    if operation not in CUDA_OPERATIONS:
        return "it has no CUDA C++ kernels"
    dtypes = CUDA_DTYPES.get(operation, KERNEL_DTYPES)
    return "" if dtype in dtypes else f"its CUDA C++ kernels have {' and '.join(map(str, dtypes))}, not {dtype}"


def _missing(kernel: str, device: str) -> str:
    if kernel == "cpu" and device == "cpu":
        return "this installation was built without a C++ compiler"
    if kernel == "triton" and not TRITON:
        return "Triton is not installed"
    if kernel == "triton" and device == "cpu":
        return "Triton runs on the CPU only when TRITON_INTERPRET=1 is set before fastformer is imported"
    if kernel == "cuda" and device == "cuda":
        return CUDA_PROBLEM
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
