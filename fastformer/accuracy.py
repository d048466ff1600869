"""The error rule that tests and benchmarks share.

A kernel's answer may be at most ``factor`` times as far from the float64 reference as PyTorch's own answer in the same
dtype, plus two units in the last place of the row's largest value::

    max|ours - ref| <= factor * max|torch - ref| + 2 ulp(max|ref|)        for each row

A row is the last dimension, or as many of the last dimensions as hold 16 elements: the largest of a handful of torch's
errors would be luck.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
MIN_ROW_ELEMENTS = 16


@dataclass(frozen=True)
class Verdict:
    """Outcome of one comparison; ``error`` and ``allowed`` are those of the worst row (largest error over allowed)."""

    ok: bool
    error: float
    allowed: float
    peer_error: float
    row: int

    def __str__(self) -> str:
        return f"error {self.error:.3e}, allowed {self.allowed:.3e} (torch's {self.peer_error:.3e}) in row {self.row}"


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of ``dtype`` at each magnitude (float64 tensor, >= 0)."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(magnitude.clamp(min=info.tiny)))
    return info.eps * torch.exp2(exponent)


def judge(ours: Tensor, torchs: Tensor, reference: Tensor, *, factor: float = FORWARD_FACTOR) -> Verdict:
    """Apply the rule to tensors of one shape; ``ours.dtype`` sets the ulp. Infinities and NaN must agree exactly."""
    if not ours.shape == torchs.shape == reference.shape:
        raise ValueError(
            f"ours, torchs, reference: shapes {ours.shape}, {torchs.shape}, {reference.shape} must be equal"
        )
    if ours.numel() == 0:
        return Verdict(True, 0.0, 0.0, 0.0, 0)
    width = _row_elements(ours.shape)
    mine, peer, exact = (x.detach().double().cpu().reshape(-1, width) for x in (ours, torchs, reference))
    finite = torch.isfinite(exact)
    agree = torch.where(finite, torch.isfinite(mine), (mine == exact) | (mine.isnan() & exact.isnan()))
    distance = torch.where(finite, (mine - exact).abs(), 0.0).nan_to_num(nan=torch.inf).amax(-1)
    distance = torch.where(agree.all(-1), distance, torch.inf)
    peer_distance = torch.where(finite, (peer - exact).abs(), 0.0).nan_to_num(nan=0.0, posinf=0.0).amax(-1)
    allowed = factor * peer_distance + 2 * ulp(torch.where(finite, exact.abs(), 0.0).amax(-1), ours.dtype)
    worst = int((distance / allowed).argmax())
    return Verdict(
        bool((distance <= allowed).all()),
        float(distance[worst]),
        float(allowed[worst]),
        float(peer_distance[worst]),
        worst,
    )


def _row_elements(shape: torch.Size) -> int:
    width = 1
    for size in reversed(shape):
        width *= size
        if width >= MIN_ROW_ELEMENTS:
            break
    return width
