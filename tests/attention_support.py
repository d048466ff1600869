"""What attention's tests share: a call as a value, its tensors, and the three ways to compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import support
import torch
from cuda_support import CUDA_TARGETS
from support import RuleBroken, Target, check, laid_out, tensor
from torch import Tensor

import fastformer.functional as F
from fastformer import backends, reference
from fastformer.ops import attention as operation
from fastformer.ops import attention_torch
from fastformer.ops.attention_torch import Options

Result = Tensor | tuple[Tensor, Tensor]

CUDA_16BIT = [target for target in CUDA_TARGETS if target.dtype in backends.CUDA_DTYPES["attention"]]
TARGETS = support.TARGETS + CUDA_16BIT
KERNEL_TARGETS = support.KERNEL_TARGETS + CUDA_16BIT
FAST_TARGETS = [target for target in KERNEL_TARGETS if not target.slow]
#: Those that do some hundreds of queries and keys in a second or two.
BLOCK_TARGETS = FAST_TARGETS + [target for target in CUDA_16BIT if target.slow]

on_targets = pytest.mark.parametrize("target", TARGETS, ids=str)
on_kernels = pytest.mark.parametrize("target", KERNEL_TARGETS, ids=str)
on_blocks = pytest.mark.parametrize("target", BLOCK_TARGETS, ids=str)
on_fast_kernels = pytest.mark.parametrize("target", FAST_TARGETS, ids=str)

NO_WINDOW = (None, None)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    return_lse: bool = True,
    dropout_state: Tensor | None = None,
    **options: Any,
) -> Result:
    """The public function, with the lse. ``dropout_state``: instead of one drawn from torch's generator."""
    arguments = {"enable_gqa": True, "return_lse": return_lse, **options}
    if dropout_state is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **arguments)
    with drawing(dropout_state):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **arguments)


@contextmanager
def drawing(dropout_state: Tensor) -> Iterator[None]:
    """Attention draws this state."""
    with mock.patch.object(operation, "_draw", lambda device: dropout_state.to(device)):
        yield


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    return_lse: bool = True,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    **options: Any,
) -> Result:
    """The reference under the public function's names."""
    bottom_right = causal_alignment == "bottom_right"
    options.update(bottom_right=bottom_right, window=window or NO_WINDOW)
    output, lse = reference.attention(query, key, value, attn_mask, **options)
    return (output, lse) if return_lse else output


def composed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    return_lse: bool = True,
    scale: float | None = None,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    **options: Any,
) -> Result:
    """torch's functions one behind the other; unlike its own attention they take a ``dropout_state``."""
    left, right = window or NO_WINDOW
    options.update(bottom_right=causal_alignment == "bottom_right", window_left=left, window_right=right)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output, lse = attention_torch.composed(query, key, value, attn_mask, Options(scale, **options))
    return (output, lse) if return_lse else output


def inputs(
    target: Target, batch: int, heads: int, kv_heads: int, seqlen_q: int, seqlen_k: int, head_dim: int, value_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        tensor(target, batch, heads, seqlen_q, head_dim),
        tensor(target, batch, kv_heads, seqlen_k, head_dim),
        tensor(target, batch, kv_heads, seqlen_k, value_dim),
    )


#: Kinds of masks: bool by elements or by tiles of 32 x 32, added ones that get a gradient, or have -inf, or get none.
MASKS = ("bool", "tiles", "added", "infinite", "constant")


@dataclass(frozen=True)
class Case:
    """One call: its sizes, which tensors it has besides query, key and value, and the other arguments."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 1
    seqlen_q: int = 20  # in tensors of a few elements torch's error is a matter of luck
    seqlen_k: int = 27
    head_dim: int = 8
    value_dim: int = 8
    mask: str = ""  # one of MASKS, or none
    mask_over: str = "BHQK"  # the dimensions in which the mask is not 1
    slopes: str = ""  # "H" or "BH", or none
    learned_slopes: bool = False
    sinks: bool = False
    is_causal: bool = False
    causal_alignment: str = "top_left"
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    return_lse: bool = True
    spread: float = 1.0  # of the scores, roughly
    layout: str = "contiguous"  # of key and value, one of support.LAYOUTS

    def options(self) -> dict[str, Any]:
        names = ("is_causal", "causal_alignment", "window", "softcap", "scale", "dropout_p", "return_lse")
        return {name: getattr(self, name) for name in names}

    def tensors(self, target: Target) -> dict[str, Tensor]:
        """Those that there are, by the public function's names for them."""
        factor = math.sqrt(self.spread)
        kv_heads = (self.batch, self.kv_heads, self.seqlen_k)
        found = {
            "query": tensor(target, self.batch, self.heads, self.seqlen_q, self.head_dim, scale=factor),
            "key": laid_out(target, self.layout, *kv_heads, self.head_dim) * factor,
            "value": laid_out(target, self.layout, *kv_heads, self.value_dim),
        }
        if self.mask:
            found["attn_mask"] = self._mask(target)
        if self.slopes:
            shape = (self.heads,) if self.slopes == "H" else (self.batch, self.heads)
            dtype = target.dtype if self.learned_slopes else torch.float32
            found["alibi_slopes"] = (torch.rand(shape) / 2).to(target.device, dtype)
        if self.sinks:
            found["sinks"] = tensor(target, self.heads)
        if self.dropout_p > 0:
            found["dropout_state"] = torch.randint(2**62, (2,)).to(target.device)
        return found

    def constants(self) -> set[str]:
        """Names of the floating-point tensors that get no gradient."""
        constant = {"attn_mask"} if self.mask == "constant" else set()
        return constant if self.learned_slopes else constant | {"alibi_slopes"}

    def visible(self, tensors: dict[str, Tensor]) -> Tensor:
        """bool [batch, heads, seqlen_q, seqlen_k]: which keys a query may attend to."""
        left, right = reference.causal_window(self.window or NO_WINDOW, self.is_causal)
        bottom_right = self.causal_alignment == "bottom_right"
        seen = reference.window_mask(self.seqlen_q, self.seqlen_k, left, right, bottom_right=bottom_right)
        mask = tensors.get("attn_mask")
        if mask is not None:
            seen = seen.to(mask.device) & (mask if mask.dtype == torch.bool else mask != -math.inf)
        return seen.expand(self.batch, self.heads, self.seqlen_q, self.seqlen_k)

    def _mask(self, target: Target) -> Tensor:
        sizes = {"B": self.batch, "H": self.heads, "Q": self.seqlen_q, "K": self.seqlen_k}
        shape = [size if name in self.mask_over else 1 for name, size in sizes.items()]
        if self.mask == "bool":
            return (torch.rand(shape) > 0.3).to(target.device)
        if self.mask == "tiles":
            tiles = torch.rand(*shape[:2], *(-(-size // 32) for size in shape[2:])) > 0.4
            tiles = tiles.repeat_interleave(32, 2).repeat_interleave(32, 3)
            return tiles[..., : shape[2], : shape[3]].contiguous().to(target.device)
        mask = tensor(target, *shape)
        return mask.masked_fill(mask < -1, -math.inf) if self.mask == "infinite" else mask


def check_case(target: Target, case: Case) -> None:
    """Output, lse and every gradient of a call, by the error rule."""
    without_chance(lambda: check_tensors(target, case, case.tensors(target)))


def without_chance(judge: Callable[[], None]) -> None:
    """Calls ``judge``, which draws values, once more where they break the error rule by less than a factor of four, and
    then once more. What a kernel does wrong, it does again.

    A backward pass computes the weights from the lse and delta from the output, whose float32 roundings are errors that
    a whole row has in common; torch's composition, the peer of most features, keeps the weights, and such errors
    cancel. They stand out in a row with one large weight, a large delta and a small gradient: the rms of our float32
    errors is 0.9 to 1.5 times that of torch's (2 for gradients of keys that one query sees), but the largest of a
    tensor is more than 3 times torch's in one of 100 to 300 tensors, and may be 10 times.
    """
    for _ in range(2):
        try:
            return judge()
        except RuleBroken as error:
            if error.excess > 4:
                raise
    judge()


def check_tensors(target: Target, case: Case, tensors: dict[str, Tensor]) -> None:
    """Output, lse and every gradient on these tensors."""
    tensors = dict(tensors)
    fixed = {name: tensors.pop(name) for name in case.constants() & tensors.keys()}
    if "dropout_state" in tensors:
        fixed["dropout_state"] = tensors.pop("dropout_state")

    def bound(function: Callable[..., Result]) -> Callable[..., Result]:
        return lambda *leaves: function(**dict(zip(tensors, leaves)), **fixed, **case.options())

    def sums(cotangents: list[Tensor]) -> dict[int, Tensor]:
        sizes = sizes_of_sums(case, tensors | fixed, cotangents)
        gradients = [name for name, x in tensors.items() if x.is_floating_point()]
        return {i: sizes[name] for i, name in enumerate(gradients) if name in sizes}

    peer = composed if case.dropout_p > 0 else attend
    check(target, bound(attend), bound(peer), bound(exact), list(tensors.values()), sums=sums)


def sizes_of_sums(case: Case, tensors: dict[str, Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
    """For the gradients of slopes, sinks and a mask that is broadcast: the greatest sum of their absolute terms."""
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    query, mask = doubles["query"], doubles.pop("attn_mask", None)
    shape = (case.batch, case.heads, case.seqlen_q, case.seqlen_k)
    probe = query.new_zeros(shape).requires_grad_()  # added to the scores
    if mask is None:
        doubles["attn_mask"] = probe
    else:
        doubles["attn_mask"] = probe.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else probe + mask
    results = exact(**doubles, **case.options() | {"return_lse": True})
    cotangents = [*cotangents, query.new_zeros(shape[:3])][:2]
    (terms,) = torch.autograd.grad(results, probe, cotangents)
    sizes = {}
    if mask is not None and mask.shape != probe.shape:
        sizes["attn_mask"] = terms.abs().sum_to_size(mask.shape).max()
    if case.slopes:
        bottom_right = case.causal_alignment == "bottom_right"
        far = reference.alibi_bias(query.new_ones(1), *shape[2:], bottom_right=bottom_right)
        sizes["alibi_slopes"] = (terms * far).abs().sum_to_size(*tensors["alibi_slopes"].shape, 1, 1).max()
    if case.sinks:  # the gradients of all scores of a row, the sink's too, have the sum of the lse's
        sizes["sinks"] = (cotangents[1] - terms.sum(-1)).abs().sum((0, 2)).max()
    return sizes
