"""What the operations share: argument checks, the choice of kernel, registration, and gradients of gradients."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastformer import backends

#: Element types that the kernels have; torch's own functions take the rest.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_IMPLEMENTATIONS = torch.library.Library("fastformer", "IMPL")


# --- checks


def check_tensor(name: str, value: object, *, floating: bool = True) -> None:
    """TypeError unless ``value`` is a tensor (of a floating-point dtype)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, must be a Tensor")
    if floating and not value.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {value.dtype}, must be floating point")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """ValueError unless ``value`` is on the device (and of the dtype) of ``other``."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, must be on {other.device} like {other_name}")
    if dtype and value.dtype != other.dtype:
        raise ValueError(f"{name} has dtype {value.dtype}, must be {other.dtype} like {other_name}")


def check_shape(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """ValueError unless ``value`` has this shape."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, must be {tuple(shape)}")


def check_broadcast(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """ValueError unless ``value`` broadcasts to this shape."""
    fits = value.dim() <= len(shape) and all(v in (1, s) for v, s in zip(reversed(value.shape), reversed(shape)))
    if not fits:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, must broadcast to {tuple(shape)}")


def check_finite(name: str, value: float) -> None:
    """ValueError unless ``value`` is a finite number. Comparisons, because Dynamo traces them and not math.isfinite."""
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} is {value}, must be a finite number")


# --- choosing


def unsupported(*tensors: Tensor | None) -> str:
    """What our kernels lack for these tensors, whatever the operation, or the empty string."""
    if torch._C._are_functorch_transforms_active():
        return "rules for torch.func transforms"
    for tensor in tensors:
        if tensor is not None and tensor.dtype.is_floating_point and tensor.dtype not in KERNEL_DTYPES:
            return f"a kernel for {tensor.dtype}"
    return ""


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The low-precision dtype that autocast asks for on this tensor's device, or None outside autocast."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


# --- calling


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def call(operator: Callable[..., Any], record: bool, *args: Any) -> Any:
    """Call an operator; where nothing is recorded, without the autograd layer: half the cost of a small call."""
    if record or torch.compiler.is_compiling():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def differentiable_vjp(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients by ``inputs`` of ``function(*inputs)``, through torch's own formulas, so that they have gradients too.

    ``grads`` are those of the function's outputs, None for an output that nothing was done with.
    """
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    with torch.enable_grad():
        outputs = function(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(output, grad.to(output.dtype)) for output, grad in zip(outputs, grads) if grad is not None]
        found = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs]


# --- registering


def register(operation: str, names: Sequence[str]) -> None:
    """Give the operators ``names`` their Triton launchers, functions of the same names in triton_kernels/``operation``.

    On CUDA tensors they are the kernels. On CPU tensors they are taken only under Triton's interpreter and on request;
    otherwise the C++ kernel runs. They are imported at the first call.
    """
    module = f"fastformer.triton_kernels.{operation}"

    def launch(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            return getattr(importlib.import_module(module), name)(*args)

        return run

    def launch_on_request(name: str) -> Callable[..., Any]:
        compiled = torch.library.get_kernel(f"fastformer::{name}", "CPU") if backends.CPU_LIBRARY else None
        triton = launch(name)

        def run(keyset: torch.DispatchKeySet, *args: Any) -> Any:
            if compiled is None or backends.requested() == "triton":
                return triton(*args)
            return compiled.call_boxed(keyset, *args)

        return run

    for name in names:
        if backends.TRITON:
            _IMPLEMENTATIONS.impl(name, launch(name), "CUDA")
        if backends.TRITON_INTERPRETED:
            with warnings.catch_warnings():  # torch warns that the C++ kernel is being overridden, which is the purpose
                warnings.simplefilter("ignore")
                _IMPLEMENTATIONS.impl(name, launch_on_request(name), "CPU", with_keyset=True, allow_override=True)
        torch.library.register_vmap(f"fastformer::{name}", _loop_over_batch(name))


def _loop_over_batch(name: str) -> Callable[..., Any]:
    """A vmap rule that calls the operator once for each element of the batch and stacks the results."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        operator = getattr(torch.ops.fastformer, name)
        each = [
            operator(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims)))
            for i in range(info.batch_size)
        ]
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        return tuple(torch.stack(results) for results in zip(*each)), (0,) * len(each[0])

    return rule
