"""What the compiler gave each kernel of libfastformer_cuda.so: ``python tests/cuda_resources.py`` prints a table."""

from __future__ import annotations

import itertools
import re
import subprocess
from dataclasses import dataclass
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


def kernels() -> list[Kernel]:
    """Every kernel in the library, once for each architecture it was compiled for."""
    text = subprocess.run([cuobjdump(), "--dump-resource-usage", LIBRARY], check=True, capture_output=True).stdout
    lines = subprocess.run(["c++filt"], input=text, check=True, capture_output=True).stdout.decode().splitlines()
    found = []
    architecture = ""
    for line, after in itertools.pairwise(lines):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        if match := re.match(r" Function (?:void )?(.*):$", line):
            used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", after)}
            name = re.sub(r"fastformer::(cuda::)?(\(anonymous namespace\)::)?", "", match[1])
            found.append(
                Kernel(
                    _without_parameters(name), architecture, used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"]
                )
            )
    return found


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
    print("registers  spilled  shared  architecture  kernel")
    for kernel in sorted(kernels(), key=lambda kernel: (kernel.name, kernel.architecture)):
        print(f"{kernel.registers:9}  {kernel.spilled:7}  {kernel.shared:6}  {kernel.architecture:12}  {kernel.name}")


if __name__ == "__main__":
    main()
