"""What the compiler gave each kernel of libfastformer_cuda.so: ``python tests/cuda_resources.py`` prints a table."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ahead_of_time import cuobjdump

LIBRARY = Path(__file__).parents[1] / "fastformer" / "lib" / "libfastformer_cuda.so"


@dataclass(frozen=True)
class Kernel:
    """A kernel compiled for an architecture; bytes are a thread's (stack, spills) or a block's (static shared)."""

    name: str
    architecture: str
    registers: int
    spilled: int
    shared: int
    threads: int  # of a block, at most: 1024 without launch bounds


def kernels() -> list[Kernel]:
    """Every kernel in the library, once for each architecture it was compiled for."""
    threads = _threads()
    found = []
    architecture = ""
    for line, after in itertools.pairwise(_dump("--dump-resource-usage")):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        if match := re.match(r" Function (\w+):$", line):
            used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", after)}
            spilled = used["STACK"] + used["LOCAL"]
            most = threads.get((architecture, match[1]), 1024)
            found.append(Kernel(match[1], architecture, used["REG"], spilled, used["SHARED"], most))
    names = _readable([kernel.name for kernel in found])
    return [replace(kernel, name=name) for kernel, name in zip(found, names, strict=True)]


def instructions(function: str, architecture: str) -> dict[str, list[str]]:
    """The machine code of each kernel made of a function template, an instruction a line, by readable name."""
    code: dict[str, list[str]] = {}
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [cuobjdump(), "--extract-elf", f".{architecture}.", LIBRARY], cwd=folder, check=True, capture_output=True
        )
        files = [file for file in Path(folder).iterdir() if function.encode() in file.read_bytes()]
        for line in itertools.chain.from_iterable(_dump("--dump-sass", of=file) for file in files):
            if match := re.match(r"\s+Function : (\w+)$", line):
                lines = code.setdefault(match[1], [])
            elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                lines.append(match[1])
    readable = zip(_readable(list(code)), code.values(), strict=True)
    return {name: lines for name, lines in readable if name.startswith(f"{function}<")}


def _threads() -> dict[tuple[str, str], int]:
    """The launch bounds by (architecture, mangled name)."""
    found = {}
    architecture = name = ""
    lines = _dump("--dump-elf")
    for line in lines:
        if line.startswith("arch = "):
            architecture = line[7:]
        elif line.startswith(".nv.info."):
            name = line[9:]
        elif line.endswith("EIATTR_MAX_THREADS"):
            next(lines)
            sizes = [int(size, 16) for size in next(lines).split()[1:]]
            found[architecture, name] = math.prod(sizes)
    return found


def _dump(*options: str, of: Path | None = None) -> Iterator[str]:
    """The lines that cuobjdump prints of the library, or of another file."""
    with subprocess.Popen([cuobjdump(), *options, of or LIBRARY], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield line.rstrip("\n")
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, process.args)


def _readable(names: list[str]) -> list[str]:
    """Mangled names as one would write them, without namespaces and parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    short = re.sub(r"fastformer::(cuda::)?(\(anonymous namespace\)::)?", "", text)
    return [_without_parameters(name.removeprefix("void ")) for name in short.splitlines()]


def _without_parameters(name: str) -> str:
    """A function's name with its template arguments, in which there may be parentheses too."""
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def contents() -> list[tuple[str, str]]:
    """(kind, architecture) of each piece of code in the library: ``elf`` for machine code, or ``ptx``."""
    command = [cuobjdump(), "--list-elf", "--list-ptx", LIBRARY]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [(kind.lower(), architecture) for kind, architecture in re.findall(r"(PTX|ELF) file.*\.(sm_\w+)\.", text)]


def main() -> None:
    """Print the table."""
    print("registers  threads  spilled  shared  architecture  kernel")
    for kernel in sorted(kernels(), key=lambda kernel: (kernel.name, kernel.architecture)):
        print(
            f"{kernel.registers:9}  {kernel.threads:7}  {kernel.spilled:7}  {kernel.shared:6}"
            f"  {kernel.architecture:12}  {kernel.name}"
        )


if __name__ == "__main__":
    main()
