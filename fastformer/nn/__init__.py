"""torch.nn with the modules that fastformer makes faster in place of torch's.

They subclass torch's: same constructor, parameters and initialisation, so a checkpoint loads both ways. Every other
name is torch's own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.nn as _torch_nn

from fastformer import functional
from fastformer.nn.feed_forward import FeedForward
from fastformer.nn.multihead_attention import MultiheadAttention
from fastformer.nn.normalization import LayerNorm, RMSNorm
from fastformer.nn.softmax import Softmax
from fastformer.nn.transformer import TransformerEncoderLayer

__all__ = [
    "FeedForward",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Softmax",
    "TransformerEncoderLayer",
    "functional",
]
__all__ += [name for name in dir(_torch_nn) if not name.startswith("_") and name not in __all__]

sys.modules[f"{__name__}.functional"] = functional  # so that `import fastformer.nn.functional as F` works


def __getattr__(name: str) -> Any:
    return getattr(_torch_nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch_nn)})
