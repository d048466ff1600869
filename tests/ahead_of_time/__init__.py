"""Compiles the Triton kernels for GPUs that need not be there, and holds what they use to the hardware's limits.

Each operation X has a module X here whose ``cases(target)`` lists its kernels with the configurations they are launched
in. ``python -m tests.ahead_of_time sm_80 sm_90`` compiles them all. It must not run under Triton's interpreter.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import re
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one block may have. sm_86, sm_89 and sm_120, which have the least, take sm_80's tiles.
SHARED_LIMITS = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Columns of tensor memory that a Blackwell multiprocessor has.
TENSOR_MEMORY_LIMIT = 512
# The modules with cases: the operations' and ``broken``.
MODULES = sorted({module.name for module in pkgutil.iter_modules(__path__)} - {"__main__", "matrix"})


@dataclass(frozen=True)
class Case:
    """One compilation of a kernel.

    ``signature`` gives each argument's type as Triton writes it: "*bf16", "fp32", "i32", "tensordesc<...>", or
    "constexpr", whose value is in ``constexprs``. Pointers are taken to be aligned to 16 bytes, as torch's are; an
    integer that is a multiple of 16 is written "i32:16".
    """

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    options: dict[str, int] = field(default_factory=dict)
    uses: str = ""  # an instruction that its PTX must have
    may_spill: str = ""  # the dated measurement which shows that it is faster so; empty: it may not
    thorough: bool = False  # so like another case that only a thorough check compiles it


@dataclass(frozen=True)
class Outcome:
    """What one compiled case uses, a thread's registers and spilled bytes and a block's shared memory in bytes."""

    operation: str
    case: str
    target: str
    registers: int
    spilled: int
    shared: int
    problem: str = ""  # why it fails the check; empty: it passes


def operations() -> list[str]:
    """The operations that have cases."""
    return [name for name in MODULES if name != "broken"]


def cases(operation: str, target: str, *, quick: bool = False) -> list[Case]:
    """The cases of one operation on one of TARGETS; quick: without the thorough ones."""
    found = importlib.import_module(f"{__name__}.{operation}").cases(TARGETS[target])
    return [case for case in found if not (quick and case.thorough)]


def check(operation: str, case: Case, target: str) -> Outcome:
    """Compile one case and compare what it uses with the limits."""
    try:
        registers, spilled, shared = _compile(case, TARGETS[target])
    except Exception as error:  # whatever the compiler raises is this case's result; the others still run
        while error.__cause__ is not None:
            error = error.__cause__
        reason = (str(error).strip() or "no message").splitlines()[-1]
        return Outcome(operation, case.name, target, 0, 0, 0, f"does not compile: {type(error).__name__}: {reason}")
    problem = ""
    if shared > SHARED_LIMITS[target]:
        problem = f"{shared} bytes of shared memory, the limit is {SHARED_LIMITS[target]}"
    elif spilled and not case.may_spill:
        problem = f"spills {spilled} bytes a thread"
    return Outcome(operation, case.name, target, registers, spilled, shared, problem)


def _compile(case: Case, target: GPUTarget) -> tuple[int, int, int]:
    """(registers, spilled bytes a thread, shared bytes a block)."""
    attributes = {}
    signature = {}
    for place, name in enumerate(case.kernel.arg_names):
        kind, _, divisor = case.signature[name].partition(":")
        signature[name] = kind
        if kind.startswith("*") or divisor == "16":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, case.constexprs, attributes)
    compiled = triton.compile(source, target=target, options=dict(case.options))
    if case.uses not in compiled.asm.get("ptx", case.uses):
        raise ValueError(f"{case.uses} is not used")
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    if tensor_memory > TENSOR_MEMORY_LIMIT:  # the compiler gives a program that does nothing
        raise ValueError(f"{tensor_memory} columns of tensor memory, the limit is {TENSOR_MEMORY_LIMIT}")
    if target.backend == "hip":
        registers, spilled = _amd_usage(compiled.asm["amdgcn"])
    else:
        registers, spilled = _nvidia_usage(compiled.asm["cubin"])
    return registers, spilled, compiled.metadata.shared


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    used = {
        name: int(value)
        for name, value in re.findall(r"\.(vgpr_count|agpr_count|private_segment_fixed_size):\s+(\d+)", assembly)
    }
    return used["vgpr_count"] + used["agpr_count"], used["private_segment_fixed_size"]


@functools.cache
def cuobjdump() -> str:
    """The program in Triton's wheel; a copy of it where an installer has dropped its permission to run."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if os.access(program, os.X_OK):
        return str(program)
    copy = Path(tempfile.gettempdir()) / f"cuobjdump-{triton.__version__}-{os.getpid()}"
    shutil.copyfile(program, copy)
    copy.chmod(stat.S_IRWXU)
    return str(copy)
