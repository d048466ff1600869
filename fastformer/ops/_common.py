"""What the operations share: argument checks, the choice of kernel, registration, and gradients of gradients."""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastformer import backends

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
    """TypeError or ValueError unless ``value`` is a finite number."""
    _check_number(name, value)
    if not -math.inf < value < math.inf:  # Dynamo traces comparisons and not math.isfinite
        raise ValueError(f"{name} is {value}, must be a finite number")


def check_probability(name: str, value: float) -> None:
    """TypeError or ValueError unless ``value`` is a number from 0 to 1."""
    _check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}, must be in [0, 1]")


def check_flag(name: str, value: object) -> None:
    """TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool | torch.SymBool):
        raise TypeError(f"{name} is a {type(value).__name__}, must be a bool")


def is_integer(value: object) -> bool:
    """Whether it is an int, or stands for one while a graph is being made; a bool is none."""
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, str | complex | dict | set | Sequence) or value is None:
        raise TypeError(f"{name} is a {type(value).__name__}, must be a number")


# --- choosing

#: What the kernels raise for arguments that don't fit, or Python does before they are reached; see ``ordinary``.
CAUGHT = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def ordinary(first: object, *others: object) -> bool:
    """Whether this is an eager call on plain tensors (or None) on one kind of device, with nothing special around it:
    no autocast, no torch.func transform, no forward-mode differentiation, no ``explain``.

    The functions have a quick way for such calls, to torch's own functions and the C++ kernels, which check shapes and
    dtypes themselves (Triton's launchers don't). What raises there is tried again the careful way, whose errors name
    the argument.
    """
    if (
        type(first) not in _PLAIN_TENSORS
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or backends.explaining
        or not first.dtype.is_floating_point
    ):
        return False
    on_cpu = first.is_cpu
    for other in others:
        if other is not None and (type(other) not in _PLAIN_TENSORS or other.is_cpu is not on_cpu):
            return False
    return True


def unsupported(*tensors: Tensor | None) -> str:
    """What our kernels lack for these tensors, whatever the operation, or the empty string."""
    if torch._C._are_functorch_transforms_active():
        return "rules for torch.func transforms"
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return "rules for forward-mode differentiation"
    for tensor in tensors:
        if tensor is not None and tensor.dtype.is_floating_point and tensor.dtype not in backends.KERNEL_DTYPES:
            return f"a kernel for {tensor.dtype}"
        if type(tensor) not in _PLAIN_TENSORS and is_traceable_wrapper_subclass(tensor):
            return f"a rule for {type(tensor).__name__}"  # a DTensor, a quantized weight
    return ""


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The low-precision dtype that autocast asks for on this tensor's device, or None outside autocast."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind):  # "meta", for one
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


# --- calling


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a loop, which costs a third of any()
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def kernel(name: str) -> Callable[..., Any]:
    """The operator ``name``, called without the autograd layer, which costs as much again; compiled code has both."""
    operator = getattr(torch.ops.fastformer, name).default
    run = operator._op

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return run(*args)

    return call


def differentiable(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """``call(record, *args)`` of the forward operator ``name``, with this backward wherever it is called from.

    The operator itself has it by ``register_autograd``, for compiled code and other people's. Eager calls don't go
    through that: on 8 x 64 values, layer norm with its backward takes 46 us by it, and 30 us by an autograd.Function
    whose C++ part is called at once. ``Function.apply`` would first spend 12 us on binding default arguments, and then
    ask for torch.func transforms, for which ``unsupported`` has sent the call elsewhere.
    """
    torch.library.register_autograd(f"fastformer::{name}", backward, setup_context=setup_context)
    run = kernel(name)
    members = {"forward": run, "setup_context": setup_context, "backward": backward}
    members = {key: staticmethod(member) for key, member in members.items()}
    function = type(name, (torch.autograd.Function,), members)
    apply = super(torch.autograd.Function, function).apply

    def call(record: bool, *args: Any) -> Any:
        return apply(*args) if record and not torch.compiler.is_compiling() else run(*args)

    return call


def differentiable_vjp(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients by ``inputs`` of ``function(*inputs)``, through torch's own formulas, so that they have gradients too.

    ``grads`` are those of the function's outputs, None for an output that nothing was done with.
    """
    with torch.enable_grad():
        # Views: of inputs that are one tensor, or come from one another, each has a gradient of its own.
        inputs = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        outputs = function(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(y, grad.to(y.dtype)) for y, grad in zip(outputs, grads) if grad is not None and y.requires_grad]
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


def forwards_backend(ctx: Any) -> AbstractContextManager[None]:
    """For a backward pass the backend that was asked for in its forward pass, kept in ``ctx.backend``.

    Operators ask for it that have several kernels for a device. A request holds for the whole process, and backward
    passes may run in several threads: so nothing is requested where nothing would ask, or where it already is.
    """
    asked = bool(_KERNELS) and ctx.backend != backends.requested()
    return backends.backend(ctx.backend) if asked else contextlib.nullcontext()


# --- registering

#: (operator, dispatch key) -> its kernels there by their backends' names, where Python chooses among several.
_KERNELS: dict[tuple[str, str], dict[str, Callable[..., Any]]] = {}


def register(operation: str, names: Sequence[str], *, triton: bool = True) -> None:
    """Give the operators ``names`` their rule for vmap, and their Triton launchers where the operation has some:
    functions of the same names in triton_kernels/``operation``, imported at the first call.

    On CUDA tensors they are the kernels, beside those in CUDA C++ where there are some. On CPU tensors they are taken
    only under Triton's interpreter and on request; otherwise the C++ kernel runs.
    """
    for name in names:
        if triton and backends.TRITON:
            launch = _triton_launcher(operation, name)
            if backends.CUDA_LIBRARY and operation in backends.CUDA_OPERATIONS:
                offer(name, "CUDA", "triton", launch)
            else:
                _put(name, "CUDA", lambda _keyset, *args, launch=launch: launch(*args))
            if backends.TRITON_INTERPRETED:
                offer(name, "CPU", "triton", launch)
        torch.library.register_vmap(f"fastformer::{name}", _loop_over_batch(name))


def offer(name: str, key: str, backend: str, run: Callable[..., Any]) -> None:
    """Make ``run`` one of the kernels of operator ``name`` under a dispatch key, beside the compiled one: it is called
    when ``backend`` is requested. Without a request for any of them, the CPU's is the compiled one, if there is one."""
    kernels = _KERNELS.setdefault((name, key), {})
    if not kernels:
        _choose_in_python(name, key, kernels)
    kernels[backend] = run


def _choose_in_python(name: str, key: str, kernels: dict[str, Callable[..., Any]]) -> None:
    """Put a choice by the request among ``kernels`` in the place of the operator's compiled kernel, now one of them."""
    own, has_own = ("cpu", backends.CPU_LIBRARY) if key == "CPU" else ("cuda", backends.CUDA_LIBRARY)
    compiled = torch.library.get_kernel(f"fastformer::{name}", key) if has_own else None
    operation = name.rpartition("_")[0]

    def run(keyset: torch.DispatchKeySet, *args: Any) -> Any:
        chosen = backends.requested()
        if chosen != own and chosen not in kernels:
            chosen = own if key == "CPU" else backends.preferred(operation, args[0])
        if chosen in kernels:
            return kernels[chosen](*args)
        return compiled.call_boxed(keyset, *args) if compiled is not None else next(iter(kernels.values()))(*args)

    _put(name, key, run)


def _put(name: str, key: str, run: Callable[..., Any]) -> None:
    with warnings.catch_warnings():  # torch warns that a compiled kernel is being overridden, which is the purpose
        warnings.simplefilter("ignore")
        _IMPLEMENTATIONS.impl(name, run, key, with_keyset=True, allow_override=True)


def _triton_launcher(operation: str, name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"fastformer.triton_kernels.{operation}"), name)(*args)

    return launch


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
