"""The linear layer as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer import functional as F


class Linear(torch.nn.Linear):
    """torch.nn.Linear on fastformer's kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)
