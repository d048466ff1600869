"""Loads the compiled kernels, or, where there are none for the CPU, registers the same schemas from Python."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_CPU_LIBRARY = _FOLDER / "lib" / "libfastformer_cpu.so"
_CUDA_LIBRARY = _FOLDER / "lib" / "libfastformer_cuda.so"
_DEFINITIONS = torch.library.Library("fastformer", "FRAGMENT")


def load() -> str:
    """Make ``torch.ops.fastformer`` known; returns the C++ kernels' instruction-set level, or "" if there are none.

    Raises RuntimeError if FASTFORMER_CPU_ISA names no instruction-set level or one that this processor lacks.
    """
    if _CPU_LIBRARY.exists():
        torch.ops.load_library(_CPU_LIBRARY)
        return torch.ops.fastformer.cpu_isa()
    for schema in schemas():
        _DEFINITIONS.define(schema)
    return ""


def load_cuda() -> str:
    """Load the CUDA C++ kernels; returns why there are none here, or "" if there are. No GPU is asked for anything."""
    if not _CUDA_LIBRARY.exists():
        return "this installation was built without nvcc"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"  # and lacks functions that the library calls
    try:
        torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:  # of what Linux says; the package does without
        return f"the CUDA C++ kernels can't be loaded: {error}"
    problem = torch.ops.fastformer.cuda_problem()
    return f"the CUDA C++ kernels can't run: {problem}" if problem else ""


def schemas() -> list[str]:
    """The operator schemas in csrc/ops.cpp: the string literals inside each ``m.def( )``, joined."""
    source = (_FOLDER / "ops.cpp").read_text()
    definitions = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', source)
    return ["".join(re.findall(r'"([^"]*)"', literals)) for literals in definitions]
