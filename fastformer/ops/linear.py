"""The linear layer: one forward operator, one backward operator. On a CPU only; elsewhere it is torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops import _common

_FORMS = ("linear", "linear_few_rows")
#: kFewRows in csrc/cpu/product.h: up to so many, a kernel of its own reads the weights once.
FEW_ROWS = 32
#: Weights of fewer elements are torch's whatever the input: to see that at once takes a fourth of the time.
_SMALL = {
    dtype: min(
        min(row.least) for (operation, of), row in backends.FASTER.items() if operation in _FORMS and of == dtype
    )
    for dtype in backends.KERNEL_DTYPES
    if ("linear_few_rows", dtype) in backends.FASTER
}


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See functional.linear for the arguments."""
    if not (torch.compiler.is_compiling() or backends.explaining):
        try:
            same_device = weight.is_cpu is input.is_cpu  # or torch gives a result on the meta device
            small = weight.numel() < _SMALL.get(weight.dtype, 0)
            if small and same_device and backends.requested() == "auto":
                return torch_functional.linear(input, weight, bias)
            record = _common.needs_grad(input, weight, bias)
            kernel = backends.choose(_form(input, weight), weight, record=record)
            if kernel == "torch" and same_device:  # whose function knows every kind of tensor
                return torch_functional.linear(input, weight, bias)
            if kernel == "cpu" and _common.ordinary(input, weight, bias):
                return _forward(record, input, weight, bias)
        except _common.CAUGHT:
            pass  # see _common.ordinary
    unsupported = _unsupported(input, weight, bias)
    if backends.requested() in ("triton", "cuda") and backends.available(backends.requested(), weight.device.type):
        return torch_functional.linear(input, weight, bias)  # a GPU's library has no such gap to fill
    if not unsupported:
        _check(input, weight, bias)
        dtype = _common.autocast_dtype(input)
        if dtype is not None and backends.requested() == "auto":
            unsupported = "the copies of weights that autocast keeps"
        elif dtype is not None:
            input, weight, bias = (
                x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in (input, weight, bias)
            )
    record = _common.needs_grad(input, weight, bias)
    form = "linear" if unsupported else _form(input, weight)
    kernel = backends.choose(form, weight, unsupported=unsupported, record=record)
    if kernel == "reference" and not _is_torchs(input, weight, bias):
        return reference.linear(input, weight, bias).to(input.dtype)
    if kernel == "cpu":
        return _forward(record, input, weight, bias)
    return torch_functional.linear(input, weight, bias)


def has_few_rows(input: Tensor, weight: Tensor) -> bool:
    """Whether the kernel for few rows does this product. A graph with symbols for sizes is compiled for many rows."""
    most, elements = FEW_ROWS * weight.size(-1), input.numel()
    if type(elements) is int and not torch.compiler.is_compiling():
        return elements <= most
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports a second's worth

    return statically_known_true(elements <= most)


def _form(input: Tensor, weight: Tensor) -> str:
    """Which measurement counts."""
    if not has_few_rows(input, weight):
        return "linear"
    return "linear_few_rows" if weight.stride(-1) == 1 else "linear_few_rows_transposed"


def _is_torchs(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """What only torch's function knows: numbers that are no floats, other layouts, weights that are no matrix."""
    tensors = [x for x in (input, weight, bias) if x is not None]
    plain = all(x.is_floating_point() and not x.is_nested and x.layout is torch.strided for x in tensors)
    return not plain or weight.dim() != 2


def _unsupported(input: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """What torch's function has and ours lacks for these arguments, or the empty string."""
    tensors = [x for x in (input, weight, bias) if x is not None]
    for name, x in zip(("input", "weight", "bias"), tensors):
        _common.check_tensor(name, x, floating=False)
    lacking = _common.unsupported(*tensors)
    for x in tensors:
        if lacking:
            break
        if x.is_nested or x.layout is not torch.strided:
            lacking = "a rule for nested or sparse tensors"
        elif not torch.compiler.is_compiling() and _overrides(x):
            lacking = f"a rule for {type(x).__name__}"
        elif x.dtype not in backends.KERNEL_DTYPES:
            lacking = f"a kernel for {x.dtype}"
    if not lacking and weight.dim() != 2:
        lacking = "a rule for weights that are no matrix"
    if not lacking and bias is not None and (bias.dim() != 1 or bias.shape[0] == 1 != weight.shape[0]):
        lacking = "a rule for a bias that is broadcast"
    return lacking


def _overrides(x: Tensor) -> bool:
    """Whether the tensor's class has torch's functions done its own way."""
    return type(x).__torch_function__ not in (Tensor.__torch_function__, torch._C._disabled_torch_function_impl)


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    rows, cols = weight.shape
    if input.dim() < 1 or input.shape[-1] != cols:
        raise ValueError(f"input has shape {tuple(input.shape)}, must end in {cols}, the columns of weight")
    same_dtype = _common.autocast_dtype(input) is None
    _common.check_like("weight", weight, "input", input, dtype=same_dtype)
    if bias is not None:
        _common.check_shape("bias", bias, (rows,))
        _common.check_like("bias", bias, "input", input, dtype=same_dtype)


@torch.library.register_fake("fastformer::linear_forward")
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.library.register_fake("fastformer::linear_backward")
def _(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, needs_grad_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    empty = grad_output.new_empty(0)
    outputs = grad_output.shape[-1]
    return (
        empty if weight is None else grad_output.new_empty(*grad_output.shape[:-1], weight.shape[1]),
        torch.empty_like(empty) if input is None else grad_output.new_empty(outputs, input.shape[-1]),
        grad_output.new_empty(outputs if needs_grad_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _ = inputs
    needs_input, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():  # create_graph
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        return (
            grad_output @ weight if needs[0] else None,
            rows.mT @ input.reshape(-1, input.shape[-1]) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )
    grads = _backward_kernel(grad_output, input, weight, needs[2])
    return tuple(grad if need else None for grad, need in zip(grads, needs))


_forward = _common.differentiable("linear_forward", _setup_context, _backward)
_backward_kernel = _common.kernel("linear_backward")
_common.register("linear", ["linear_forward", "linear_backward"], triton=False)
