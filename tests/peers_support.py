"""Stand-ins for the packages that the benchmarks have peers from: the real functions' signatures, and the habits that
a caller must know, in plain torch. Liger-Kernel 0.8.5, quack 0.6.4, flash-attn 2.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import reference


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes them importable until the test ends."""
    modules = {
        "liger_kernel": [],
        "liger_kernel.transformers": [],
        "liger_kernel.transformers.functional": [
            liger_softmax,
            liger_layer_norm,
            liger_rms_norm,
            liger_fused_add_rms_norm,
            liger_swiglu,
            liger_geglu,
            liger_rope,
            liger_fused_linear_cross_entropy,
        ],
        "quack": [softmax, rmsnorm],
        "quack.rmsnorm": [layernorm_fwd],
        "quack.rotary": [apply_rotary_emb],
        "quack.linear_cross_entropy": [chunked_linear_cross_entropy, linear_cross_entropy_func],
        "flash_attn": [flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache],
    }
    for name, functions in modules.items():
        module = ModuleType(name)
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["liger_kernel.transformers"].functional = sys.modules["liger_kernel.transformers.functional"]


class OverwritesGradient(torch.autograd.Function):
    """Does nothing, but leaves no gradient as it was."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad_output: Tensor) -> Tensor:
        kept = grad_output.clone()
        grad_output.zero_()
        return kept


class GradientOfOne(torch.autograd.Function):
    """Does nothing. The real one has computed the gradients in the forward pass, for a loss whose gradient is 1."""

    @staticmethod
    def forward(ctx: object, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: object, grad_output: Tensor) -> Tensor:
        assert grad_output == 1  # else it multiplies all of them
        return grad_output


def maybe_in_place(x: Tensor, in_place: bool) -> Tensor:
    return OverwritesGradient.apply(x) if in_place else x


class RotatesInPlace(torch.autograd.Function):
    """Overwrites x [B, H, S, D], and its gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return RotatesInPlace.turn(x, cos, sin)

    @staticmethod
    def backward(ctx: object, grad_output: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return RotatesInPlace.turn(grad_output, cos, -sin), None, None

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        inside = x.transpose(1, 2)  # [B, S, H, D]
        assert inside.is_contiguous()  # else it makes a copy
        return inside.copy_(reference_rotary(x, cos, sin).transpose(1, 2)).transpose(1, 2)


def liger_softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def liger_layer_norm(X: Tensor, W: Tensor, B: Tensor, eps: float) -> Tensor:
    return torch_functional.layer_norm(X, W.shape, W, B, eps)


def liger_rms_norm(
    X: Tensor, W: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True
) -> Tensor:
    return maybe_in_place(torch_functional.rms_norm(X, W.shape, W + offset, eps), in_place)


def liger_fused_add_rms_norm(
    X: Tensor, R: Tensor, W: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True
) -> tuple[Tensor, Tensor]:
    return liger_rms_norm(X + R, W, eps, offset, casting_mode, in_place), X + R


def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
    return torch_functional.silu(a) * b


def liger_geglu(a: Tensor, b: Tensor) -> Tensor:
    return torch_functional.gelu(a, approximate="tanh") * b


def liger_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    width = (cos.shape[-1] if rotary_dim is None else rotary_dim) // 2
    assert 2 * width == q.shape[-1]
    cos, sin = cos[..., :width], sin[..., :width]
    return RotatesInPlace.apply(q, cos, sin), RotatesInPlace.apply(k, cos, sin)


def reference_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, H, S, D] in x's dtype."""
    return reference.rotary(x, x, cos, sin)[0].to(x.dtype)


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor:
    assert input.requires_grad == weight.requires_grad == torch.is_grad_enabled()  # else it does more than is timed
    return GradientOfOne.apply(linear_cross_entropy_func(input, weight, bias, target, reduction=reduction))


def softmax(x: Tensor) -> Tensor:
    assert x.dim() == 2
    return liger_softmax(x)


def rmsnorm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    summed = x if residual is None else x + residual
    normed = torch_functional.rms_norm(summed, x.shape[-1:], weight, eps)
    return (normed, summed) if prenorm else normed


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    return_rstd: bool = False,
    return_mean: bool = False,
) -> Tensor:
    assert weight.dtype == torch.float32
    return torch_functional.layer_norm(x, weight.shape, weight, bias, eps).detach()


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x: [B, S, H, D]."""
    assert cos.shape == (x.shape[1], x.shape[3] // 2)
    return reference_rotary(x.transpose(1, 2), cos, sin).transpose(1, 2)


def chunked_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    chunk_size: int = 4096,
    ignore_index: int = -100,
    reduction: str = "mean",
    tuned: bool = True,
    use_scaled_exp: bool | None = None,
) -> Tensor:
    assert not any(size % 8 for size in (*x.shape, *weight.shape))
    return linear_cross_entropy_func(x, weight, None, target, reduction=reduction)


def linear_cross_entropy_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace_backward: bool = False,
) -> Tensor:
    return torch_functional.cross_entropy(torch_functional.linear(x, weight, bias), target, reduction=reduction)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """q, k, v: [B, S, H, D]; causal from the bottom right."""
    assert q.dtype in (torch.float16, torch.bfloat16) and q.stride(-1) == 1
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    window = tuple(None if side < 0 else side for side in window_size)
    masks = {"is_causal": causal, "bottom_right": True, "window": window}
    return reference.attention(query, key, value, **masks)[0].transpose(1, 2).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """q, k, v: [T, H, D]."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    parts = zip(*(x.unsqueeze(0).split(lengths, 1) for x in (q, k, v)))
    return torch.cat([flash_attn_func(*part, causal=causal) for part in parts], 1).squeeze(0)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """q: [B, S, H, D]; the caches [B, S, G, D], or [pages, page size, G, D] with a block_table."""
    if block_table is None:
        return flash_attn_func(q, k_cache, v_cache, causal=causal)
    assert k_cache.shape[1] % 256 == 0
    outputs = []
    for row, pages, used in zip(q.unsqueeze(1), block_table, cache_seqlens.tolist()):
        cache = (x[pages].flatten(0, 1)[None, :used] for x in (k_cache, v_cache))
        outputs.append(flash_attn_func(row, *cache, causal=causal))
    return torch.cat(outputs)
