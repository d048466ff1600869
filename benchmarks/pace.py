"""How much of a suite is run: which contestants, in which modes, and for how long."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from .case import FORWARD, OURS, TRAINING

# By which share of the suite's time a run may be behind its schedule and still do these. Whole models come first, and
# what follows them can catch up.
AUTOTUNE_LAG, COMPILE_LAG, SAMPLES_LAG, MODELS_LAG = 0.0, 0.04, 0.06, 0.15
LATE_SHARE = 0.1  # of a row's time, beyond that lag: enough samples of what takes milliseconds


@dataclass
class Pace:
    """How much time to spend, and on what.

    Under ``suite_seconds`` there is a schedule, ``done`` being how much of the suite should have been run by now: a
    machine that falls behind it takes fewer samples and compiles fewer peers. With ``cut``, what has not begun by then
    is left out.
    """

    row_seconds: float = 0.5
    min_rounds: int = 3
    max_rounds: int = 100
    modes: Collection[str] = (FORWARD, TRAINING)
    only: Collection[str] = ()  # contestants by name or by the part before the colon; none: all
    skip: Collection[str] = ()
    thorough: bool = False  # peers that are slow to make, too: torch.compile's max-autotune
    cuda_graphs: bool = False
    suite_seconds: float | None = None
    cut: bool = False
    started: float = field(default_factory=time.monotonic)
    done: float = 0.0

    def wants(self, name: str) -> bool:
        """Is this contestant to be timed? Ours always is; "ours: compile" goes with the compiled peers."""
        names = {name, name.removeprefix(f"{OURS}: ").partition(":")[0]}
        return name == OURS or ((not self.only or not names.isdisjoint(self.only)) and names.isdisjoint(self.skip))

    def behind(self) -> float:
        """How far the run is behind its schedule, as a share of the suite's time; negative: it is ahead."""
        if self.suite_seconds is None:
            return -1.0
        return (time.monotonic() - self.started) / self.suite_seconds - self.done

    def is_over(self) -> bool:
        """Is what has not begun to be left out?"""
        return self.cut and self.behind() + self.done >= 1

    def row_budget(self) -> float:
        """Seconds of calls that a row may take beyond ``min_rounds``."""
        return self.row_seconds * (LATE_SHARE if self.behind() > SAMPLES_LAG else 1.0)

    def why_not_compile(self, lag: float = COMPILE_LAG) -> str:
        """The reason not to compile another peer, "" if there is none: being behind by more than ``lag``."""
        return "no time left for compiling in this suite" if self.behind() > lag else ""
