"""Layer norm, RMS norm and their residual-add forms: one pair of operators for all four."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops import _common
from fastformer.ops.softmax import autocast_to_float


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """(normed, summed) of ``summed = input + residual``, or of the input itself, over its last dimensions."""
    form = "rms_norm" if rms else "layer_norm" if residual is None else "add_layer_norm"
    if _common.ordinary(input, weight, bias, residual):
        try:
            alike = residual is None or (residual.shape == input.shape and residual.dtype == input.dtype)
            if alike and input.shape[-1:] == normalized_shape and -math.inf < eps < math.inf:
                record = _common.needs_grad(input, residual, weight, bias)
                kernel = backends.choose(form, input, record=record)
                # torch's rms_norm takes weights of any dtype
                if kernel == "cpu" or (kernel == "torch" and (weight is None or weight.dtype == input.dtype)):
                    return _run(kernel, record, input, normalized_shape, weight, bias, eps, residual, rms)
        except _common.CAUGHT:
            pass  # see _common.ordinary
    shape = tuple(normalized_shape) if not isinstance(normalized_shape, int) else (normalized_shape,)
    _check(input, shape, weight, bias, eps, residual)
    if autocast_to_float(input):
        input, weight, bias, residual = (None if x is None else x.float() for x in (input, weight, bias, residual))
    if residual is not None and residual.dtype != input.dtype:  # under autocast
        dtype = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(dtype), residual.to(dtype)
    record = _common.needs_grad(input, residual, weight, bias)
    kernel = backends.choose(form, input, unsupported=_common.unsupported(input, weight, bias), record=record)
    return _run(kernel, record, input, shape, weight, bias, eps, residual, rms)


def _run(
    kernel: str,
    record: bool,
    input: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    if kernel == "torch":
        return _torch(input, shape, weight, bias, eps, residual, rms)
    if len(shape) > 1:  # the kernels norm one dimension
        x, r = (None if x is None else x.flatten(-len(shape)) for x in (input, residual))
        w, b = (None if x is None else x.flatten() for x in (weight, bias))
        normed, summed = _run(kernel, record, x, (math.prod(shape),), w, b, eps, r, rms)
        return normed.view(input.shape), input if residual is None else summed.view(input.shape)
    if kernel == "reference":
        normed, summed = reference.layer_norm(input, residual, weight, bias, eps=eps, rms=rms)
        return normed.to(input.dtype), summed.to(input.dtype)
    normed, summed, _, _ = _forward(record, input, residual, weight, bias, eps, rms)
    return normed, input if residual is None else summed


def _check(
    input: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> None:
    _common.check_tensor("input", input)
    if not shape or input.dim() < len(shape) or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"normalized_shape is {shape}, must be the last dimensions of input, {tuple(input.shape)}")
    _common.check_finite("eps", eps)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _common.check_tensor(name, vector)
            _common.check_shape(name, vector, shape)
            _common.check_like(name, vector, "input", input, dtype=False)
    if residual is not None:
        _common.check_tensor("residual", residual)
        _common.check_shape("residual", residual, input.shape)
        _common.check_like("residual", residual, "input", input, dtype=_common.autocast_dtype(input) is None)


def _torch(
    input: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    summed = input if residual is None else input + residual
    if rms:
        normed = torch_functional.rms_norm(summed, shape, weight, eps)
        return normed if bias is None else normed + bias, summed
    return torch_functional.layer_norm(summed, shape, weight, bias, eps), summed


@torch.library.register_fake("fastformer::layer_norm_forward")
def _(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = math.prod(input.shape[:-1])
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    summed = input.new_empty(0) if residual is None else torch.empty_like(output)
    mean = input.new_empty(0 if rms else rows, dtype=torch.float32)
    return output, summed, mean, input.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("fastformer::layer_norm_backward")
def _(
    grad_output: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = summed.dtype if weight is None else weight.dtype
    cols = summed.shape[-1]
    grad_input = torch.empty_like(summed, memory_format=torch.contiguous_format)
    grad_weight = summed.new_empty(0) if weight is None else summed.new_empty(cols, dtype=dtype)
    grad_bias = summed.new_empty(cols, dtype=dtype) if has_bias else summed.new_empty(0)
    return grad_input, grad_weight, grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, residual, weight, bias, ctx.eps, ctx.rms = inputs
    _, summed, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.backend = backends.requested()
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(input if residual is None else summed, weight, bias, mean, rstd)


def _backward(ctx: Any, grad_output: Tensor | None, grad_summed: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    if not ctx.has_residual:
        grad_summed = None  # nothing is stored there
    if grad_output is None:
        both = (grad_summed, grad_summed if ctx.has_residual else None)
        return *both, None, None, None, None
    if torch.is_grad_enabled():  # create_graph
        grad_input, grad_weight, grad_bias = _differentiable_backward(ctx, x, weight, bias, grad_output, grad_summed)
    else:
        with _common.forwards_backend(ctx):
            grad_input, grad_weight, grad_bias = _backward_kernel(
                grad_output, grad_summed, x, weight, mean, rstd, bias is not None, ctx.rms
            )
        grad_weight = grad_weight if weight is not None else None
        grad_bias = grad_bias.to(ctx.bias_dtype) if bias is not None else None
    return grad_input, grad_input if ctx.has_residual else None, grad_weight, grad_bias, None, None


def _differentiable_backward(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, grad_output: Tensor, grad_summed: Tensor | None
) -> tuple[Tensor | None, ...]:
    def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _torch(x, (x.shape[-1],), weight, bias, ctx.eps, None, ctx.rms)[0]

    grad_input, grad_weight, grad_bias = _common.differentiable_vjp(normed, (x, weight, bias), (grad_output,))
    if grad_summed is not None and grad_input is not None:
        grad_input = grad_input + grad_summed
    return grad_input, grad_weight, grad_bias


_forward = _common.differentiable("layer_norm_forward", _setup_context, _backward)
_backward_kernel = _common.kernel("layer_norm_backward")
_common.register("layer_norm", ["layer_norm_forward", "layer_norm_backward"])
