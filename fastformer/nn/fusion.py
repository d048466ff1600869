"""When modules may be fused: a fused function must do what calling each of them would."""

from __future__ import annotations

import torch
from torch.nn.modules.module import _has_any_global_hook

from fastformer.nn.linear import Linear

#: What is a linear layer and nothing else.
LINEAR = (torch.nn.Linear, Linear)


def is_plain(module: torch.nn.Module, *classes: type) -> bool:
    """Whether calling the module runs the forward of one of ``classes`` and no hook, so that it may be fused."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    own_forward = type(module) in classes and "forward" not in module.__dict__
    return own_forward and not any(hooks) and not _has_any_global_hook()
