"""What the layers do with attention masks."""

from __future__ import annotations

import torch
from torch import Tensor


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask (True is masked out) as one that is added to the scores; any other as it is."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def is_causal_mask(mask: Tensor | None, hint: bool | None) -> bool:
    """The hint where there is one, else whether the values of ``mask`` are the causal mask's, as torch detects it.

    A mask whose values can't be read here, since it is being compiled or has none (meta, fake, inside vmap), counts as
    not causal: it is then applied, to the same effect. So does one that wants a gradient, which it would not get.
    """
    if mask is None or hint is not None:
        return bool(hint)
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or mask.requires_grad:
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if type(mask) is not Tensor or mask.is_meta:
        return False
    causal = torch.nn.Transformer.generate_square_subsequent_mask(len(mask), device=mask.device, dtype=mask.dtype)
    return torch.equal(mask, causal)
