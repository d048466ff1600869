"""The error rule that tests and benchmarks share.

A kernel's answer may be at most ``factor`` times as far from the float64 reference as PyTorch's own answer in the same
dtype, plus two units in the last place::

    max|ours - ref| of each row  <=  factor * max|torch - ref|  +  2 ulp(max|ref| of the row)
    rms(ours - ref)              <=  factor * rms(torch - ref)  +  2 ulp(rms(ref))

A row is the last dimension; torch's errors are taken over the whole tensor. Row by row they would be a matter of luck:
torch's flash attention fails such a rule against torch's eager attention in 37 of 160 tensors (float32, bfloat16, five
shapes, outputs and gradients), and the eager one against the flash one in 22, since somewhere among a thousand rows the
rounding errors of one cancel. The second line is what a kernel that rounds more than torch throughout can't meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


@dataclass(frozen=True)
class Verdict:
    """Outcome of one comparison.

    ``error`` and ``allowed`` are those of the worst row (largest error over allowed); ``rms`` and ``rms_allowed`` those
    of the whole tensor.
    """

    ok: bool
    error: float
    allowed: float
    row: int
    rms: float
    rms_allowed: float

    @property
    def share(self) -> float:
        """The error as a share of what is allowed, the worst row's or the whole tensor's: above 1 where not ``ok``."""
        return max(self.error / self.allowed, self.rms / self.rms_allowed)

    def __str__(self) -> str:
        return (
            f"error {self.error:.3e}, allowed {self.allowed:.3e}, in row {self.row};"
            f" rms {self.rms:.3e}, allowed {self.rms_allowed:.3e}"
        )


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of ``dtype`` at each magnitude (float64 tensor, >= 0)."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(magnitude.clamp(min=info.tiny)))
    return info.eps * torch.exp2(exponent)


def judge(ours: Tensor, torchs: Tensor, reference: Tensor, *, factor: float = FORWARD_FACTOR) -> Verdict:
    """Apply the rule to tensors of one shape, on the device of ``reference``; ``ours.dtype`` sets the ulp.

    Infinities and NaN must agree exactly.
    """
    if not ours.shape == torchs.shape == reference.shape:
        raise ValueError(
            f"ours, torchs, reference: shapes {ours.shape}, {torchs.shape}, {reference.shape} must be equal"
        )
    if ours.numel() == 0:
        return Verdict(True, 0.0, 1.0, 0, 0.0, 1.0)
    width = ours.shape[-1] if ours.dim() else 1
    mine, peer, exact = (
        x.detach().to(reference.device, torch.float64).reshape(-1, width) for x in (ours, torchs, reference)
    )
    finite = torch.isfinite(exact)
    agree = torch.where(finite, torch.isfinite(mine), (mine == exact) | (mine.isnan() & exact.isnan()))
    exact = torch.where(finite, exact, 0.0)
    distance = torch.where(agree, torch.where(finite, mine - exact, 0.0).abs(), torch.inf)
    # Where torch overflows, or gives NaN for a row without a visible key, it sets no measure.
    peer_distance = torch.where(finite, peer - exact, 0.0).abs().nan_to_num(nan=0.0, posinf=0.0)

    errors = distance.amax(-1)
    allowed = factor * peer_distance.max() + 2 * ulp(exact.abs().amax(-1), ours.dtype)
    rms, peer_rms, exact_rms = (x.square().mean().sqrt() for x in (distance, peer_distance, exact))
    rms_allowed = factor * peer_rms + 2 * ulp(exact_rms, ours.dtype)
    worst = int((errors / allowed).argmax())
    return Verdict(
        ok=bool((errors <= allowed).all() and rms <= rms_allowed),
        error=float(errors[worst]),
        allowed=float(allowed[worst]),
        row=worst,
        rms=float(rms),
        rms_allowed=float(rms_allowed),
    )
