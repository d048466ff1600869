"""Nested tensors, which torch.nn.TransformerEncoder makes of padded batches in eval mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def through_padding(src: Tensor, forward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``forward(padded, padding)`` of a nested tensor's padded batch, nested again.

    ``src`` has B sequences [S_b, C]; ``padded`` is [B, S, C] and ``padding`` [B, S], True where there is padding.
    """
    lengths = [len(sequence) for sequence in src.unbind()]
    padded = src.to_padded_tensor(0.0)
    positions = torch.arange(padded.shape[1], device=src.device)
    padding = positions >= torch.tensor(lengths, device=src.device).unsqueeze(1)
    output = forward(padded, padding)
    rows = [row[:length] for row, length in zip(output, lengths)]
    return torch.nested.as_nested_tensor(rows, layout=src.layout)
