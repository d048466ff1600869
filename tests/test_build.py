"""The library and the wheel: what they export, what they need, and at which instruction-set levels they run."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import setuptools
import torch
from support import needs_library

from fastformer import backends, library

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "fastformer" / "lib" / "libfastformer_cpu.so"
CUDA_LIBRARY = LIBRARY.with_name("libfastformer_cuda.so")
needs_cuda_library = pytest.mark.skipif(not CUDA_LIBRARY.exists(), reason="built without nvcc")
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")


def nm(*arguments: str) -> list[str]:
    return subprocess.run(["nm", *arguments], check=True, capture_output=True, text=True).stdout.splitlines()


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    "library",
    [pytest.param(LIBRARY, marks=needs_library), pytest.param(CUDA_LIBRARY, marks=needs_cuda_library)],
    ids=str,
)
def test_needs_only_torchs_c_shim_and_the_c_library(library: Path) -> None:
    entries = [line.split() for line in nm("-D", "--undefined-only", str(library))]
    strong = {name for kind, name in entries if kind == "U" and "@GLIBC_" not in name}
    # _Unwind_*: libgcc_s, which torch itself has loaded; see LINK_FLAGS in setup.py.
    assert {name for name in strong if not re.match(r"aoti_torch_|torch_|_Unwind_", name)} == set()


@needs_cuda_library
def test_the_cuda_library_keeps_its_runtime_to_itself() -> None:
    """Its CUDA runtime must not be taken for torch's, which is another version in the same process."""
    names = [line.split()[-1] for line in nm("-D", "--defined-only", str(CUDA_LIBRARY))]
    assert [name for name in names if re.match("(__)?cu(da)?[A-Z]", name) or "fastformer" in name] == []


@needs_cuda_library
def test_the_cuda_library_is_loaded_under_a_cuda_torch_only() -> None:
    if torch.version.cuda is None:
        assert f"torch {torch.__version__} was built without CUDA" == backends.CUDA_PROBLEM
    elif torch.cuda.is_available():
        assert backends.CUDA_LIBRARY


FAKE_DRIVER = """
#include <stdlib.h>
int cuDriverGetVersion(int* version) { *version = 99000; return 0; }
int cuInit(unsigned flags) { abort(); }
"""
LOAD_AS_A_CUDA_TORCH_DOES = """
import ctypes, sys, torch
import fastformer
ctypes.CDLL(sys.argv[1])  # as torch has loaded its own: for itself alone
torch.ops.load_library(sys.argv[2])
print(repr(torch.ops.fastformer.cuda_problem()))
"""


@needs_cuda_library
def test_loading_the_cuda_library_finds_torchs_functions_and_leaves_the_driver_asleep(
    setup: ModuleType, tmp_path: Path
) -> None:
    functions = "\n".join(f"void {name}(void) {{}}" for name in setup.TORCH_CUDA)
    for name, code in (("libtorch_cuda.so", functions), ("libcuda.so.1", FAKE_DRIVER)):
        command = ["c++", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", str(tmp_path / name)]
        subprocess.run(command, input=code, text=True, check=True)
    result = subprocess.run(
        [sys.executable, "-c", LOAD_AS_A_CUDA_TORCH_DOES, tmp_path / "libtorch_cuda.so", CUDA_LIBRARY],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
    )
    assert result.stdout == "''\n", result.stderr


@needs_library
def test_kernels_share_no_function_between_levels() -> None:
    """A weak symbol compiled with AVX-512 could be the one the linker keeps for the portable level."""
    objects = sorted(path for level in LEVELS for path in (ROOT / "build" / "ninja" / level).glob("*.o"))
    assert {path.parent.name for path in objects} >= {"portable"}
    for path in objects:
        weak = [line for line in nm(str(path)) if line.split()[-2] in "WwVvu"]
        assert weak == [], path


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_up_to_the_processors_gives_the_same_answers(level: str) -> None:
    if LEVELS.index(level) > LEVELS.index(best_level()):
        pytest.skip(f"this processor has only {best_level()}")
    code = """
import torch, fastformer.functional as F
print(torch.ops.fastformer.cpu_isa())
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = torch.randn(7, 77, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype).requires_grad_()
    w = torch.linspace(-1, 1, 77).to(dtype).requires_grad_()
    y = F.layer_norm(F.softmax(x, -1) * 50, (77,), w, w)
    y.square().sum().backward()
    y64 = torch.layer_norm(torch.softmax(x.double(), -1) * 50, (77,), w.double(), w.double())
    expected = torch.autograd.grad(y64.square().sum(), (x, w))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), y64, rtol=8 * eps, atol=40 * eps)
    for mine, theirs in zip((x.grad, w.grad), expected):
        atol = 80 * eps * theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=20 * eps, atol=atol)
"""
    result = python(code, FASTFORMER_CPU_ISA=level, FASTFORMER_BACKEND="cpu", TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [level]


@needs_library
def test_a_level_that_does_not_exist_or_is_not_there_is_an_error() -> None:
    result = python("import fastformer", FASTFORMER_CPU_ISA="sse9")
    assert result.returncode != 0
    assert "FASTFORMER_CPU_ISA is 'sse9', must be one of portable, avx2, avx512, avx512_bf16" in result.stderr
    if best_level() != "avx512_bf16":
        result = python("import fastformer", FASTFORMER_CPU_ISA="avx512_bf16")
        assert f"this processor has only {best_level()}" in result.stderr


def best_level() -> str:
    return python(
        "import torch, fastformer; print(torch.ops.fastformer.cpu_isa())", FASTFORMER_CPU_ISA=""
    ).stdout.strip()


def test_the_schemas_python_reads_are_those_the_library_registers() -> None:
    names = [schema.split("(")[0] for schema in library.schemas()]
    assert len(names) == len(set(names)) == 15
    for schema in library.schemas():
        name = schema.split("(")[0]
        registered = getattr(torch.ops.fastformer, name).default._schema
        assert str(torch._C.parse_schema(f"fastformer::{schema}")) == str(registered)


def test_without_the_library_everything_still_runs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fastformer", tmp_path / "fastformer", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch, fastformer, fastformer.functional as F
assert fastformer.__file__.startswith({str(tmp_path)!r})
x = torch.randn(3, 8, requires_grad=True)
F.layer_norm(F.softmax(x, -1), (8,)).sum().backward()
print(fastformer.explain(F.softmax, x, -1))
try:
    with fastformer.backend("cpu"):
        F.softmax(x, -1)
except ValueError as error:
    print(error)
"""
    result = python(code, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("this installation was built without a C++ compiler") == 2


def test_installing_without_a_compiler_succeeds_and_says_so(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "CXX"} | {"PATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler found, so the CPU kernels are not built" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def fake_nvcc(folder: Path, release: str) -> Path:
    """A CUDA_HOME whose nvcc can only say its version."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with none of the caller's settings."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "NVCC_THREADS", "MAX_JOBS", "FORCE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("fastformer_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planned(setup: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """The build.ninja of an installation into a folder, and how ninja would be called."""
    ninja = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess | None:
        return subprocess.run(command, **options) if "--version" in command else ninja.extend(command)

    monkeypatch.setattr(setup, "subprocess", SimpleNamespace(run=run, CalledProcessError=subprocess.CalledProcessError))
    monkeypatch.setattr(setup, "ROOT", folder)
    command = setup.BuildKernels(setuptools.Distribution())
    command.build_lib, command.inplace = str(folder / "out"), False
    command.run()
    return (folder / "build" / "ninja" / "build.ninja").read_text(), ninja


OF_HOPPER = ["arch=compute_90a,code=sm_90a", "arch=compute_90a,code=compute_90a"]


def architectures_of(source: Path, plan: str) -> list[str]:
    """What build.ninja has a file of csrc/cuda compiled for; nothing if it leaves it out."""
    found = re.search(rf"build cuda/{source.stem}.o: nvcc {source}\n  architectures = (.*)", plan)
    return re.findall("-gencode=(\\S+)", found[1]) if found else []


def test_without_hopper_in_the_list_its_kernels_are_left_out(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda", "12.8")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    text, _ = planned(setup, tmp_path, monkeypatch)
    assert "FASTFORMER_SM90A" not in text
    assert "_hopper.cu" not in text
    assert architectures_of(ROOT / "csrc" / "cuda" / "softmax.cu", text)


def test_the_environment_says_what_is_built(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda", "12.8")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 8.9;9.0a+PTX")
    monkeypatch.setenv("NVCC_THREADS", "3")
    monkeypatch.setenv("MAX_JOBS", "5")
    text, ninja = planned(setup, tmp_path, monkeypatch)
    assert ninja[-2:] == ["-j", "5"]
    (command,) = (line for line in text.splitlines() if "cuda/bin/nvcc" in line and " -c " in line)
    assert "--threads 3" in command
    assert "-DFASTFORMER_SM90A" in command
    chosen = ["arch=compute_80,code=sm_80", "arch=compute_89,code=sm_89", *OF_HOPPER]
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        expected = OF_HOPPER[:1] if source.stem.endswith("_hopper") else chosen
        assert architectures_of(source, text) == expected, source

    stale = tmp_path / "out" / "fastformer" / "lib" / "libfastformer_cuda.so"
    stale.touch()
    monkeypatch.setenv("FORCE_CUDA", "0")
    text, _ = planned(setup, tmp_path, monkeypatch)
    assert "nvcc" not in text and "libfastformer_cpu.so" in text
    assert not stale.exists()


def test_by_default_code_for_ampere_and_hopper_and_ptx_for_later_ones(setup: ModuleType) -> None:
    flags = setup.architecture_flags(setup.ARCHITECTURES)
    assert [flag.rpartition("code=")[2] for flag in flags] == ["sm_80", "compute_80", "sm_90a"]
    with pytest.raises(SystemExit, match=re.escape("has 'Hopper', must be like 8.0, 9.0a or 8.0+PTX")):
        setup.architecture_flags("8.0;Hopper")
    assert setup.architecture_flags("7.0 7.5+PTX 8.6") == setup.architecture_flags("8.6")
    with pytest.raises(SystemExit, match=r"is '7\.0', must have 8\.0 or later"):
        setup.architecture_flags("7.0")


def test_force_cuda_makes_a_missing_or_old_nvcc_an_error(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda", "11.8")))
    with pytest.raises(SystemExit, match=r"FORCE_CUDA=1, but .*/cuda/bin/nvcc is older than CUDA 12\.0"):
        planned(setup, tmp_path, monkeypatch)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="FORCE_CUDA=1, but there is no C\\+\\+ compiler"):
        planned(setup, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-build-isolation",
        "--no-deps",
        "-q",
        "-w",
        str(folder),
    ]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_fits_every_python_and_exposes_fastformer_alone(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastformer"}
    wanted = {
        "fastformer/ops.cpp",
        "fastformer/triton_kernels/softmax.py",
        "fastformer/benchmarks/harness.py",
        *({"fastformer/lib/libfastformer_cpu.so"} if backends.CPU_LIBRARY else ()),
        *({"fastformer/lib/libfastformer_cuda.so"} if CUDA_LIBRARY.exists() else ()),
    }
    assert wanted <= set(names)
    assert wheel.stat().st_size < 40_000_000


def test_the_installed_wheel_runs_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"""
import sys
sys.path[:] = [{str(tmp_path)!r}] + [p for p in sys.path if p not in ("", {str(ROOT)!r})]
import torch, fastformer, fastformer.functional as F, fastformer.triton_kernels.softmax
assert fastformer.__file__.startswith({str(tmp_path)!r}), fastformer.__file__
with fastformer.backend("cpu" if {backends.CPU_LIBRARY} else "torch"):
    print(F.softmax(torch.zeros(2, 4), -1).tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str([[0.25] * 4] * 2)


LARGE_OUTPUT = """
import torch, fastformer, fastformer.functional as F
with fastformer.backend("cpu"):
    y = F.softmax(torch.zeros(4096, 4096), -1)
middle = y.data_ptr() + y.nbytes // 2
for line in open("/proc/self/smaps"):
    fields = line.split()
    if not fields[0].endswith(":"):
        first, last = (int(address, 16) for address in fields[0].split("-"))
    elif fields[0] == "VmFlags:" and first <= middle < last:
        print("hg" in fields, y.sum().item())
"""


@needs_library
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no Linux")
@pytest.mark.parametrize("switch", ["0", "1", ""])
def test_large_outputs_ask_for_large_pages(switch: str) -> None:
    balloons = Path("/sys/bus/virtio/drivers/virtio_balloon").glob("virtio*/features")
    host_takes_free_pages = any(path.read_text()[5] == "1" for path in balloons)
    result = python(LARGE_OUTPUT, THP_MEM_ALLOC_ENABLE=switch)
    wanted = switch == "1" or (switch == "" and not host_takes_free_pages)
    assert result.stdout.split() == [str(wanted), "4096.0"], result.stderr
