"""The transformer decoder and its layer as modules.

Shapes: B batch, T target sequence, S source sequence, C d_model.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastformer.nn import masks
from fastformer.nn.residual import feed_forward, residual_blocks, use_faster_parts


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer, each residual addition fused into the next norm, and the feed-forward fused.

    A submodule that was replaced by one of another class, or that has hooks, is called instead of being fused.
    """

    @functools.wraps(torch.nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        use_faster_parts(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, shaped like ``tgt``.

        Args:
            tgt: [B, T, C] with ``batch_first``, else [T, B, C]; unbatched [T, C].
            memory: the encoder's output, [B, S, C], [S, B, C] or [S, C].
            tgt_mask, tgt_key_padding_mask, tgt_is_causal: MultiheadAttention's attn_mask, key_padding_mask and
                is_causal for the attention from ``tgt`` to itself: [T, T] or [B * H, T, T], and [B, T].
            memory_mask, memory_key_padding_mask, memory_is_causal: those for the attention from ``tgt`` to ``memory``:
                [T, S] or [B * H, T, S], and [B, S].

        Raises:
            TypeError, ValueError: as MultiheadAttention.
        """
        blocks = (
            lambda x: self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal),
            lambda x: self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal),
            self._ff_block,
        )
        return residual_blocks(tgt, (self.norm1, self.norm2, self.norm3), blocks, self.norm_first)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(feed_forward(self, x))


class TransformerDecoder(torch.nn.TransformerDecoder):
    """torch.nn.TransformerDecoder, which compiles whole: a mask is looked at only outside torch.compile."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The decoder's output, shaped like ``tgt``.

        Args:
            tgt, memory, masks: as the layers take them.
            tgt_is_causal: says whether ``tgt_mask`` is the causal mask, which then need not be read; None looks at its
                values, except while compiling.
            memory_is_causal: says that ``memory_mask`` is the causal mask.

        Raises:
            TypeError, ValueError: as the layers.
        """
        tgt_is_causal = masks.is_causal_mask(tgt_mask, tgt_is_causal)
        output = tgt
        for layer in self.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal,
            )
        return output if self.norm is None else self.norm(output)
