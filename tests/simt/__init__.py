"""Runs csrc/cuda's kernels on a CPU and reports their races and wrong accesses; see runtime.h."""

from .build import build, compiler, load

__all__ = ["build", "compiler", "load"]
