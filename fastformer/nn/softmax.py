"""Softmax as a module. Nested tensors are left to torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer import functional as F


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax on fastformer's kernels."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            return super().forward(input)
        return F.softmax(input, self.dim, _stacklevel=5)
