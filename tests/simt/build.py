"""Compiles csrc/cuda and the emulator with the host's compiler into one Python module under build/simt, with ninja."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

# Another copy of csrc/ and tests/simt/ than this one: see delete_barriers.py.
ROOT = Path(os.environ.get("FASTFORMER_SIMT_ROOT") or Path(__file__).resolve().parents[2])
HERE = ROOT / "tests" / "simt"
WORK = ROOT / "build" / "simt"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
KERNEL_FLAGS = ["-x c++", "-O1", "-g1", "-DFASTFORMER_SIMT", "-Wno-unknown-pragmas", "-Wno-psabi", f"-I{HERE}"]
# What -fsanitize calls is the emulator's own: nothing is linked with that flag.
KERNEL_FLAGS += ["-fsanitize=thread,alignment,bounds-strict"]
KERNEL_FLAGS += [f"-fno-builtin-{name}" for name in ("memcpy", "memmove", "memset")]  # else expanded without hooks
RUNTIME_FLAGS = ["-O2"]


@functools.cache
def compiler() -> str | None:
    """GCC's C++ compiler, which has the hooks: $CXX or one on the path; None without one."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and shutil.which(name):
            version = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout
            if "Free Software Foundation" in version:
                return name
    return None


def build() -> Path:
    """The module, built if anything changed since. Raises RuntimeError if that fails.

    FASTFORMER_SIMT_KERNELS=softmax,rotary: with these files of csrc/cuda only.
    """
    kernels, work = sorted((ROOT / "csrc" / "cuda").glob("*.cu")), WORK
    names = os.environ.get("FASTFORMER_SIMT_KERNELS")
    if names is not None:
        kernels = [kernel for kernel in kernels if kernel.stem in names.split(",")]
        work = WORK / ("-".join(kernel.stem for kernel in kernels) or "none")
    work.mkdir(parents=True, exist_ok=True)
    module = work / f"fastformer_simt{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write_if_changed(work / "build.ninja", _ninja_file(kernels, module))
        result = subprocess.run([_ninja(), "-C", str(work), "--quiet"], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the emulator can't be built:\n{result.stdout}{result.stderr}")
    return module


def load() -> ModuleType:
    """The module, built if need be, imported once; its operators are then in ``torch.ops.fastformer_simt``.

    Its functions are those of bindings.cpp.
    """
    name = "fastformer_simt"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, build())
    assert spec is not None
    assert spec.loader is not None
    _define_operators(name)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    sys.modules[name] = loaded
    return loaded


_LIBRARIES: list[object] = []  # a torch library's definitions go when it does


def _define_operators(namespace: str) -> None:
    import torch

    from fastformer.library import schemas

    library = torch.library.Library(namespace, "FRAGMENT")
    for schema in schemas():
        library.define(schema)
    _LIBRARIES.append(library)


def _ninja() -> str:
    from ninja import BIN_DIR

    return str(Path(BIN_DIR) / "ninja")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _ninja_file(kernels: Sequence[Path], module: Path) -> str:
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    cxx = compiler()
    if cxx is None:
        raise RuntimeError("the emulator needs a C++ compiler")
    python = [f"-isystem {path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    torch = [STABLE_ABI, *(f"-isystem {path}" for path in include_paths())]
    lines = [
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {' '.join(FLAGS)} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} -shared $in -o $out {' '.join(f'-L{path}' for path in library_paths())}"
        " -ltorch_cpu -ltorch -lc10",
    ]
    objects = []

    def compile_object(source: Path, name: str, flags: Sequence[str]) -> None:
        objects.append(f"{name}.o")
        lines.extend([f"build {name}.o: cxx {source}", f"  flags = {' '.join(flags)}"])

    # The emulator's first: of an inline function that several files have, the linker keeps the first, and what the
    # emulator calls must not be instrumented.
    for source in sorted(HERE.glob("*.cpp")):
        compile_object(source, source.stem, [*RUNTIME_FLAGS, *python])
    for source in sorted((HERE / "kernels").glob("*.cu")):
        compile_object(source, f"kernels/{source.stem}", [*KERNEL_FLAGS, *torch, f"-I{ROOT / 'csrc/cuda'}"])
    for source in kernels:
        compile_object(source, f"cuda/{source.stem}", [*KERNEL_FLAGS, *torch])
    lines += [f"build {module}: link {' '.join(objects)}", ""]
    return "\n".join(lines)
