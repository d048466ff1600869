"""What a benchmark is about: one operation at one size and dtype, beside its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastformer.tuning import short_name

FORWARD = "fwd"
BACKWARD = "bwd"  # the gradients alone: the forward pass runs just before, untimed
TRAINING = "fwd_bwd"
MODES = (FORWARD, BACKWARD, TRAINING)

OURS = "ours"
# The kinds of implementations that --only and --skip choose from, and those of several of a kind.
IMPLEMENTATIONS = (OURS, "eager", "compile", "sdpa", "flex", "chunked", "liger", "flash-attn", "quack")
COMPILE, AUTOTUNED, OURS_COMPILED = "compile", "compile: max-autotune", f"{OURS}: compile"
FLEX = "flex"  # FlexAttention, which compiles too
SDPA_VARIANTS = ("sdpa: math", "sdpa: flash", "sdpa: efficient", "sdpa: cudnn", "sdpa: varlen")
VARIANTS = (AUTOTUNED, OURS_COMPILED, *SDPA_VARIANTS)

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Work:
    """The least a kernel must do: bytes read and written in main memory, floating-point operations."""

    bytes: int
    flops: int
    reads: bool = False  # whether next to all of the bytes are read


@dataclass(frozen=True)
class Case:
    """One operation at one size and dtype.

    ``inputs()`` draws fresh tensors, passed to every function by name; those that require a gradient are
    differentiated. ``work`` has the modes that there are. ``peers`` maps a name ("eager", "sdpa: flash"; see
    IMPLEMENTATIONS) to a function of the same arguments, or to the reason why it is not run. ``judged_by`` names the
    peer whose error sets the allowance, ``compiled`` the one that is also timed under torch.compile. ``few``, of an
    operation over ``rows`` rows: draws the inputs with so many rows instead. ``sizes`` are what a picture of how times
    grow can have on its axis. ``in_place`` names the peers that overwrite what they are given, which is copies then.
    """

    operation: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], dict[str, Tensor]]
    ours: Function
    reference: Function
    peers: dict[str, Function | str]
    work: dict[str, Work]
    judged_by: str = "eager"
    compiled: str | None = None
    rows: int = 0
    few: Callable[[int], dict[str, Tensor]] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    in_place: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.operation} {self.shape} {short_name(self.dtype)}"
