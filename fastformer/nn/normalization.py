"""Layer norm and RMS norm as modules. Nested tensors are left to torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer import functional as F


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm on fastformer's kernels."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            return super().forward(input)
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm on fastformer's kernels."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_nested:
            return super().forward(x)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
