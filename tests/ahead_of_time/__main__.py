"""``python -m tests.ahead_of_time [targets] [--operations ...] [--quick] [--json FILE]``: compile and print a table.

Exits with 1 if a case fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import triton

from . import MODULES, TARGETS, Outcome, cases, check, operations


def _check(operation: str, place: int, target: str, quick: bool) -> Outcome:
    return check(operation, cases(operation, target, quick=quick)[place], target)


def _outcomes(chosen: list[str], targets: list[str], quick: bool) -> Iterator[Outcome]:
    """Every outcome as it comes, with a progress line on stderr."""
    jobs = [
        (name, place, target, quick)
        for target in targets
        for name in chosen
        for place in range(len(cases(name, target, quick=quick)))
    ]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        for done, future in enumerate(as_completed([pool.submit(_check, *job) for job in jobs]), 1):
            outcome = future.result()
            line = f"{done}/{len(jobs)} {outcome.target} {outcome.operation}: {outcome.case}"
            print(f"\r{line[:100]:100}", end="", file=sys.stderr, flush=True)
            yield outcome
    print(file=sys.stderr)


def main() -> int:
    """Compile, print, and say whether every case passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.ahead_of_time", description=__doc__)
    parser.add_argument("targets", nargs="*", default=["sm_80", "sm_90"], help=", ".join(TARGETS))
    parser.add_argument("--operations", nargs="+", default=operations(), choices=MODULES)
    parser.add_argument("--quick", action="store_true", help="leave out cases that are much like others")
    parser.add_argument("--json", help="also write the outcomes to this file")
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(TARGETS)
    if unknown:
        parser.error(f"targets: {', '.join(sorted(unknown))} must be among {', '.join(TARGETS)}")

    found = sorted(
        _outcomes(arguments.operations, arguments.targets, arguments.quick),
        key=lambda x: (x.operation, x.case, x.target),
    )
    print(f"Triton {triton.__version__}")
    print(f"{'operation':22} {'case':48} {'target':7} {'registers':>9} {'spilled':>7} {'shared':>7}")
    for x in found:
        print(f"{x.operation:22} {x.case:48} {x.target:7} {x.registers:9} {x.spilled:7} {x.shared:7}  {x.problem}")
    failed = [x for x in found if x.problem]
    print(f"{len(found)} cases, {len(failed)} failed")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([dataclasses.asdict(x) for x in found], file, indent=1)
    return 1 if failed or not found else 0


if __name__ == "__main__":
    sys.exit(main())
