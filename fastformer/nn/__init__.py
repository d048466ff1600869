"""torch.nn with the modules that fastformer makes faster in place of torch's.

They subclass torch's: same constructor, parameters and initialisation, so a checkpoint loads both ways. Every other
name is torch's own. They are for eager mode, torch.compile and torch.export; torch.jit, which torch has deprecated, is
left out on purpose.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.nn as _torch_nn

from fastformer import functional
from fastformer.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from fastformer.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from fastformer.nn.feed_forward import FeedForward
from fastformer.nn.linear import Linear
from fastformer.nn.multihead_attention import MultiheadAttention
from fastformer.nn.normalization import LayerNorm, RMSNorm
from fastformer.nn.positional_encoding import PositionalEncoding
from fastformer.nn.softmax import Softmax
from fastformer.nn.transformer import Transformer

__all__ = [
    "FeedForward",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "PositionalEncoding",
    "RMSNorm",
    "Softmax",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "functional",
]
if hasattr(_torch_nn, "LinearCrossEntropyLoss"):  # which torch 2.11 doesn't have
    from fastformer.nn.loss import LinearCrossEntropyLoss

    __all__ += ["LinearCrossEntropyLoss"]
__all__ += [name for name in dir(_torch_nn) if not name.startswith("_") and name not in __all__]

sys.modules[f"{__name__}.functional"] = functional  # so that `import fastformer.nn.functional as F` works


def __getattr__(name: str) -> Any:
    return getattr(_torch_nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch_nn)})
