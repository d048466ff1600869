"""Builds the C++ kernels with ninja: fastformer/lib/libfastformer_cpu.so and, with nvcc, libfastformer_cuda.so.

Both are written against torch's stable ABI and are no Python modules, so one wheel serves every Python from 3.10 and
every torch from 2.11; neither a GPU nor a torch for one is needed. Each file of csrc/cpu/kernels/ is compiled once per
instruction-set level, each of csrc/cuda/ once for every GPU architecture. Without a C++ compiler nothing is built, and
the package runs on Triton's kernels and torch's own.

Environment: CXX, CXXFLAGS, MAX_JOBS; CUDA_HOME or CUDA_PATH, NVCC_THREADS, TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX");
FORCE_CUDA=1 makes it an error if the CUDA kernels can't be built, FORCE_CUDA=0 leaves them out.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
CPU_LIBRARY, CUDA_LIBRARY = "libfastformer_cpu.so", "libfastformer_cuda.so"
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
# The CUDA runtime is inside the library, so that it need not be torch's own version.
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all", "-DUSE_CUDA"]
OLDEST_CUDA = (12, 0)  # the first that knows C++20 and sm_90a
# Ampere and Hopper, whose special instructions only the code for 9.0a may have; newer GPUs translate the PTX.
ARCHITECTURES = "8.0+PTX;9.0a"
HOPPER = "-gencode=arch=compute_90a,code=sm_90a"
OLDEST_ARCHITECTURE = 8
# What the CUDA library takes from a part of torch that a build for CPUs lacks. A library of that name and with these
# functions stands in for it in linking: so the real one is found, which torch has loaded for itself alone.
TORCH_CUDA = (
    "aoti_torch_cuda_mm_out",
    "aoti_torch_cuda_addmm_out",
    "aoti_torch_cuda_mul_Scalar",
    "aoti_torch_get_current_cuda_stream",
)
LEVELS = X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {"portable": []}


class BuildKernels(build_ext):
    """Compiles csrc/ with ninja, incrementally; setuptools only learns where the libraries are."""

    def run(self) -> None:
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        nvcc, missing = find_nvcc() if compiler else (None, "there is no C++ compiler")
        forced = os.environ.get("FORCE_CUDA", "")
        if forced == "1" and nvcc is None:
            raise SystemExit(f"fastformer: FORCE_CUDA=1, but {missing}")
        in_source = self.inplace or getattr(self, "editable_mode", False)
        folder = (ROOT if in_source else Path(self.build_lib).resolve()) / "fastformer/lib"
        folder.mkdir(parents=True, exist_ok=True)
        if nvcc is None or forced == "0":
            (folder / CUDA_LIBRARY).unlink(missing_ok=True)  # of an earlier build, which would be loaded
        if compiler is None:
            print("fastformer: no C++ compiler found, so the CPU kernels are not built", file=sys.stderr)
            return
        work = ROOT / "build" / "ninja"
        work.mkdir(parents=True, exist_ok=True)
        rules = cpu_rules(compiler, folder / CPU_LIBRARY)
        if nvcc is not None and forced != "0":
            (work / "torch_cuda.c").write_text("".join(f"void {name}(void) {{}}\n" for name in TORCH_CUDA))
            rules += cuda_rules(compiler, nvcc, folder / CUDA_LIBRARY)
        (work / "build.ninja").write_text("\n".join([*rules, ""]))
        jobs = os.environ.get("MAX_JOBS")
        try:
            subprocess.run([ninja(), "-C", str(work), *(["-j", jobs] if jobs else [])], check=True)
        except subprocess.CalledProcessError as error:
            hint = "" if nvcc is None or forced else "; FORCE_CUDA=0 leaves the CUDA kernels out"
            raise SystemExit(f"fastformer: the kernels could not be compiled{hint}") from error

    def get_outputs(self) -> list[str]:
        libraries = [Path(self.build_lib) / "fastformer/lib" / name for name in (CPU_LIBRARY, CUDA_LIBRARY)]
        return [str(library) for library in libraries if library.exists()]

    def get_source_files(self) -> list[str]:
        suffixes = (".cpp", ".h", ".cu", ".cuh")
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.suffix in suffixes]


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


def find_nvcc() -> tuple[str | None, str]:
    """The CUDA compiler, or None and why it can't be used. Nothing is asked of torch, whose build may be for CPUs."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
    places = [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None:
        return None, "nvcc is not in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or tuple(map(int, release.groups())) < OLDEST_CUDA:
        return None, f"{nvcc} is older than CUDA {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}"
    return nvcc, ""


def architecture_flags(names: str) -> list[str]:
    """nvcc's flags for a TORCH_CUDA_ARCH_LIST: numbers like 8.0 or 9.0a, each with +PTX or without.

    Lists for a whole machine room name GPUs older than our kernels are for: those are passed over.
    """
    flags = []
    for name in names.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if match is None:
            raise SystemExit(f"fastformer: TORCH_CUDA_ARCH_LIST has {name!r}, must be like 8.0, 9.0a or 8.0+PTX")
        if int(match[1]) < OLDEST_ARCHITECTURE:
            print(
                f"fastformer: no CUDA kernels for {name}, which is older than {OLDEST_ARCHITECTURE}.0", file=sys.stderr
            )
            continue
        number = match[1] + match[2]
        flags += [
            f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in ("sm", "compute")[: 2 if match[3] else 1]
        ]
    if not flags:
        raise SystemExit(f"fastformer: TORCH_CUDA_ARCH_LIST is {names!r}, must have {OLDEST_ARCHITECTURE}.0 or later")
    return flags


def cpu_rules(compiler: str, library: Path) -> list[str]:
    """Lines of build.ninja: one object per wrapper, one per kernel and level, one library."""
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
    return [*rules, f"build {library}: link {' '.join(objects)}"]


def cuda_rules(compiler: str, nvcc: str, library: Path) -> list[str]:
    """Lines of build.ninja: one object per file of csrc/cuda, for all architectures that it is for, and one library."""
    from torch.utils.cpp_extension import include_paths, library_paths

    architectures = architecture_flags(os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or ARCHITECTURES)
    has_hopper = HOPPER in architectures
    flags = [*NVCC_FLAGS, STABLE_ABI, *(["-DFASTFORMER_SM90A"] if has_hopper else [])]
    flags += [f"-isystem {path}" for path in include_paths()]
    threads = os.environ.get("NVCC_THREADS")
    flags += [f"--threads {threads}"] if threads else []
    link = [flag.replace("-Wl,", "-Xlinker=", 1).replace("--exclude-libs,", "--exclude-libs=") for flag in LINK_FLAGS]
    link = [flag if flag.startswith("-X") else f"-Xcompiler={flag}" for flag in link]
    lib_dirs = [f"-L{path}" for path in library_paths()]
    program = next(word for word in reversed(compiler.split()) if not word.startswith("-"))  # of "ccache g++ -m64"
    command = f"{nvcc} -ccbin {program}"
    rules = [
        "rule nvcc",
        f"  command = {command} -MMD -MF $out.d {' '.join(flags)} $architectures -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule stand_in",
        f"  command = {compiler} -shared -fPIC -x c $in -Wl,-soname,$soname -o $out",
        "rule link_cuda",
        f"  command = {command} -shared -cudart static {' '.join(link)} $in -o $out {' '.join(lib_dirs)} -ltorch_cpu"
        " -lrt -lpthread -ldl",
    ]
    objects = []
    for source in sorted((CSRC / "cuda").glob("*.c*")):
        of_hopper = source.stem.endswith("_hopper")
        if source.suffix not in (".cu", ".cpp") or (of_hopper and not has_hopper):
            continue
        objects.append(f"cuda/{source.stem}.o")
        chosen = [HOPPER] if of_hopper else architectures
        rules += [f"build {objects[-1]}: nvcc {source}", f"  architectures = {' '.join(chosen)}"]
    stand_in = "stand_in/libtorch_cuda.so"
    rules += [f"build {stand_in}: stand_in torch_cuda.c", "  soname = libtorch_cuda.so"]
    return [*rules, f"build {library}: link_cuda {' '.join(objects)} {stand_in}"]


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
    # One for both libraries, without a source list: ninja has its own. It makes setuptools build a platform wheel.
    ext_modules=[Extension("fastformer.lib.libfastformer_cpu", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AbiWheel},
)
