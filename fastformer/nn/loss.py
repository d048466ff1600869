"""Cross-entropy of a linear layer's output as a module."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer.nn.residual import use_faster_parts


class LinearCrossEntropyLoss(torch.nn.LinearCrossEntropyLoss):
    """torch.nn.LinearCrossEntropyLoss on fastformer's kernels, which never hold all the logits.

    As in torch's, ``linear`` holds the parameters and is not called, so that its hooks don't run.
    """

    @functools.wraps(torch.nn.LinearCrossEntropyLoss.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        use_faster_parts(self)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, or with ``reduction="none"`` of the shape of a target of class indices.

        Args:
            input: [N, in_features] or [in_features].
            target: class indices [N, *out_features], int64, or class probabilities [N, num_classes, *out_features];
                without N where input has none.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind, shape, dtype or device.
        """
        weight, bias = self.linear.weight, self.linear.bias
        return F.linear_cross_entropy(
            input,
            weight.unflatten(0, (self.num_classes, *self.out_features)),
            target,
            linear_bias=None if bias is None else bias.unflatten(0, (self.num_classes, *self.out_features)),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )
