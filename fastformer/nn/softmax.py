"""Softmax as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer import functional as F


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax on fastformer's kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)
