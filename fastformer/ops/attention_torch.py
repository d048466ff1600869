"""Attention by torch's own functions: where they run instead of our kernels, and for gradients of gradients.

Shapes and meaning of the arguments: csrc/ops.cpp.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import reference
from fastformer.ops import _common


class Options(NamedTuple):
    """attention_forward's arguments behind query, key, value and mask, in the schema's order."""

    scale: float
    is_causal: bool = False
    bottom_right: bool = False
    softcap: float | None = None
    window_left: int | None = None
    window_right: int | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    dropout_state: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    block_table: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    num_splits: int = 0

    @property
    def packed(self) -> bool:
        """Whether each sequence has lengths of its own."""
        return self.cu_seqlens_q is not None or self.cu_seqlens_k is not None or self.seqused_k is not None

    def window(self) -> tuple[int | None, int | None]:
        """(left, right) with the causal bound."""
        return reference.causal_window((self.window_left, self.window_right), self.is_causal)


Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Options, int], tuple[Tensor, Tensor]]


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """torch's scaled_dot_product_attention on dense tensors, except that a row with nothing to attend to gives zeros.

    The window becomes a part of the mask. It has no softcap, no ALiBi and no sinks.
    """
    # torch's kernel for CPUs, which does not do dropout, has no gradients of gradients.
    lacking = query.is_cpu and options.dropout_p == 0 and _common.ordinary(query, key, value, mask)
    if lacking and _common.needs_grad(query, key, value, mask):
        return _TwiceDifferentiable.apply(query, key, value, mask, options)
    return _fused(query, key, value, mask, options)


class _TwiceDifferentiable(torch.autograd.Function):
    """``_fused`` with its own gradients, whose gradients are those of ``composed``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options) -> Tensor:
        tensors = (query, key, value, mask)
        ctx.options = options
        ctx.save_for_backward(*tensors)
        ctx.leaves = [x.detach().requires_grad_() if wanted else x for x, wanted in zip(tensors, ctx.needs_input_grad)]
        with torch.enable_grad():
            ctx.output = _fused(*ctx.leaves, options)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # an error, if one was changed meanwhile
        if torch.is_grad_enabled():

            def output(*tensors: Tensor | None) -> Tensor:
                return composed(*tensors, ctx.options)[0]

            return *_common.differentiable_vjp(output, tensors, (grad_output,)), None
        wanted = [x for x, needed in zip(ctx.leaves, ctx.needs_input_grad) if needed]
        found = iter(torch.autograd.grad(ctx.output, wanted, grad_output, retain_graph=True))
        return *(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), None


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    gqa = query.shape[1:2] != key.shape[1:2]  # of symbolic sizes too this is a bool
    seqlen_k = key.shape[2]
    left, right = options.window()
    aligned = not options.bottom_right and left is None and right in (None, 0)
    if mask is None and aligned and seqlen_k > 0:
        return torch_functional.scaled_dot_product_attention(
            query, key, value, None, options.dropout_p, right == 0, scale=options.scale, enable_gqa=gqa
        )
    allowed = _window_mask(query, key, options)
    if allowed is None:
        allowed = torch.ones(1, seqlen_k, dtype=torch.bool, device=query.device)
    if mask is not None:
        allowed = allowed & (mask if mask.dtype == torch.bool else mask != -math.inf)
    empty = ~allowed.any(-1, keepdim=True)
    allowed = allowed | empty  # so that torch has something to normalise there; those rows are cleared below
    additive = mask is not None and mask.dtype != torch.bool
    mask = mask.masked_fill(empty, 0.0).masked_fill(~allowed, -math.inf) if additive else allowed
    output = torch_functional.scaled_dot_product_attention(
        query, key, value, mask, options.dropout_p, scale=options.scale, enable_gqa=gqa
    )
    return output.masked_fill(empty, 0.0)


def _window_mask(query: Tensor, key: Tensor, options: Options) -> Tensor | None:
    """bool [Sq, Sk] of the window with the causal bound, or None where there is neither."""
    left, right = options.window()
    if left is None and right is None:
        return None
    lengths = query.shape[2], key.shape[2]
    return reference.window_mask(*lengths, left, right, bottom_right=options.bottom_right, device=query.device)


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores, or a part of them, with a mask applied."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def composed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """(output, lse) with every option, by torch's differentiable functions, in float32 at least, under autocast too."""
    if _common.autocast_dtype(query) is None:
        return per_sequence(_composed, query, key, value, mask, options)
    with torch.autocast(query.device.type, enabled=False):
        return per_sequence(_composed, query, key, value, mask, options)


def by_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """(output, lse) of the reference in the kernels' dtypes."""
    output, lse = per_sequence(_reference, query, key, value, mask, options)
    return output.to(query.dtype), lse.to(torch.promote_types(query.dtype, torch.float32))


def per_sequence(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Calls ``attention`` once for dense tensors, or once for each sequence of packed or paged ones, whose results it
    packs. Reads the lengths then, which waits for the device.
    """
    if not options.packed:
        return attention(query, key, value, mask, options, 0)
    starts_q, starts_k, used, table = (
        None if x is None else x.tolist()
        for x in (options.cu_seqlens_q, options.cu_seqlens_k, options.seqused_k, options.block_table)
    )
    plain = options._replace(cu_seqlens_q=None, cu_seqlens_k=None, seqused_k=None, block_table=None)
    count = query.shape[0] if starts_q is None else len(starts_q) - 1
    outputs, lses = [], []
    for i in range(count):
        q = query[i : i + 1] if starts_q is None else query[:, :, starts_q[i] : starts_q[i + 1]]
        if table is not None:
            pages = table[i][: -(-used[i] // key.shape[2])]
            k, v = (x[pages].transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (key, value))
        elif starts_k is None:
            k, v = key[i : i + 1], value[i : i + 1]
        else:
            k, v = (x[:, :, starts_k[i] : starts_k[i + 1]] for x in (key, value))
        if used is not None:
            k, v = k[:, :, : used[i]], v[:, :, : used[i]]
        slopes = options.alibi_slopes
        slopes = slopes[i : i + 1] if slopes is not None and slopes.dim() > 1 else slopes
        output, lse = attention(q, k, v, mask, plain._replace(alibi_slopes=slopes), i)
        outputs.append(output)
        lses.append(lse)
    if starts_q is None:
        return torch.cat(outputs), torch.cat(lses)
    if not outputs:
        nothing = (query[:, :, :0], *(x.new_zeros(1, x.shape[1], 0, x.shape[3]) for x in (key, value)))
        output, lse = attention(*nothing, mask, plain._replace(alibi_slopes=None), 0)
        outputs, lses = [output], [lse]
    rest = query.shape[2] - starts_q[-1]  # rows of no sequence
    output, lse = torch.cat(outputs, 2), torch.cat(lses, 2)
    return torch_functional.pad(output, (0, 0, 0, rest)), torch_functional.pad(lse, (0, rest), value=-math.inf)


def _reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options, first: int
) -> tuple[Tensor, Tensor]:
    return reference.attention(
        query,
        key,
        value,
        mask,
        scale=options.scale,
        is_causal=options.is_causal,
        bottom_right=options.bottom_right,
        window=(options.window_left, options.window_right),
        softcap=options.softcap,
        alibi_slopes=options.alibi_slopes,
        sinks=options.sinks,
        dropout_p=options.dropout_p,
        dropout_state=options.dropout_state,
        first_sequence=first,
    )


def _composed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options, first: int
) -> tuple[Tensor, Tensor]:
    weights, lse = weigh(query, key, mask, options, first)
    return (weights @ repeated(value, query).to(weights.dtype)).to(query.dtype), lse


def repeated(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values, repeated for the query heads that share them: [B, H, Sk, D or Dv]."""
    heads, kv_heads = query.shape[1], x.shape[1]
    return x if heads == kv_heads else x.repeat_interleave(heads // kv_heads, 1)


def weigh(query: Tensor, key: Tensor, mask: Tensor | None, options: Options, first: int = 0) -> tuple[Tensor, Tensor]:
    """(weights [B, H, Sq, Sk] after dropout, lse) in float32 at least, on dense tensors.

    ``first``: the number of the first sequence, which dropout goes by.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    scores = query.to(dtype) @ repeated(key, query).to(dtype).mT * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.to(dtype)
        scores = scores + reference.alibi_bias(slopes, seqlen_q, seqlen_k, bottom_right=options.bottom_right)
    scores = masked(masked(scores, mask), _window_mask(query, key, options))
    if options.sinks is not None:
        sinks = options.sinks.to(dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), -1)
    empty = (scores == -math.inf).all(-1)
    scores = scores.masked_fill(empty.unsqueeze(-1), 0.0)
    weights = torch.softmax(scores, -1).masked_fill(empty.unsqueeze(-1), 0.0)[..., :seqlen_k]
    lse = torch.logsumexp(scores, -1).masked_fill(empty, -math.inf)
    if options.dropout_state is not None:
        kept = reference.dropout_mask(options.dropout_state, options.dropout_p, *weights.shape, first_sequence=first)
        weights = weights.masked_fill(~kept, 0.0) / (1 - options.dropout_p)
    elif options.dropout_p > 0:
        weights = torch_functional.dropout(weights, options.dropout_p)
    return weights, lse


# --- packed sequences


def _torch_varlen() -> ModuleType:
    """Imported late: it registers operators."""
    return importlib.import_module("torch.nn.attention.varlen")


def varlen_lacks(query: Tensor, key: Tensor, value: Tensor, options: Options, return_lse: bool, record: bool) -> str:
    """What torch's varlen_attn can't do of this call, or the empty string."""
    if query.device.type != "cuda":
        return f"packed sequences on {query.device.type}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"packed sequences in {query.dtype}"
    if query.shape[-1] != value.shape[-1]:
        return "value width of its own"
    for name in ("softcap", "alibi_slopes", "sinks"):
        if getattr(options, name) is not None:
            return f"{name} for packed sequences"
    if record and options.seqused_k is not None:
        return "gradients with seqused_k"
    if record and return_lse:
        return "gradient of the log-sum-exp"  # it takes one, and leaves it out
    missing = (
        _varlen_extras(options, query.shape[1] != key.shape[1]).keys()
        - inspect.signature(_torch_varlen().varlen_attn).parameters.keys()
    )
    return " and ".join(sorted(missing))


def varlen(query: Tensor, key: Tensor, value: Tensor, mask: None, options: Options) -> tuple[Tensor, Tensor]:
    """torch's varlen_attn on query [1, H, Tq, D] and key, value [1, G, Tk, D], or pages; see varlen_lacks.

    It leaves rows of no sequence as it finds them in memory, in the gradients too: they are cleared. The lse of a row
    without keys is plus infinity there.
    """
    torch_varlen = _torch_varlen()
    no_query = _of_no_sequence(query, options.cu_seqlens_q)
    if _common.needs_grad(query, key, value):
        query = query.masked_fill(no_query.unsqueeze(-1), 0.0)
        no_key = _of_no_sequence(key, options.cu_seqlens_k).unsqueeze(-1)
        key, value = key.masked_fill(no_key, 0.0), value.masked_fill(no_key, 0.0)
    output, lse = torch_varlen.varlen_attn(
        query[0].transpose(0, 1),
        *(x[0].transpose(0, 1) if options.block_table is None else x.transpose(1, 2) for x in (key, value)),
        options.cu_seqlens_q,
        options.cu_seqlens_k,
        options.max_seqlen_q,
        options.max_seqlen_k,
        return_aux=torch_varlen.AuxRequest(lse=True),
        scale=options.scale,
        **_varlen_extras(options, query.shape[1] != key.shape[1]),
    )
    output = output.transpose(0, 1).unsqueeze(0).masked_fill(no_query.unsqueeze(-1), 0.0)
    return output, lse.unsqueeze(0).masked_fill(no_query | (lse == math.inf), -math.inf)


def _of_no_sequence(x: Tensor, starts: Tensor) -> Tensor:
    """bool [T] of packed x [1, heads, T, width], True for the rows behind the last sequence."""
    return torch.arange(x.shape[2], device=x.device) >= starts[-1]


def _varlen_extras(options: Options, gqa: bool) -> dict[str, Any]:
    """The arguments of torch's varlen_attn that are not in every version of it, where they are needed."""
    left, right = (-1 if x is None else x for x in options.window())
    extras = {
        "window_size": None if left == right == -1 else (left, right),
        "enable_gqa": gqa or None,
        "seqused_k": options.seqused_k,
        "block_table": options.block_table,
        "num_splits": options.num_splits or None,
    }
    return {name: value for name, value in extras.items() if value is not None}
