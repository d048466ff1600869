"""Builds the CPU kernels into fastformer/lib/libfastformer_cpu.so with ninja.

The library is written against torch's stable ABI and is no Python module, so one wheel serves every Python from 3.10
and every torch from 2.11. Each file of csrc/cpu/kernels/ is compiled once per instruction-set level. Without a C++
compiler nothing is built, and the package runs on Triton's kernels and torch's own.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
# torch's stable C shim as of 2.11; older fields of it stay in newer releases.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# The headers of the vectors serve kernels that use a part of them; GCC 12 warns inside its own AVX-512 headers.
QUIET = ["-Wno-unused-function", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *QUIET]
# libgcc stays shared (torch has it loaded): exceptions are thrown here and caught in torch, and two unwinders in one
# throw abort the process. Only what is used of the static libstdc++ stays, hidden from other libraries.
LINK_FLAGS = ["-static-libstdc++", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-Wl,--no-undefined", "-Wl,-s"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86_LEVELS = {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
LEVELS = X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {"portable": []}


class BuildKernels(build_ext):
    """Compiles csrc/ with ninja, incrementally; setuptools only learns where the library is."""

    def run(self) -> None:
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if compiler is None:
            print("fastformer: no C++ compiler found, so the CPU kernels are not built", file=sys.stderr)
            return
        in_source = self.inplace or getattr(self, "editable_mode", False)
        library = (ROOT if in_source else Path(self.build_lib).resolve()) / "fastformer/lib/libfastformer_cpu.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        work = ROOT / "build" / "ninja"
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(compiler, library))
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([ninja(), "-C", str(work), *(["-j", jobs] if jobs else [])], check=True)

    def get_outputs(self) -> list[str]:
        library = Path(self.build_lib) / "fastformer/lib/libfastformer_cpu.so"
        return [str(library)] if library.exists() else []

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.suffix in (".cpp", ".h")]


class AbiWheel(bdist_wheel):
    """The library uses no Python API, so its wheel fits every Python from 3.10."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "cp310", "abi3", super().get_tag()[2]


def ninja() -> str:
    """The ninja of the ``ninja`` package, or the one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return "ninja"
    return str(Path(BIN_DIR) / "ninja")


def ninja_file(compiler: str, library: Path) -> str:
    """The text of build.ninja: one object per wrapper, one per kernel and level, one library."""
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-isystem {path}" for path in include_paths()]
    lib_dirs = [f"-L{path}" for path in library_paths()]
    rules = [
        f"flags = {' '.join([*CXX_FLAGS, *os.environ.get('CXXFLAGS', '').split()])}",
        "rule cxx",
        f"  command = {compiler} -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared {' '.join(LINK_FLAGS)} $in -o $out {' '.join(lib_dirs)} -ltorch_cpu -ltorch",
    ]
    objects = []

    def compile_object(source: Path, name: str, extra: list[str]) -> None:
        objects.append(f"{name}.o")
        rules.extend([f"build {name}.o: cxx {source}", f"  extra = {' '.join(extra)}"])

    for source in (CSRC / "ops.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))):
        compile_object(source, source.stem, [STABLE_ABI, *includes])
    for source in sorted((CSRC / "cpu" / "kernels").glob("*.cpp")):
        for level, flags in LEVELS.items():
            compile_object(source, f"{level}/{source.stem}", [f"-DFASTFORMER_LEVEL={level}", *flags])
    rules += [f"build {library}: link {' '.join(objects)}", ""]
    return "\n".join(rules)


setup(
    # Named one by one: find_packages() would pick up the top-level folders. The two that are symbolic links keep
    # `triton_kernels` (an import package of Triton's own) and `benchmarks` out of the top level of site-packages.
    packages=[
        "fastformer",
        "fastformer.benchmarks",
        "fastformer.integrations",
        "fastformer.models",
        "fastformer.nn",
        "fastformer.ops",
        "fastformer.triton_kernels",
    ],
    package_data={"fastformer": ["ops.cpp"]},
    include_package_data=False,
    # No source list: ninja has its own. The name makes setuptools build a platform wheel.
    ext_modules=[Extension("fastformer.lib.libfastformer_cpu", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AbiWheel},
)
