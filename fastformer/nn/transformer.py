"""The encoder-decoder transformer as a module."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastformer.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from fastformer.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from fastformer.nn.normalization import LayerNorm
from fastformer.nn.residual import use_faster_parts


class Transformer(torch.nn.Transformer):
    """torch.nn.Transformer with fastformer's encoder and decoder (Vaswani et al. 2017, arXiv 1706.03762).

    ``custom_encoder`` and ``custom_decoder`` are taken as they are. The arguments of ``forward`` are torch's; they go
    to the encoder and the decoder.
    """

    @functools.wraps(torch.nn.Transformer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # torch's constructor has drawn the parameters, which are the same in our subclasses.
        given = (*args, *kwargs.values())
        for stack, kind, layer_kind in (
            (self.encoder, TransformerEncoder, TransformerEncoderLayer),
            (self.decoder, TransformerDecoder, TransformerDecoderLayer),
        ):
            if all(stack is not argument for argument in given):
                _become(stack, kind, layer_kind)


def _become(stack: torch.nn.Module, kind: type[torch.nn.Module], layer_kind: type[torch.nn.Module]) -> None:
    """Make torch's encoder or decoder ours."""
    stack.__class__ = kind
    stack.norm.__class__ = LayerNorm
    for layer in stack.layers:
        layer.__class__ = layer_kind
        use_faster_parts(layer)
