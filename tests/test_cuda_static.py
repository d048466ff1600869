"""What can be said of the CUDA C++ kernels without running them."""

import os
import re
from pathlib import Path

import cuda_resources
import pytest

from fastformer import backends, library

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".cuh", ".h", ".cpp"))
TRANSLATED = [path for path in SOURCES if path.suffix == ".cu"]
# A block has up to 512 threads, among which 65536 registers are shared out.
REGISTER_LIMIT = 128
# Bytes of each block's shared memory that the system keeps from sm_90 on, and counts as the kernel's.
RESERVED = 1024

needs_cuda_library = pytest.mark.skipif(not cuda_resources.LIBRARY.exists(), reason="built without nvcc")


def code_of(path: Path) -> str:
    """The file without its comments."""
    return re.sub(r"//[^\n]*", "", path.read_text())


def operators() -> set[str]:
    names = {schema.split("(")[0] for schema in library.schemas()}
    return {name for name in names if name.rpartition("_")[0] in backends.CUDA_OPERATIONS}


@needs_cuda_library
@pytest.mark.skipif("TORCH_CUDA_ARCH_LIST" in os.environ, reason="built for other architectures than the default")
def test_every_file_is_there_for_every_architecture() -> None:
    contents = cuda_resources.contents()
    for piece in (("elf", "sm_80"), ("elf", "sm_90a"), ("ptx", "sm_80")):
        assert contents.count(piece) == len(TRANSLATED), piece
    assert len(contents) == 3 * len(TRANSLATED)


@needs_cuda_library
def test_no_kernel_spills_or_has_static_shared_memory_or_too_many_registers() -> None:
    kernels = cuda_resources.kernels()
    assert len(kernels) > len(TRANSLATED)
    assert [kernel for kernel in kernels if kernel.spilled] == []
    assert [kernel for kernel in kernels if kernel.shared > (0 if kernel.architecture < "sm_90" else RESERVED)] == []
    assert [kernel for kernel in kernels if kernel.registers > REGISTER_LIMIT] == []


def test_every_operator_is_registered_once() -> None:
    names = [name for path in TRANSLATED for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())]
    assert len(names) == len(set(names))
    assert set(names) == operators()


@pytest.mark.parametrize(
    ("pattern", "home"),
    [
        (r"\basm\b", "ptx.cuh"),
        (r"\b__shared__\b", "device.cuh"),
        (r"<<<", None),
        (r"\bcudaLaunchKernel\w*", "launch.h"),
        (r"\bcuda(Device|Stream|Event)Synchronize\b|\bcudaMalloc\w*|\bcudaFree\w*|\bcudaMem(cpy|set)\w*", None),
        (r"\batomic(Add|Max|Min|Exch|CAS)\b", None),
    ],
)
def test_some_things_have_one_place_or_none(pattern: str, home: str | None) -> None:
    assert {path.name for path in SOURCES if re.search(pattern, code_of(path))} == ({home} if home else set())
