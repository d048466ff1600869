"""Fused Triton and C++ kernels for transformers, behind PyTorch's own names.

    from fastformer import nn               # torch.nn with faster layers
    import fastformer.functional as F       # torch.nn.functional, likewise
    fastformer.accelerate(model)            # swaps the layers of a model that is already built, and
    fastformer.restore(model)               # puts them back

Not related to the 2021 "Fastformer" model.
"""

__version__ = "0.1.0"

from fastformer import functional, nn
from fastformer.accelerate import accelerate, restore
from fastformer.backends import backend, explain, set_backend

__all__ = ["accelerate", "backend", "explain", "functional", "nn", "restore", "set_backend"]
