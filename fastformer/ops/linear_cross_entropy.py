"""Cross-entropy of a linear layer's output that is never all in memory: one forward operator, one backward operator.

With a scalar loss the forward pass computes the gradients too, while each chunk of logits is in cache; backward then
only multiplies them by the incoming scalar.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops import _common

REDUCTIONS = ("none", "mean", "sum")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """See functional.linear_cross_entropy for the arguments."""
    probabilities = _check(
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options
    )
    unsupported = _unsupported(input, linear_weight, linear_bias, weight, label_smoothing, options, probabilities)
    record = _common.needs_grad(input, linear_weight, linear_bias)
    kernel = backends.choose("linear_cross_entropy", input, unsupported=unsupported, record=record)
    if kernel == "torch" and options is not None:
        return torch_functional.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
    ignored = -100 if ignore_index is None else ignore_index
    if kernel == "torch":
        arguments = (input, linear_weight, linear_bias, target, weight)
        return _torch(*arguments, reduction, ignored, label_smoothing)
    if unsupported:  # the reference of what our operators don't have is torch's formula in float64
        arguments = (_double(x) for x in (input, linear_weight, linear_bias, target, weight))
        return _torch(*arguments, reduction, ignored, label_smoothing).to(input.dtype)
    rows, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    dtype = _common.autocast_dtype(input)
    loss_dtype = input.dtype if dtype is None else torch.float32
    if dtype is not None:
        rows, linear_weight, linear_bias = (
            None if x is None else x.to(dtype) for x in (rows, linear_weight, linear_bias)
        )
    row_weight = _row_weight(rows, targets, weight, reduction, ignored)
    arguments = (rows, linear_weight, linear_bias, targets)
    if kernel == "reference":
        loss, _ = reference.linear_cross_entropy(*arguments, ignore_index=ignored, label_smoothing=label_smoothing)
        loss = loss if row_weight is None else loss * row_weight
        loss = loss if reduction == "none" else loss.sum()
    else:
        per_row = reduction == "none"
        # Gradients of a mean are small: in float16 they wait for the factor that a scaled loss brings them.
        save_grads = record and not per_row and rows.dtype != torch.float16
        scalar_weight = None if per_row else row_weight
        loss = _forward(record, *arguments, scalar_weight, ignored, label_smoothing, save_grads)[0]
        if per_row and row_weight is not None:
            loss = loss * row_weight
    return (loss.view(target.shape) if reduction == "none" else loss).to(loss_dtype)


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    options: Any,
) -> bool:
    """Whether the target holds class probabilities; raises for arguments that don't fit together."""
    _common.check_tensor("input", input)
    _common.check_tensor("linear_weight", linear_weight)
    _common.check_tensor("target", target, floating=False)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, must be one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}, must be in [0, 1]")
    if input.dim() < 1:
        raise ValueError("input has no dimensions, must be [..., C]")
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        shape = tuple(linear_weight.shape)
        raise ValueError(f"linear_weight has shape {shape}, must be [V, ..., C] with C = {input.shape[-1]} as in input")
    classes, positions = linear_weight.shape[0], tuple(linear_weight.shape[1:-1])
    if positions and input.dim() != 2:
        raise ValueError(f"input has shape {tuple(input.shape)}, must be [N, C] when linear_weight is [V, d1, ..., C]")
    same_dtype = _common.autocast_dtype(input) is None
    _common.check_like("linear_weight", linear_weight, "input", input, dtype=same_dtype)
    if linear_bias is not None:
        _common.check_tensor("linear_bias", linear_bias)
        _common.check_shape("linear_bias", linear_bias, (classes, *positions))
        _common.check_like("linear_bias", linear_bias, "input", input, dtype=same_dtype)
    if weight is not None:
        _common.check_tensor("weight", weight)
        _common.check_shape("weight", weight, (classes,))
        _common.check_like("weight", weight, "input", input, dtype=False)
    _common.check_like("target", target, "input", input, dtype=False)
    rows = tuple(input.shape[:-1])
    probabilities = tuple(target.shape) == (*rows, classes, *positions)
    if probabilities:
        _common.check_tensor("target", target)
        if ignore_index is not None:
            raise ValueError(f"ignore_index is {ignore_index}, must be None when target holds class probabilities")
    else:
        _common.check_shape("target", target, (*rows, *positions))
        if target.dtype != torch.int64:
            raise TypeError(f"target has dtype {target.dtype}, must be torch.int64 for class indices")
    if options is not None and not hasattr(torch_functional, "linear_cross_entropy"):
        raise ValueError(f"options is {options!r}, must be None: torch {torch.__version__} has no linear_cross_entropy")
    return probabilities


def _unsupported(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    options: Any,
    probabilities: bool,
) -> str:
    """What our kernels lack for these arguments, or the empty string."""
    if lacking := _common.unsupported(input, linear_weight, linear_bias):
        return lacking
    if options is not None:
        return "torch's options: the chunks are ours to choose"
    if probabilities:
        return "class probabilities as targets"
    if linear_weight.dim() > 2:
        return "a loss of several dimensions"
    if weight is not None and label_smoothing > 0:
        return "class weights together with label smoothing"
    return "empty input or weight" if 0 in (input.numel(), linear_weight.numel()) else ""


def _row_weight(
    rows: Tensor, targets: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
) -> Tensor | None:
    """float32 [N]: each row's share in the loss; None for 1 everywhere and reduction "none"."""
    if reduction == "none" and weight is None:
        return None
    if reduction == "sum" and weight is None:
        return torch.ones_like(targets, dtype=torch.float32)
    kept = targets != ignore_index
    if weight is None:
        shares = kept.float()
    else:
        _check_targets(targets, kept, weight.shape[0], ignore_index)
        shares = weight.detach().float()[torch.where(kept, targets, 0)] * kept
    return shares / shares.sum() if reduction == "mean" else shares


def _check_targets(targets: Tensor, kept: Tensor, classes: int, ignore_index: int) -> None:
    """What the kernels check, before class weights are looked up. On CPU only: a GPU would have to be waited for."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = kept & ((targets < 0) | (targets >= classes))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(
            f"target[{row}] is {int(targets[row])}, which is out of bounds: it must be in [0, {classes})"
            f" or ignore_index ({ignore_index})"
        )


def _torch(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The definition in torch's documentation, also of releases before 2.13, which lack the function."""
    classes, positions = linear_weight.shape[0], linear_weight.shape[1:-1]
    probabilities = target.is_floating_point()
    flat_bias = linear_bias if linear_bias is None else linear_bias.reshape(-1)
    logits = torch_functional.linear(input, linear_weight.reshape(-1, input.shape[-1]), flat_bias)
    if input.dim() > 2:
        logits = logits.flatten(0, -2)
        target, shape = target.flatten(0, -2) if probabilities else target.flatten(), input.shape[:-1]
    else:
        logits, shape = logits.reshape(*input.shape[:-1], classes, *positions), None
    loss = torch_functional.cross_entropy(
        logits,
        target,
        None if weight is None else weight.to(logits.dtype),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return loss.view(shape) if shape is not None and reduction == "none" else loss


def _double(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x


@torch.library.register_fake("fastformer::linear_cross_entropy_forward")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    save_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = input.shape[0]
    loss = input.new_empty(() if row_weight is not None else (rows,), dtype=torch.float32)
    lse = input.new_empty(rows, dtype=torch.float32)
    if not save_grads:
        return loss, lse, input.new_empty(0), input.new_empty(0), input.new_empty(0)
    return loss, lse, *_empty_gradients(input, weight, bias)


@torch.library.register_fake("fastformer::linear_cross_entropy_backward")
def _(
    grad_losses: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(input, weight, bias)


def _empty_gradients(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = input.new_empty(0 if bias is None else bias.shape[0])
    return input.new_empty(input.shape), input.new_empty(weight.shape), grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, bias, target, row_weight, ctx.ignore_index, ctx.label_smoothing, ctx.saved_grads = inputs
    _, lse, *grads = output
    ctx.backend = backends.requested()
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, *grads)
    ctx.save_for_backward(input, weight, bias, target, row_weight, lse, *grads)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    input, weight, bias, target, row_weight, lse, *grads = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 8
    if torch.is_grad_enabled():  # create_graph
        grads = _common.differentiable_vjp(
            lambda *tensors: _losses(ctx, *tensors, target, row_weight), (input, weight, bias), (grad_loss,)
        )
    elif ctx.saved_grads:
        if not _may_hand_over(grad_loss):
            grads = [grad * grad_loss.to(grad.dtype) for grad in grads]
    else:
        grad_losses = grad_loss.float() if row_weight is None else grad_loss * row_weight
        with _common.forwards_backend(ctx):
            grads = _backward_kernel(
                grad_losses, input, weight, bias, target, lse, ctx.ignore_index, ctx.label_smoothing
            )
    grads = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad))
    return *grads, None, None, None, None, None


def _losses(
    ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, row_weight: Tensor | None
) -> Tensor:
    """The operator's first result, through torch's own formulas."""
    with torch.autocast(input.device.type, enabled=False):
        losses = _torch(
            input,
            weight,
            bias,
            target,
            reduction="none",
            ignore_index=ctx.ignore_index,
            label_smoothing=ctx.label_smoothing,
        ).float()
    return losses if row_weight is None else (losses * row_weight).sum()


def _may_hand_over(grad_loss: Tensor) -> bool:
    """Whether the saved gradients are the result as they are: the scalar is 1, and this backward pass is the last one.

    Asked on CPU in eager mode only: elsewhere the answer would have to be waited for.
    """
    if type(grad_loss) is not Tensor or grad_loss.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph() and grad_loss.item() == 1.0


_forward = _common.differentiable("linear_cross_entropy_forward", _setup_context, _backward)
_backward_kernel = _common.kernel("linear_cross_entropy_backward")
_common.register("linear_cross_entropy", ["linear_cross_entropy_forward", "linear_cross_entropy_backward"])
