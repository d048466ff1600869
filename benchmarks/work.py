"""What a backward pass adds to the work of a forward one."""

from __future__ import annotations

from .harness import BACKWARD, FORWARD, TRAINING, Work


def of_training(forward: Work, backward: Work, *, saved: int = 0) -> dict[str, Work]:
    """The work of each mode: FLOPs of both passes add up, and so do their bytes, as in a model, which runs all layers
    behind this one between the two. Here a cache may keep some of them: a share of the limit above 1 is possible.

    Args:
        saved: bytes that the forward pass writes for the backward pass alone, which reads them.
    """
    both = Work(bytes=forward.bytes + backward.bytes + saved, flops=forward.flops + backward.flops)
    return {FORWARD: forward, BACKWARD: backward, TRAINING: both}
