"""The peers that more than one operation has, or that come from packages which need not be there.

Each is a function of a case's inputs, or the reason why it can't be one. Tensors go to a kernel in the layout it
wants as views, so that no copy is timed. No package is imported before a case on a GPU asks for its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .checking import describe
from .harness import Function

DEVICES = ("cuda",)  # that the packages' kernels run on

Maker = Callable[..., Function | str]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, query, key) -> may it attend?

SDPA_KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
CPU_SDPA_KERNELS = ("math", "flash")


def sdpa(device: torch.device, attend: Function) -> dict[str, Function]:
    """``attend``, which calls torch's attention, with the kernel that torch picks and with each of them by name."""
    names = CPU_SDPA_KERNELS if device.type == "cpu" else SDPA_KERNELS
    return {"sdpa": attend} | {f"sdpa: {name}": partial(_with_kernel, SDPA_KERNELS[name], attend) for name in names}


def _with_kernel(kernel: SDPBackend, attend: Function, **inputs: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return attend(**inputs)


def flex(device: torch.device, suite: str, mask_mod: MaskMod | None = None) -> dict[str, Function | str]:
    """FlexAttention. Each size takes its compiler up to ten seconds: not in a hurry on a CPU, and not at all sizes."""
    if device.type == "cpu" and suite != "full":
        return {"flex": "compiles too long for this suite"}
    return {"flex": FlexAttention(mask_mod)}


class FlexAttention:
    """Compiled; the mask of blocks is made in the first call, as a model makes one for all of its layers."""

    def __init__(self, mask_mod: MaskMod | None) -> None:
        self.mask_mod = mask_mod
        self.block_mask: Any = None
        self.compiled: Function | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.device.type == "cpu":
            if torch.is_grad_enabled():
                raise NotImplementedError("FlexAttention has no backward pass on CPUs")
            query, key, value = query.detach(), key.detach(), value.detach()  # it looks at requires_grad alone
        if self.compiled is None:
            self._prepare(query, key)
        enable_gqa = query.shape[1] != key.shape[1]
        return self.compiled(query, key, value, block_mask=self.block_mask, enable_gqa=enable_gqa)

    def _prepare(self, query: Tensor, key: Tensor) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # imports the compiler

        if self.mask_mod is not None:
            lengths = query.shape[2], key.shape[2]
            self.block_mask = create_block_mask(self.mask_mod, None, None, *lengths, device=query.device)
        torch._dynamo.reset()  # or, after a few sizes, it refuses to compile more
        self.compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)


def causal_mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """FlexAttention's way to say that a query sees no later keys."""
    return query >= key


@dataclass(frozen=True)
class Package:
    """What need not be installed; ``dtypes``: that its kernels for GPUs take."""

    module: str
    name: str  # pip's
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


PACKAGES = {
    "liger": Package("liger_kernel", "liger-kernel"),
    "flash-attn": Package("flash_attn", "flash-attn", (torch.float16, torch.bfloat16)),
    "quack": Package("quack", "quack-kernels"),
}


def optional(operation: str, device: torch.device, dtype: torch.dtype, **settings: Any) -> dict[str, Function | str]:
    """The packages' kernels for an operation, or the reasons why they don't run; ``settings``: of the makers below."""
    return {name: _made(name, make, device, dtype, settings) for name, make in MAKERS[operation].items()}


def _made(name: str, make: Maker, device: torch.device, dtype: torch.dtype, settings: dict[str, Any]) -> Function | str:
    package = PACKAGES[name]
    if device.type not in DEVICES:
        return "needs a GPU"
    if dtype not in package.dtypes:
        return f"does not take {str(dtype).removeprefix('torch.')}"
    try:
        return make(**settings)
    except Exception as error:
        return why_not_imported(error, package)


def why_not_imported(error: Exception, package: Package) -> str:
    """What an import has raised: anything, of a package that was built for another torch or CUDA."""
    if isinstance(error, ModuleNotFoundError) and error.name == package.module:
        return f"not installed: pip install {package.name}"
    return f"{package.module} can't be imported: {describe(error)}"


def _liger_softmax() -> Function:
    from liger_kernel.transformers.functional import liger_softmax

    return lambda input: liger_softmax(input)


def _quack_softmax() -> Function:
    from quack import softmax

    return lambda input: softmax(input)


def _liger_layer_norm(eps: float) -> Function:
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda input, weight, bias: liger_layer_norm(input, weight, bias, eps)


def _liger_rms_norm(eps: float) -> Function:
    from liger_kernel.transformers.functional import liger_rms_norm

    # By default it overwrites the gradient that it is given, which is everyone's here.
    return lambda input, weight: liger_rms_norm(input, weight, eps, in_place=False)


def _liger_add_rms_norm(eps: float) -> Function:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return lambda input, residual, weight: liger_fused_add_rms_norm(input, residual, weight, eps, in_place=False)


def _quack_layer_norm(eps: float) -> Function:
    from quack.rmsnorm import layernorm_fwd

    def call(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("quack's layernorm has no backward pass for autograd")
        return layernorm_fwd(input, weight, bias, eps)  # refuses weights that are not float32

    return call


def _quack_rms_norm(eps: float) -> Function:
    from quack import rmsnorm

    return lambda input, weight: rmsnorm(input, weight, eps=eps)


def _quack_add_rms_norm(eps: float) -> Function:
    from quack import rmsnorm

    return lambda input, residual, weight: rmsnorm(input, weight, residual=residual, eps=eps, prenorm=True)


def _flash_attention(is_causal: bool, window: int | None = None) -> Function:
    from flash_attn import flash_attn_func

    sides = (-1, -1) if window is None else (window - 1, 0)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads_inside = (x.transpose(1, 2) for x in (query, key, value))  # [B, S, H, D]
        return flash_attn_func(*heads_inside, causal=is_causal, window_size=sides).transpose(1, 2)

    return call


def _flash_decoding() -> Function:
    from flash_attn import flash_attn_with_kvcache

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flash_attn_with_kvcache(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    return call


def _flash_packed(starts: Tensor, longest: int, is_causal: bool) -> Function:
    from flash_attn import flash_attn_varlen_func

    ends = (starts, starts, longest, longest)
    return lambda query, key, value: flash_attn_varlen_func(query, key, value, *ends, causal=is_causal)


def _flash_paged(table: Tensor, used: Tensor, page_size: int) -> Function | str:
    from flash_attn import flash_attn_with_kvcache

    if page_size % 256:
        return "its pages hold a multiple of 256 keys"

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache = {"cache_seqlens": used, "block_table": table}
        return flash_attn_with_kvcache(query.unsqueeze(1), key, value, **cache).squeeze(1)

    return call


def _liger_feed_forward(activation: str, gated: bool) -> Function | str:
    from liger_kernel.transformers import functional

    # It has the product of the gate and what is gated; the projections are torch's, as in its modules.
    names = {"silu": "liger_swiglu", "gelu_tanh": "liger_geglu"}
    if not gated or activation not in names:
        return "has swiglu and geglu alone"
    gate = getattr(functional, names[activation])
    linear = torch_functional.linear

    def call(input: Tensor, weight1: Tensor, weight2: Tensor, weight_gate: Tensor) -> Tensor:
        return linear(gate(linear(input, weight_gate), linear(input, weight1)), weight2)

    return call


def _liger_linear_cross_entropy() -> Function:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def call(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # it looks at requires_grad alone, and would compute gradients
            input, linear_weight = input.detach(), linear_weight.detach()
        return liger_fused_linear_cross_entropy(input, linear_weight, target)

    return call


def _quack_linear_cross_entropy() -> Function:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy_func

    def call(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        if any(size % 8 for size in (*input.shape, *linear_weight.shape)):  # its module's rule
            return linear_cross_entropy_func(input, linear_weight, None, target)
        return chunked_linear_cross_entropy(input, linear_weight, target)

    return call


def _liger_rotary() -> Function:
    from liger_kernel.transformers.functional import liger_rope

    # In place, where the heads lie inside of the positions.
    def call(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return liger_rope(query, key, cos, sin, rotary_dim=2 * cos.shape[-1])

    return call


def _quack_rotary() -> Function:
    from quack.rotary import apply_rotary_emb

    def call(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        heads_inside = (x.transpose(1, 2) for x in (query, key))  # [B, S, H, D]
        query, key = (apply_rotary_emb(x, cos, sin).transpose(1, 2) for x in heads_inside)
        return query, key

    return call


MAKERS: dict[str, dict[str, Maker]] = {
    "softmax": {"liger": _liger_softmax, "quack": _quack_softmax},
    "layer_norm": {"liger": _liger_layer_norm, "quack": _quack_layer_norm},
    "rms_norm": {"liger": _liger_rms_norm, "quack": _quack_rms_norm},
    "add_layer_norm": {},
    "add_rms_norm": {"liger": _liger_add_rms_norm, "quack": _quack_add_rms_norm},
    "attention": {"flash-attn": _flash_attention},
    "decoding": {"flash-attn": _flash_decoding},
    "packed": {"flash-attn": _flash_packed},
    "paged": {"flash-attn": _flash_paged},
    "feed_forward": {"liger": _liger_feed_forward},
    "linear_cross_entropy": {"liger": _liger_linear_cross_entropy, "quack": _quack_linear_cross_entropy},
    "rotary": {"liger": _liger_rotary, "quack": _quack_rotary},
}
