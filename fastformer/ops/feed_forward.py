"""The feed-forward layer, plain and gated: one forward operator, one backward operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops import _common
from fastformer.ops.linear import has_few_rows

ACTIVATIONS = {
    "gelu": torch_functional.gelu,
    "gelu_tanh": lambda x: torch_functional.gelu(x, approximate="tanh"),
    "relu": torch_functional.relu,
    "silu": torch_functional.silu,
}


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
    weight_gate: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """See functional.feed_forward for the arguments."""
    tensors = (input, weight1, bias1, weight_gate, weight2, bias2)
    if dropout_p == 0 and _common.ordinary(*tensors):
        try:
            record = _common.needs_grad(*tensors)
            if _choose(input, weight1, record) == "cpu":
                return _forward(record, *tensors, activation, record)[0]
        except _common.CAUGHT:
            pass  # see _common.ordinary
    _check(input, weight1, bias1, weight2, bias2, activation, weight_gate)
    dtype = _common.autocast_dtype(input)
    if dtype is not None:
        input, weight1, bias1, weight2, bias2, weight_gate = (
            x if x is None or x.dtype == torch.float64 else x.to(dtype)
            for x in (input, weight1, bias1, weight2, bias2, weight_gate)
        )
    tensors = (input, weight1, bias1, weight_gate, weight2, bias2)
    record = _common.needs_grad(*tensors)
    unsupported = _common.unsupported(*tensors) or ("dropout in the hidden layer" if dropout_p > 0 else "")
    kernel = _choose(input, weight1, record, unsupported)
    if kernel == "torch":
        return _torch(*tensors, activation, dropout_p)
    if kernel == "reference" and dropout_p > 0:  # which has no random numbers
        return _torch(*(None if x is None else x.double() for x in tensors), activation, dropout_p).to(input.dtype)
    if kernel == "reference":
        return reference.feed_forward(
            input, weight1, bias1, weight2, bias2, activation=activation, weight_gate=weight_gate
        ).to(input.dtype)
    return _forward(record, *tensors, activation, record)[0]


def _choose(input: Tensor, weight1: Tensor, record: bool, unsupported: str = "") -> str:
    few = ("feed_forward_few_rows", input.dtype) in backends.FASTER and has_few_rows(input, weight1)
    form, measured = ("feed_forward_few_rows", weight1) if few else ("feed_forward", input)
    return backends.choose(form, measured, unsupported=unsupported, record=record)


def _check(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    weight_gate: Tensor | None,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, must be one of {', '.join(ACTIVATIONS)}")
    _common.check_tensor("input", input)
    for name, matrix in (("weight1", weight1), ("weight2", weight2)):
        _common.check_tensor(name, matrix)
        if matrix.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(matrix.shape)}, must have 2 dimensions")
    width, hidden = weight1.shape[1], weight1.shape[0]
    if input.dim() < 1 or input.shape[-1] != width:
        raise ValueError(f"input has shape {tuple(input.shape)}, must end in {width}, the columns of weight1")
    expected = {
        "weight1": (weight1, (hidden, width)),
        "bias1": (bias1, (hidden,)),
        "weight_gate": (weight_gate, (hidden, width)),
        "weight2": (weight2, (weight2.shape[0], hidden)),
        "bias2": (bias2, (weight2.shape[0],)),
    }
    same_dtype = _common.autocast_dtype(input) is None
    for name, (tensor, shape) in expected.items():
        if tensor is not None:
            _common.check_tensor(name, tensor)
            _common.check_shape(name, tensor, shape)
            _common.check_like(name, tensor, "input", input, dtype=same_dtype)


def _torch(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight_gate: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    dropout_p: float = 0.0,
) -> Tensor:
    act = ACTIVATIONS[activation]
    hidden = torch_functional.linear(input, weight1, bias1)
    hidden = act(hidden) if weight_gate is None else act(torch_functional.linear(input, weight_gate)) * hidden
    if dropout_p > 0:
        hidden = torch_functional.dropout(hidden, dropout_p)
    return torch_functional.linear(hidden, weight2, bias2)


@torch.library.register_fake("fastformer::feed_forward_forward")
def _(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight_gate: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    output = input.new_empty(*input.shape[:-1], weight2.shape[0])
    if not save_hidden:
        return output, input.new_empty(0)
    rows = 1
    for size in input.shape[:-1]:
        rows *= size
    return output, input.new_empty(rows, weight1.shape[0] * (1 if weight_gate is None else 2))


@torch.library.register_fake("fastformer::feed_forward_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    weight_gate: Tensor | None,
    weight2: Tensor,
    hidden: Tensor,
    activation: str,
    has_bias1: bool,
    has_bias2: bool,
    needs_grad_input: bool,
    needs_grad_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def result(needed: bool, *shape: int) -> Tensor:
        return input.new_empty(shape) if needed else input.new_empty(0)

    return (
        result(needs_grad_input, *input.shape),
        result(needs_grad_weights, *weight1.shape),
        result(needs_grad_weights and has_bias1, weight1.shape[0]),
        result(needs_grad_weights and weight_gate is not None, *weight1.shape),
        result(needs_grad_weights, *weight2.shape),
        result(needs_grad_weights and has_bias2, weight2.shape[0]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.saved_hidden = inputs
    _, hidden = output
    ctx.backend = backends.requested()
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(*tensors, hidden)


def _backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, hidden = ctx.saved_tensors
    if grad_output is None:
        return (None,) * 8
    if torch.is_grad_enabled():  # create_graph
        grads = _common.differentiable_vjp(lambda *xs: _torch(*xs, ctx.activation), tensors, (grad_output,))
        return *grads, None, None
    input, weight1, bias1, weight_gate, weight2, bias2 = tensors
    needs = ctx.needs_input_grad
    with _common.forwards_backend(ctx):
        if not ctx.saved_hidden:  # computed once more, for less memory
            _, hidden = _forward(False, *tensors, ctx.activation, True)
        grads = _backward_kernel(
            grad_output,
            input,
            weight1,
            weight_gate,
            weight2,
            hidden,
            ctx.activation,
            bias1 is not None,
            bias2 is not None,
            needs[0],
            any(needs[1:6]),
        )
    return *(grad if need else None for grad, need in zip(grads, needs)), None, None


_forward = _common.differentiable("feed_forward_forward", _setup_context, _backward)
_backward_kernel = _common.kernel("feed_forward_backward")
_common.register("feed_forward", ["feed_forward_forward", "feed_forward_backward"])
