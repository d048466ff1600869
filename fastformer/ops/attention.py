"""Attention: one forward operator, one backward operator, and the choice of what runs. Shapes, and the meaning of the
arguments: csrc/ops.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastformer import backends
from fastformer.ops import _common, attention_torch
from fastformer.ops.attention_torch import Options

#: The largest head_dim and value width of our kernels.
MAX_WIDTH = 256
#: What torch's function does not take.
BOTTOM_RIGHT = "causal mask aligned to the bottom right"
CAUSAL_AND_MASK = "is_causal together with a mask"
CAUSAL_AND_SCALE = "causal mask with a scale that is not positive"  # it gives NaN on CPUs


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(output, lse) on checked tensors. The lse is None where torch's function, which has none, was enough.

    Of ``options`` dropout_state is drawn here, and causal and aligned calls are told apart from those that are neither.
    """
    low = _common.autocast_dtype(query)
    if low is not None and query.dtype != torch.float64:
        query, key, value = query.to(low), key.to(low), value.to(low)
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(torch.promote_types(query.dtype, torch.float32))
    if options.dropout_p == 1:  # as if every value were 0
        value = value.masked_fill(torch.ones((), dtype=torch.bool, device=value.device), 0.0)
        options = options._replace(dropout_p=0.0)
    options = _simplified(query, key, options)
    record = _common.needs_grad(query, key, value, mask, options.sinks, options.alibi_slopes)
    if record and options.block_table is not None:  # gradients flow back through the gathering of the pages
        key, value = (_gathered(x, options.block_table) for x in (key, value))
        options = options._replace(block_table=None)
    unsupported = _unsupported(query, key, value, mask, options)
    lacks = _torch_lacks(query, key, value, mask, options, return_lse, record)
    kernel = backends.choose("attention", key, unsupported=unsupported, torch_lacks=lacks, record=record)
    if kernel == "torch" and not (options.packed and query.is_meta):  # torch's way reads the lengths
        if options.packed:
            packed = attention_torch.composed if lacks or unsupported else attention_torch.varlen
            return packed(query, key, value, mask, options)
        extras = (options.softcap, options.alibi_slopes, options.sinks)
        extra = return_lse or any(extra is not None for extra in extras) or lacks == CAUSAL_AND_SCALE
        if extra or _is_wider(mask, query):
            return attention_torch.composed(query, key, value, mask, options)
        return attention_torch.fused(query, key, value, mask, options), None
    if options.dropout_p > 0:
        options = options._replace(dropout_state=_draw(query.device))
    if kernel == "reference":
        return attention_torch.by_reference(query, key, value, mask, options)
    return forward(record, query, key, value, mask, *options)


def _simplified(query: Tensor, key: Tensor, options: Options) -> Options:
    """``options`` in the operator's dtypes, without a causal mask or an alignment that makes no difference."""
    sinks, slopes = (
        None if x is None else x.to(torch.promote_types(query.dtype, torch.float32))
        for x in (options.sinks, options.alibi_slopes)
    )
    bottom_right = options.bottom_right
    if not options.packed and bottom_right and query.shape[-2] == 1:
        options = options._replace(is_causal=False)  # it sees every key
    if not options.packed and query.shape[-2] == key.shape[-2]:
        bottom_right = False
    if options.window() == (None, None) and slopes is None:
        bottom_right = False
    return options._replace(sinks=sinks, alibi_slopes=slopes, bottom_right=bottom_right)


def _unsupported(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options) -> str:
    """What our kernels can't do of this call, or the empty string."""
    if found := _common.unsupported(query, key, value, mask, options.sinks, options.alibi_slopes):
        return found
    if not (1 <= query.shape[-1] <= MAX_WIDTH and 1 <= value.shape[-1] <= MAX_WIDTH):
        return f"head_dim {query.shape[-1]} and value width {value.shape[-1]}, only 1 to {MAX_WIDTH}"
    if options.alibi_slopes is not None and _common.needs_grad(options.alibi_slopes):
        return "a gradient of alibi_slopes"
    return ""


def _torch_lacks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options, return_lse: bool, record: bool
) -> str:
    """What torch's own fused functions can't do of this call, or the empty string."""
    if options.packed:
        return attention_torch.varlen_lacks(query, key, value, options, return_lse, record)
    left, right = options.window()
    if options.softcap is not None:
        return "softcap"
    if options.sinks is not None:
        return "sinks"
    if return_lse:
        return "log-sum-exp"
    if left is not None or right not in (None, 0):
        return "window"
    if options.alibi_slopes is not None:
        return "ALiBi"
    if options.bottom_right:
        return BOTTOM_RIGHT
    if right == 0 and options.scale <= 0:
        return CAUSAL_AND_SCALE
    if options.is_causal and mask is not None:
        return CAUSAL_AND_MASK
    if _is_wider(mask, query):
        return f"mask in {mask.dtype} for {query.dtype}"
    return ""


def _is_wider(mask: Tensor | None, query: Tensor) -> bool:
    """Whether the mask has digits that the query's dtype has not, which torch's own function takes on CPUs only."""
    return mask is not None and mask.dtype not in (torch.bool, query.dtype) and not query.is_cpu


def _draw(device: torch.device) -> Tensor:
    """A dropout_state from torch's generator, without waiting for the device."""
    return torch.randint(2**62, (2,), dtype=torch.int64, device=device)


def _gathered(pages: Tensor, block_table: Tensor) -> Tensor:
    """[B, G, P * page size, D] of pages [pages, G, page size, D]; entries that stand for no page give any."""
    _, kv_heads, page_size, width = pages.shape
    rows = pages.transpose(1, 2).flatten(1)  # of a page; a view where pages lie in memory as varlen_attn takes them
    # An embedding, because indexing adds up the gradients of a shared page in any order on a CPU.
    found = torch.nn.functional.embedding(block_table.clamp(0, max(pages.shape[0] - 1, 0)), rows)
    return found.unflatten(-1, (page_size, kv_heads, width)).flatten(1, 2).transpose(1, 2)


def _empty_heads(like: Tensor, seqlen: int, width: int) -> Tensor:
    """[B, heads, seqlen, width] of ``like``'s batch and heads that lies in memory as [B, seqlen, heads, width]."""
    return like.new_empty(like.shape[0], seqlen, like.shape[1], width).transpose(1, 2)


@torch.library.register_fake("fastformer::attention_forward")
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    output = _empty_heads(query, query.shape[2], value.shape[3])
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("fastformer::attention_backward")
def _(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    softcap: float | None,
    needs_grad_mask: bool,
    window_left: int | None = None,
    window_right: int | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = tuple(_empty_heads(x, x.shape[2], x.shape[3]) for x in (query, key, value))
    mask_shape = (*query.shape[:3], key.shape[2]) if needs_grad_mask else (0,)
    grad_mask = query.new_empty(mask_shape, dtype=torch.float32)
    return *grads, grad_mask, query.new_empty(0 if sinks is None else query.shape[1], dtype=torch.float32)


_TENSOR_OPTIONS = (
    "alibi_slopes",
    "sinks",
    "dropout_state",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_k",
    "block_table",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    options = Options(*inputs[4:])
    tensors = [getattr(options, name) for name in _TENSOR_OPTIONS]
    if any(tensor is not None for tensor in tensors):  # to replace nothing would take 2 us of a call's 14
        options = options._replace(**dict.fromkeys(_TENSOR_OPTIONS))
    ctx.options = options
    ctx.backend = backends.requested()
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output, *tensors)


def _backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, mask, output, lse, *tensors = ctx.saved_tensors
    options: Options = ctx.options._replace(**dict(zip(_TENSOR_OPTIONS, tensors)))
    if options.block_table is not None:
        raise RuntimeError("block_table: attention over pages has no backward pass; gather them first")
    if torch.is_grad_enabled():  # create_graph

        def composed(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            return attention_torch.composed(query, key, value, mask, options._replace(sinks=sinks))

        tensors = (query, key, value, mask, options.sinks)
        *grads, grad_sinks = _common.differentiable_vjp(composed, tensors, (grad_output, grad_lse))
        return _by_arguments(grads, grad_sinks)
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    needs_grad_mask = mask is not None and ctx.needs_input_grad[3]
    with _common.forwards_backend(ctx):
        *grads, grad_mask, grad_sinks = _backward_kernel(
            grad_output,
            grad_lse,
            query,
            key,
            value,
            mask,
            output,
            lse,
            *options[:4],
            needs_grad_mask,
            *options[4:13],  # without block_table,
            *options[14:16],  # and without num_splits
        )
    grad_mask = grad_mask.sum_to_size(mask.shape).to(mask.dtype) if needs_grad_mask else None
    return _by_arguments([*grads, grad_mask], None if options.sinks is None else grad_sinks)


def _by_arguments(grads: list[Tensor | None], grad_sinks: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, mask and sinks, in their places among the operator's arguments."""
    options: list[Tensor | None] = [None] * len(Options._fields)
    options[Options._fields.index("sinks")] = grad_sinks
    return *grads, *options


forward = _common.differentiable("attention_forward", _setup_context, _backward)
_backward_kernel = _common.kernel("attention_backward")
_common.register("attention", ["attention_forward", "attention_backward"])
