"""scaled_dot_product_attention over shapes, masks, layouts and extreme values."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_support import attend, exact, inputs, on_blocks, on_fast_kernels, on_kernels, on_targets
from support import Target, check, tensor
from torch import Tensor

import fastformer
import fastformer.functional as F


def torchs(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """torch's own attention, and a log-sum-exp from its float32 functions.

    Added masks have the query's dtype: with float32 ones torch computes in float32, and keeps the weights in it.
    """
    mask = mask.to(query.dtype) if mask is not None and mask.dtype != torch.bool else mask
    tensors = (query, key, value, mask)
    return attend(*tensors, **options, return_lse=False), attend(*tensors, **options)[1]


def check_attention(
    target: Target,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    with_lse: bool = True,
    grad: bool = True,
    **options: Any,
) -> None:
    def first(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
        """``function`` with these options, giving (output, lse), or (output,) alone."""
        return lambda *tensors: function(*tensors, **options)[: 2 if with_lse else 1]

    check(target, first(attend), first(torchs), first(exact), (query, key, value, mask), grad=grad)


@on_targets
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 1, 1, 1, 1, 1), {}),
        ((2, 2, 2, 7, 13, 5, 3), {}),
        ((1, 2, 1, 17, 17, 16, 16), {"is_causal": True}),
        ((1, 4, 2, 9, 20, 33, 8), {"is_causal": True, "scale": 0.3}),
        ((1, 2, 2, 20, 9, 8, 33), {"is_causal": True}),
        ((1, 2, 2, 9, 20, 16, 16), {"is_causal": True, "causal_alignment": "bottom_right"}),
    ],
)
def test_shapes(target: Target, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    check_attention(target, *inputs(target, *shape), **options)


@on_blocks
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 3, 97, 129, 64, 64), {}),
        ((1, 2, 1, 200, 193, 65, 40), {"is_causal": True}),
        ((1, 4, 2, 130, 256, 128, 128), {"is_causal": True, "causal_alignment": "bottom_right"}),
        ((1, 1, 1, 100, 140, 256, 255), {"is_causal": True, "scale": -0.05}),
        ((1, 2, 2, 300, 300, 64, 64), {"is_causal": True}),
        ((2, 6, 2, 1, 1000, 64, 64), {}),
        ((2, 4, 1, 3, 301, 80, 17), {"is_causal": True, "causal_alignment": "bottom_right"}),
    ],
)
def test_several_blocks(target: Target, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    check_attention(target, *inputs(target, *shape), **options)


@on_kernels
def test_more_than_one_block_of_the_largest_tiles(target: Target) -> None:
    check_attention(target, *inputs(target, 1, 2, 1, 150, 140, 24, 16), is_causal=True, causal_alignment="bottom_right")


@on_blocks
@pytest.mark.parametrize("kind", ["bool", "transposed bool", "key padding", "float32", "own dtype", "transposed"])
@pytest.mark.parametrize("seqlen_q", [2, 8, 150])
def test_masks_over_several_blocks(target: Target, kind: str, seqlen_q: int) -> None:
    """Up to 4 queries are scored in another order of additions forward than backward, while torch's errors in the same
    scores cancel: their gradients would meet the rule for most seeds only.
    """
    seqlen_k = 170
    mask = {
        "bool": torch.rand(1, 4, seqlen_q, seqlen_k) > 0.3,
        "transposed bool": (torch.rand(seqlen_k, seqlen_q) > 0.3).t(),
        "key padding": torch.arange(seqlen_k) < torch.tensor([[[[100]]], [[[170]]]]),
        "float32": torch.randn(seqlen_q, seqlen_k),
        "own dtype": torch.randn(2, 1, seqlen_q, seqlen_k).to(target.dtype),
        "transposed": torch.randn(seqlen_k, seqlen_q).t(),
    }[kind].to(target.device)
    check_attention(
        target,
        *inputs(target, 2, 4, 2, seqlen_q, seqlen_k, 32, 24),
        mask,
        is_causal=True,
        causal_alignment="bottom_right",
        with_lse=mask.dtype != torch.bool,
        grad=seqlen_q > 4,
    )


@on_fast_kernels
@pytest.mark.parametrize("kind", ["all", "none", "window", "left padding", "right padding", "few keys", "odd bytes"])
@pytest.mark.parametrize("seqlen_q", [1, 300])
def test_boolean_masks_that_show_all_or_nothing_of_a_block(target: Target, kind: str, seqlen_q: int) -> None:
    """There the kernels may pass over the mask, or over the keys."""
    seqlen_k = 500
    queries, keys = torch.arange(seqlen_q).unsqueeze(1) + seqlen_k - seqlen_q, torch.arange(seqlen_k)
    mask = {
        "all": torch.ones(seqlen_q, seqlen_k, dtype=torch.bool),
        "none": torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool),
        "window": (keys <= queries) & (keys > queries - 40),
        "left padding": keys >= torch.tensor([[[[131]]], [[[0]]]]),
        "right padding": (keys < torch.tensor([[[[257]]], [[[500]]]])).expand(2, 1, seqlen_q, seqlen_k).contiguous(),
        "few keys": (keys - 7 * queries) % seqlen_k < 3,
        "odd bytes": torch.tensor([1, 2, 4], dtype=torch.uint8).repeat(seqlen_k)[:seqlen_k].view(torch.bool),
    }[kind].to(target.device)
    kept = mask.view(torch.uint8) != 0
    functions = [
        lambda *tensors, function=function, mask=mask: function(*tensors, mask)[:1]
        for function, mask in ((attend, mask), (torchs, kept), (exact, kept))
    ]
    check(target, *functions, inputs(target, 2, 4, 2, seqlen_q, seqlen_k, 32, 24))


@on_targets
@pytest.mark.parametrize("boolean", [True, False])
def test_rows_that_see_nothing(target: Target, boolean: bool) -> None:
    mask = torch.ones(6, 9, dtype=torch.bool, device=target.device)
    mask[0] = mask[3] = False
    mask[1, :4] = False
    mask = mask if boolean else torch.zeros(6, 9, device=target.device).masked_fill(~mask, -math.inf)
    query, key, value = (x.requires_grad_() for x in inputs(target, 1, 2, 1, 6, 9, 8, 8))
    check_attention(target, query, key, value, mask, with_lse=False)
    with fastformer.backend(target.backend):
        output, lse = attend(query, key, value, mask)
        grads = torch.autograd.grad((output, lse), (query, key, value), (torch.ones_like(output), torch.ones_like(lse)))
    assert (output[:, :, [0, 3]] == 0).all() and (lse[:, :, [0, 3]] == -math.inf).all()
    assert torch.isfinite(lse[:, :, [1, 2, 4, 5]]).all()
    if target.backend != "reference":  # whose logarithm has an infinite slope there
        assert (grads[0][:, :, [0, 3]] == 0).all() and all(torch.isfinite(grad).all() for grad in grads)


@on_targets
def test_one_query_at_the_bottom_right_sees_every_key(target: Target) -> None:
    query, key, value = inputs(target, 2, 2, 2, 1, 33, 16, 24)
    at_the_end = {"is_causal": True, "causal_alignment": "bottom_right"}
    check_attention(target, query, key, value, **at_the_end)
    with fastformer.backend(target.backend):
        plain = F.scaled_dot_product_attention(query, key, value)
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, **at_the_end), plain)
        with pytest.raises(TypeError, match="is_causal is a str"):
            F.scaled_dot_product_attention(query, key, value, **at_the_end | {"is_causal": "yes"})


@on_targets
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_a_causal_mask_with_a_scale_that_is_not_positive(target: Target, scale: float) -> None:
    query, key, value = inputs(target, 1, 2, 2, 5, 5, 8, 8)
    with fastformer.backend(target.backend):
        ours = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    truth, _ = exact(query, key, value, is_causal=True, scale=scale)
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=8 * torch.finfo(target.dtype).eps)


@on_kernels
def test_more_queries_than_keys_at_the_bottom_right(target: Target) -> None:
    query, key, value = inputs(target, 1, 2, 2, 9, 5, 8, 8)
    check_attention(target, query, key, value, is_causal=True, causal_alignment="bottom_right", with_lse=False)
    with fastformer.backend(target.backend):
        output, lse = attend(query, key, value, is_causal=True, causal_alignment="bottom_right")
    assert (output[:, :, :4] == 0).all() and (lse[:, :, :4] == -math.inf).all()


@on_kernels
def test_layouts(target: Target) -> None:
    packed = tensor(target, 2, 11, 3, 4, 8)  # [B, S, 3, H, D], as one projection of all three gives
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    strided = tensor(target, 2, 4, 11, 17)[..., 1::2]
    with fastformer.backend(target.backend):
        for q, k, v in ((query, key, value), (strided, key, strided), (query, key[:1].expand(2, -1, -1, -1), value)):
            output, lse = attend(q, k, v, is_causal=True)
            plain = attend(q.contiguous(), k.contiguous(), v.contiguous(), is_causal=True)
            assert torch.equal(output, plain[0]) and torch.equal(lse, plain[1])
            assert output.transpose(1, 2).is_contiguous()


@on_kernels
@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "additive"])
def test_mask_of_one_key(target: Target, boolean: bool) -> None:
    """Whose memory ends with it, and whose strides over dimensions of one mean nothing."""
    query, key, value = inputs(target, 1, 2, 2, 40, 1, 8, 8)
    values = tensor(target, 1, 1, 40, 1)
    mask = values > 0 if boolean else values
    odd = mask.as_strided(mask.shape, (2**40, 2**40, 1, 2**40))
    with fastformer.backend(target.backend):
        assert torch.equal(attend(query, key, value, odd)[1], attend(query, key, value, mask)[1])


@on_kernels
@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "additive"])
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_masks_within_wider_memory(target: Target, seqlen_q: int, boolean: bool) -> None:
    """Aligned and not; nothing of what lies around a mask counts, and its gradient is that of the plain mask."""
    query, key, value = inputs(target, 2, 2, 2, seqlen_q, 37, 8, 8)
    values = tensor(target, 2, 1, seqlen_q, 37)
    mask = values > 0 if boolean else values
    around = True if boolean else math.nan
    wide = mask.new_full((2, 2, seqlen_q, 64), around)
    transposed = mask.new_full((2, 2, 48, seqlen_q), around).mT
    last = mask.new_full(((2 * seqlen_q - 1) * 48 + 37,), around)  # the last row ends with the memory
    last = last.as_strided((2, 1, seqlen_q, 37), (48 * seqlen_q, 48 * seqlen_q, 48, 1))
    views = [wide[:, :1, :, :37], wide[:, 1:, :, 16:53], wide[:, :1, :, 3:40], transposed[:, :1, :, 2:39], last]

    def run(mask: Tensor) -> list[Tensor]:
        output, lse = attend(query, key, value, mask)
        return [output, lse] if boolean else [output, lse, *torch.autograd.grad(output.square().sum(), mask)]

    with fastformer.backend(target.backend):
        plain = run(mask if boolean else mask.requires_grad_())
        for view in views:
            view.copy_(mask.detach())
            for got, expected in zip(run(view if boolean else view.requires_grad_()), plain):
                assert torch.equal(got, expected)
                assert got.stride() == expected.stride()


@on_kernels
@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (1, 1, 9, 0)])
def test_empty(target: Target, sizes: tuple[int, ...]) -> None:
    batch, heads, seqlen_q, seqlen_k = sizes
    query, key, value = (x.requires_grad_() for x in inputs(target, batch, heads, heads, seqlen_q, seqlen_k, 8, 8))
    with fastformer.backend(target.backend):
        output, lse = attend(query, key, value)
        output.sum().backward()
    assert output.shape == (batch, heads, seqlen_q, 8) and lse.shape == (batch, heads, seqlen_q)
    assert (output == 0).all() and (lse == -math.inf).all()
    assert all((x.grad == 0).all() and x.grad.shape == x.shape for x in (query, key, value))


@on_kernels
def test_huge_scores(target: Target) -> None:
    query, key, value = (x.requires_grad_() for x in inputs(target, 1, 1, 1, 12, 12, 16, 16))
    with fastformer.backend(target.backend):
        output, lse = attend(query * 100, key * 100, value)
        grads = torch.autograd.grad(output.sum(), (query, key, value))
        assert torch.isfinite(output).all() and torch.isfinite(lse).all()
        assert all(torch.isfinite(grad).all() for grad in grads)
        lowest = torch.full((12, 12), torch.finfo(torch.float32).min, device=target.device)  # every key alike
        output, _ = attend(query, key, value, lowest)
        mean = value.double().mean(2, keepdim=True).expand_as(output)
        torch.testing.assert_close(output.double(), mean, rtol=0, atol=4 * torch.finfo(target.dtype).eps)


@on_kernels
def test_nan_stays_with_its_query(target: Target) -> None:
    query, key, value = inputs(target, 1, 1, 1, 96, 300, 16, 16)
    key *= torch.linspace(0.1, 3, 300, device=target.device).unsqueeze(1)  # later scores are larger
    poisoned = query.clone()
    poisoned[:, :, ::17] = math.nan
    with fastformer.backend(target.backend):
        expected, output = attend(query, key, value)[0], attend(poisoned, key, value)[0]
    assert output[:, :, ::17].isnan().all()
    others = torch.arange(96) % 17 != 0
    assert torch.equal(output[:, :, others], expected[:, :, others])


@on_kernels
def test_gradient_of_the_lse_alone(target: Target) -> None:
    query, key, value = (x.requires_grad_() for x in inputs(target, 1, 2, 2, 6, 9, 8, 8))
    mask = torch.randn(6, 9, device=target.device, requires_grad=True)
    with fastformer.backend(target.backend):
        _, lse = attend(query, key, value, mask)
        (weights,) = torch.autograd.grad(lse.sum(), mask)  # summed over the heads
    torch.testing.assert_close(weights.sum(-1), torch.full((6,), 2.0, device=target.device), rtol=1e-5, atol=1e-5)


@on_fast_kernels
@pytest.mark.parametrize("mask", ["none", "all True", "added"])
@pytest.mark.parametrize("softcap", [None, 1e30])
def test_huge_logits(target: Target, mask: str, softcap: float | None) -> None:
    """Each query has one key far above the others, or two alike, whose mean it then gives."""
    seqlen, keys = 70, 300
    scale = 1e9 if target.dtype != torch.float16 else 1e4
    picked = torch.arange(seqlen) * 4 % keys
    key = tensor(target, 1, 1, keys, 16)
    query = (key[:, :, picked] * scale).detach()
    key[0, 0, picked[1]] = key[0, 0, picked[0]] = key[0, 0, 0]
    query[0, 0, :2] = key[0, 0, 0] * scale
    value = tensor(target, 1, 1, keys, 16)
    masks = {"none": None, "all True": torch.ones(seqlen, keys).bool(), "added": torch.zeros(seqlen, keys)}
    attn_mask = masks[mask] if masks[mask] is None else masks[mask].to(target.device)
    options = {"softcap": softcap}
    with fastformer.backend(target.backend):
        ours = F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    truth, _ = exact(query, key, value, attn_mask, **options)
    torch.testing.assert_close(ours.double(), truth, rtol=2e-2, atol=1e-2)


@on_kernels
def test_a_query_that_sees_one_key(target: Target) -> None:
    """Its weight is 1 whatever the score, so query and key have no gradient but what rounding leaves of equal sums."""
    query, key, value = (x.requires_grad_() for x in inputs(target, 1, 1, 1, 1, 1, 16, 16))
    with fastformer.backend(target.backend):
        output, _ = attend(query, key, value)
        grads = torch.autograd.grad(output.sum(), (query, key, value))
    assert torch.equal(output, value) and (grads[2] == 1).all()
    assert all(grad.abs().max() <= 16 * torch.finfo(target.dtype).eps for grad in grads[:2])


@on_kernels
def test_dimensions_and_heads(target: Target) -> None:
    query, key, value = inputs(target, 6, 2, 2, 5, 7, 8, 8)
    mask = tensor(target, 6, 2, 5, 7)
    with fastformer.backend(target.backend):
        sdpa = F.scaled_dot_product_attention
        four = sdpa(query, key, value, mask)
        assert torch.equal(sdpa(query[0], key[0], value[0], mask[0]), four[0])
        assert torch.equal(sdpa(query[0, 0], key[0, 0], value[0, 0], mask[0, 0]), four[0, 0])
        five = [x.unflatten(0, (2, 3)) for x in (query, key, value, mask)]
        assert torch.equal(sdpa(*five), four.unflatten(0, (2, 3)))
        assert torch.equal(
            sdpa(*five, return_lse=True)[1].flatten(0, 1), sdpa(query, key, value, mask, return_lse=True)[1]
        )
        assert torch.equal(sdpa(*five[:3], mask[0]), sdpa(query, key, value, mask[0]).unflatten(0, (2, 3)))
        shared = sdpa(query, key[:, :1], value[:, :1], enable_gqa=True)
        each = sdpa(query, key[:, :1].expand_as(key), value[:, :1].expand_as(value))
        torch.testing.assert_close(shared, each, rtol=0, atol=4 * torch.finfo(target.dtype).eps)


@on_kernels
def test_a_head_too_wide_for_our_kernels_runs_torchs(target: Target) -> None:
    x = tensor(target, 1, 1, 4, 300)
    assert torch.equal(
        F.scaled_dot_product_attention(x, x, x), torch.nn.functional.scaled_dot_product_attention(x, x, x)
    )
    with fastformer.backend(target.backend), pytest.raises(ValueError, match="head_dim 300"):
        F.scaled_dot_product_attention(x, x, x)


@on_kernels
@pytest.mark.parametrize("sign", [1, -1])
def test_masks_as_large_as_float32_has_them(target: Target, sign: int) -> None:
    """Throughout a row, or in part of it, where they hide the rest or are hidden by it."""
    query, key, value = (x.requires_grad_() for x in inputs(target, 1, 2, 2, 6, 9, 8, 8))
    mask = torch.zeros(6, 9, device=target.device)
    mask[1] = mask[2, 3:] = sign * torch.finfo(torch.float32).max
    with fastformer.backend(target.backend):
        output, _ = attend(query, key, value, mask)
        grads = torch.autograd.grad(output.square().sum(), (query, key, value))
        shown = attend(query[:, :, 2:3], key[:, :, :3], value[:, :, :3])[0]
    assert all(grad.isfinite().all() for grad in grads)
    eps = torch.finfo(target.dtype).eps
    mean = value.double().mean(2)
    torch.testing.assert_close(output[:, :, 1].double(), mean, rtol=0, atol=4 * eps)
    rest = value[:, :, 3:].double().mean(2) if sign > 0 else shown[:, :, 0].double()
    torch.testing.assert_close(output[:, :, 2].double(), rest, rtol=0, atol=4 * eps)
