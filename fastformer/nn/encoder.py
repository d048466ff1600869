"""The transformer encoder and its layer as modules.

Shapes: B batch, S sequence, C d_model.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastformer.nn import masks
from fastformer.nn.nested import through_padding
from fastformer.nn.residual import feed_forward, residual_blocks, use_faster_parts


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer, each residual addition fused into the next norm, and the feed-forward fused.

    A submodule that was replaced by one of another class, or that has hooks, is called instead of being fused.
    """

    @functools.wraps(torch.nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        use_faster_parts(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, shaped like ``src``.

        Args:
            src: [B, S, C] with ``batch_first``, else [S, B, C]; unbatched [S, C]; or a nested tensor, as
                torch.nn.TransformerEncoder makes of a padded batch in eval mode.
            src_mask, src_key_padding_mask, is_causal: MultiheadAttention's attn_mask, key_padding_mask and is_causal.

        Raises:
            TypeError, ValueError: as MultiheadAttention; a mask is given with a nested tensor.
        """
        if src.is_nested:
            _check_no_mask(src_mask=src_mask, src_key_padding_mask=src_key_padding_mask)
            return through_padding(src, lambda padded, padding: self.forward(padded, src_key_padding_mask=padding))
        # Additive as in torch's, for those who override _sa_block.
        mask, padding = masks.additive(src_mask, src.dtype), masks.additive(src_key_padding_mask, src.dtype)
        blocks = (lambda x: self._sa_block(x, mask, padding, is_causal), self._ff_block)
        return residual_blocks(src, (self.norm1, self.norm2), blocks, self.norm_first)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(feed_forward(self, x))


class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder, which calls its layers one after the other and never makes nested tensors.

    Where torch's would, in eval mode without gradients, with padding at the ends of the sequences and no ``mask``, it
    gives zeros at the padded positions (before ``norm``), and so does this one. It differs in that compiling changes
    nothing of that (torch's, compiled, gives no zeros unless ``mask_check`` is False), and in that values of a
    floating-point ``src_key_padding_mask`` other than 0 and -inf are always added to the scores.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The encoder's output, shaped like ``src``.

        Args:
            src: as the layers take it.
            mask, src_key_padding_mask: the layers' src_mask and src_key_padding_mask.
            is_causal: says whether ``mask`` is the causal mask, which then need not be read; None looks at its values,
                except while compiling.

        Raises:
            TypeError, ValueError: as the layers; a mask is given with a nested tensor.
        """
        if src.is_nested:
            _check_no_mask(mask=mask, src_key_padding_mask=src_key_padding_mask)
            return through_padding(src, lambda padded, padding: self.forward(padded, src_key_padding_mask=padding))
        mask, padding = masks.additive(mask, src.dtype), masks.additive(src_key_padding_mask, src.dtype)
        is_causal = masks.is_causal_mask(mask, is_causal)
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=is_causal, src_key_padding_mask=padding)
        if self._clears_padding(src, mask, padding):
            padded = padding != 0
            at_the_end = (padded[:, 1:] >= padded[:, :-1]).all()
            output = output.masked_fill((padded & at_the_end).unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    def _clears_padding(self, src: Tensor, mask: Tensor | None, padding: Tensor | None) -> bool:
        """Whether torch's would take nested tensors, given padding at the ends only."""
        return (
            padding is not None
            and mask is None
            and self.use_nested_tensor
            and not self.training
            and src.dim() == 3
            and torch.backends.mha.get_fastpath_enabled()
            and not torch.is_autocast_enabled()
            and not (torch.is_grad_enabled() and any(x.requires_grad for x in (src, *self.layers.parameters())))
        )


def _check_no_mask(**given: Tensor | None) -> None:
    for name, mask in given.items():
        if mask is not None:
            raise ValueError(f"{name} has shape {tuple(mask.shape)}, must be None since src is a nested tensor")
