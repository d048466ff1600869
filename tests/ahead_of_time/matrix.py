"""``python tests/ahead_of_time/matrix.py``: the ahead-of-time check under every Triton and for every GPU we support.

Each Triton is installed into a folder of its own under build/, which stands before this environment's on the path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRITONS = ("3.6.0", "3.7.1", "3.9.0")  # those of torch 2.11, 2.13 and 2.15
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def install(version: str) -> Path:
    """The folder that holds this Triton, installed if it is not there yet."""
    folder = ROOT / "build" / f"triton-{version}"
    if not (folder / f"triton-{version}.dist-info").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*command, "--target", str(folder), f"triton=={version}"], check=True)
    return folder


def main() -> int:
    """Run the check under each Triton, with the arguments given here behind the targets; 1 if any failed."""
    failed = []
    for version in TRITONS:
        folder = install(version)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH")]))
        found = subprocess.run(
            [sys.executable, "-c", "import triton; print(triton.__version__)"],
            env=environment, cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        if found != version:
            raise RuntimeError(f"Triton {version} was installed into {folder}, but {found} is imported")
        command = [sys.executable, "-m", "tests.ahead_of_time", *TARGETS, *sys.argv[1:]]
        if subprocess.run(command, env=environment, cwd=ROOT).returncode:
            failed.append(version)
    print(f"failed under Triton {', '.join(failed)}" if failed else f"passed under Triton {', '.join(TRITONS)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
