"""softmax with scale and mask: one forward operator, one backward operator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops import _common


def softmax(
    input: Tensor, dim: int, *, scale: float = 1.0, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """softmax of ``scale * input + mask`` along ``dim``; see functional.softmax for the arguments."""
    if dim == -1 and mask is None and not is_causal and _common.ordinary(input):
        try:
            if input.dim() and -math.inf < scale < math.inf:
                record = _common.needs_grad(input)
                kernel = backends.choose("softmax", input, record=record)
                if kernel in ("cpu", "torch"):
                    return _run(kernel, record, input, -1, scale, None, False)
        except _common.CAUGHT:
            pass  # see _common.ordinary
    _check(input, dim, scale, mask, is_causal)
    if autocast_to_float(input):
        input = input.float()
    unsupported = _common.unsupported(input, mask)
    if not unsupported and input.dim() == 0:
        unsupported = "a kernel for tensors without dimensions"
    if not unsupported and dim not in (-1, input.dim() - 1) and backends.requested() == "auto":
        unsupported = "a kernel along any but the last dimension"
    record = _common.needs_grad(input, mask)
    kernel = backends.choose("softmax", input, unsupported=unsupported, record=record)
    return _run(kernel, record, input, dim, scale, mask, is_causal)


def _run(
    kernel: str, record: bool, input: Tensor, dim: int, scale: float, mask: Tensor | None, is_causal: bool
) -> Tensor:
    if kernel == "torch":
        return _torch(input, dim, scale, mask, is_causal)
    last = dim == -1 or dim == input.dim() - 1 or input.dim() == 0
    x = input if last else input.transpose(dim, -1)
    if kernel == "reference":
        y = reference.softmax(x, scale=scale, mask=mask, is_causal=is_causal).to(input.dtype)
    elif mask is not None and x.dim() > 4:  # the kernels broadcast masks over four dimensions
        flat_mask = mask.expand(x.shape).flatten(0, -4)
        y = _forward(record, x.flatten(0, -4), flat_mask, scale, is_causal).view(x.shape)
    else:
        y = _forward(record, x, mask, scale, is_causal)
    return y if last else y.transpose(dim, -1)


def autocast_to_float(input: Tensor) -> bool:
    """Autocast computes softmax and norms in float32 on GPUs, and leaves them alone on CPUs, as torch does."""
    return input.device.type != "cpu" and _common.autocast_dtype(input) is not None


def _check(input: Tensor, dim: int, scale: float, mask: Tensor | None, is_causal: bool) -> None:
    _common.check_tensor("input", input)
    if not -max(input.dim(), 1) <= dim < max(input.dim(), 1):
        raise IndexError(f"dim is {dim}, must be in [{-max(input.dim(), 1)}, {max(input.dim(), 1) - 1}]")
    _common.check_finite("scale", scale)
    if mask is None and not is_causal:
        return
    if dim not in (-1, input.dim() - 1):
        raise ValueError(f"dim is {dim}, must be the last when mask or is_causal is given")
    if is_causal and input.dim() < 2:
        raise ValueError(f"input has shape {tuple(input.shape)}, must have at least 2 dimensions when is_causal")
    if mask is not None:
        _common.check_tensor("mask", mask, floating=mask.dtype != torch.bool)
        _common.check_like("mask", mask, "input", input, dtype=False)
        _common.check_broadcast("mask", mask, input.shape)


def _torch(input: Tensor, dim: int, scale: float, mask: Tensor | None, is_causal: bool) -> Tensor:
    """torch's own softmax; rows with nothing to attend to give zeros."""
    if scale == 1.0 and mask is None and not is_causal:
        return torch.softmax(input, dim)
    scores = input * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if is_causal:
        scores = scores.masked_fill(~reference.causal_mask(*scores.shape[-2:], device=scores.device), -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


@torch.library.register_fake("fastformer::softmax_forward")
def _(input: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastformer::softmax_backward")
def _(grad_output: Tensor, output: Tensor, scale: float) -> Tensor:
    return torch.empty_like(output, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, ctx.scale, _ = inputs
    ctx.mask_shape = mask.shape if mask is not None and mask.requires_grad else None
    ctx.backend = backends.requested()
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    (output,) = ctx.saved_tensors
    grad_input = grad_mask = None
    with _common.forwards_backend(ctx):
        if ctx.needs_input_grad[0]:
            grad_input = _vjp(grad, output, ctx.scale)
        if ctx.mask_shape is not None:
            grad_mask = _vjp(grad, output, 1.0).sum_to_size(ctx.mask_shape)
    return grad_input, grad_mask, None, None


def _vjp(grad: Tensor, output: Tensor, scale: float) -> Tensor:
    if torch.is_grad_enabled():  # create_graph: the formula, which has gradients
        return scale * output * (grad - (grad * output).sum(-1, keepdim=True))
    return _backward_kernel(grad, output, scale)


_forward = _common.differentiable("softmax_forward", _setup_context, _backward)
_backward_kernel = _common.kernel("softmax_backward")
_common.register("softmax", ["softmax_forward", "softmax_backward"])
