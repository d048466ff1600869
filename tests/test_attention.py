import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import (
    KERNEL_TARGETS,
    LAYOUTS,
    TARGETS,
    Target,
    check,
    laid_out,
    needs_library,
    on_kernels,
    on_targets,
    tensor,
)
from torch import Tensor

import fastformer
import fastformer.functional as F
from fastformer import backends, reference
from fastformer.ops.attention import attention

FAST_TARGETS = [target for target in KERNEL_TARGETS if not target.slow]
on_fast_kernels = pytest.mark.parametrize("target", FAST_TARGETS, ids=str)


def torchs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """torch's own attention, and a log-sum-exp from its float32 functions."""
    alignment = "bottom_right" if options.pop("bottom_right", False) else "top_left"
    options.update(enable_gqa=True, causal_alignment=alignment)
    output = F.scaled_dot_product_attention(query, key, value, mask, **options)
    return output, F.scaled_dot_product_attention(query, key, value, mask, **options, return_lse=True)[1]


def check_attention(
    target: Target,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    with_lse: bool = True,
    **options: Any,
) -> None:
    def first(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
        """``function`` with these options, giving (output, lse), or (output,) alone."""
        return lambda *tensors: function(*tensors, **options)[: 2 if with_lse else 1]

    check(target, first(attention), first(torchs), first(reference.attention), (query, key, value, mask))


def inputs(
    target: Target, batch: int, heads: int, kv_heads: int, seqlen_q: int, seqlen_k: int, head_dim: int, value_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    query = tensor(target, batch, heads, seqlen_q, head_dim)
    return (
        query,
        tensor(target, batch, kv_heads, seqlen_k, head_dim),
        tensor(target, batch, kv_heads, seqlen_k, value_dim),
    )


@on_targets
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 1, 1, 1, 1, 1), {}),
        ((2, 2, 2, 7, 13, 5, 3), {}),
        ((1, 2, 1, 17, 17, 16, 16), {"is_causal": True}),
        ((1, 4, 2, 9, 20, 33, 8), {"is_causal": True, "scale": 0.3}),
        ((1, 2, 2, 20, 9, 8, 33), {"is_causal": True}),
        ((1, 2, 2, 9, 20, 16, 16), {"is_causal": True, "bottom_right": True}),
    ],
)
def test_shapes(target: Target, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    check_attention(target, *inputs(target, *shape), **options)


@on_fast_kernels
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 3, 97, 129, 64, 64), {}),
        ((1, 2, 1, 200, 193, 65, 40), {"is_causal": True}),
        ((1, 4, 2, 130, 256, 128, 128), {"is_causal": True, "bottom_right": True}),
        ((1, 1, 1, 100, 140, 256, 255), {"is_causal": True, "scale": -0.05}),
        ((1, 2, 2, 300, 300, 64, 64), {"is_causal": True}),
        ((2, 6, 2, 1, 1000, 64, 64), {}),
        ((2, 4, 1, 3, 301, 80, 17), {"is_causal": True, "bottom_right": True}),
    ],
)
def test_several_blocks(target: Target, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    check_attention(target, *inputs(target, *shape), **options)


@on_kernels
def test_more_than_one_block_of_the_largest_tiles(target: Target) -> None:
    check_attention(target, *inputs(target, 1, 2, 1, 150, 140, 24, 16), is_causal=True, bottom_right=True)


@on_targets
@pytest.mark.parametrize("mask_shape", [(2, 4, 6, 9), (2, 1, 1, 9), (4, 1, 9), (6, 9), (6, 1), (9,)])
@pytest.mark.parametrize("boolean", [True, False])
def test_masks(target: Target, mask_shape: tuple[int, ...], boolean: bool) -> None:
    mask = torch.rand(mask_shape, device=target.device) > 0.4 if boolean else tensor(target, *mask_shape)
    check_attention(target, *inputs(target, 2, 4, 2, 6, 9, 8, 8), mask, with_lse=not boolean)


@on_fast_kernels
@pytest.mark.parametrize("kind", ["bool", "transposed bool", "key padding", "float32", "own dtype", "transposed"])
@pytest.mark.parametrize("seqlen_q", [2, 150])
def test_masks_over_several_blocks(target: Target, kind: str, seqlen_q: int) -> None:
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
        bottom_right=True,
        with_lse=mask.dtype != torch.bool,
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
        for function, mask in ((attention, mask), (torchs, kept), (reference.attention, kept))
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
        output, lse = attention(query, key, value, mask)
        grads = torch.autograd.grad((output, lse), (query, key, value), (torch.ones_like(output), torch.ones_like(lse)))
    assert (output[:, :, [0, 3]] == 0).all() and (lse[:, :, [0, 3]] == -math.inf).all()
    assert torch.isfinite(lse[:, :, [1, 2, 4, 5]]).all()
    if target.backend != "reference":  # whose logarithm has an infinite slope there
        assert (grads[0][:, :, [0, 3]] == 0).all() and all(torch.isfinite(grad).all() for grad in grads)


@on_kernels
def test_more_queries_than_keys_at_the_bottom_right(target: Target) -> None:
    query, key, value = inputs(target, 1, 2, 2, 9, 5, 8, 8)
    check_attention(target, query, key, value, is_causal=True, bottom_right=True, with_lse=False)
    with fastformer.backend(target.backend):
        output, lse = attention(query, key, value, is_causal=True, bottom_right=True)
    assert (output[:, :, :4] == 0).all() and (lse[:, :, :4] == -math.inf).all()


@on_kernels
def test_layouts(target: Target) -> None:
    packed = tensor(target, 2, 11, 3, 4, 8)  # [B, S, 3, H, D], as one projection of all three gives
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    strided = tensor(target, 2, 4, 11, 17)[..., 1::2]
    with fastformer.backend(target.backend):
        for q, k, v in ((query, key, value), (strided, key, strided), (query, key[:1].expand(2, -1, -1, -1), value)):
            output, lse = attention(q, k, v, is_causal=True)
            plain = attention(q.contiguous(), k.contiguous(), v.contiguous(), is_causal=True)
            assert torch.equal(output, plain[0]) and torch.equal(lse, plain[1])
            assert output.transpose(1, 2).is_contiguous()


@on_kernels
@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (1, 1, 9, 0)])
def test_empty(target: Target, sizes: tuple[int, ...]) -> None:
    batch, heads, seqlen_q, seqlen_k = sizes
    query, key, value = (x.requires_grad_() for x in inputs(target, batch, heads, heads, seqlen_q, seqlen_k, 8, 8))
    with fastformer.backend(target.backend):
        output, lse = attention(query, key, value)
        output.sum().backward()
    assert output.shape == (batch, heads, seqlen_q, 8) and lse.shape == (batch, heads, seqlen_q)
    assert (output == 0).all() and (lse == -math.inf).all()
    assert all((x.grad == 0).all() and x.grad.shape == x.shape for x in (query, key, value))


@on_kernels
def test_huge_scores(target: Target) -> None:
    query, key, value = (x.requires_grad_() for x in inputs(target, 1, 1, 1, 12, 12, 16, 16))
    with fastformer.backend(target.backend):
        output, lse = attention(query * 100, key * 100, value)
        grads = torch.autograd.grad(output.sum(), (query, key, value))
        assert torch.isfinite(output).all() and torch.isfinite(lse).all()
        assert all(torch.isfinite(grad).all() for grad in grads)
        lowest = torch.full((12, 12), torch.finfo(torch.float32).min, device=target.device)  # every key alike
        output, _ = attention(query, key, value, lowest)
        mean = value.double().mean(2, keepdim=True).expand_as(output)
        torch.testing.assert_close(output.double(), mean, rtol=0, atol=4 * torch.finfo(target.dtype).eps)


@on_kernels
def test_nan_stays_with_its_query(target: Target) -> None:
    query, key, value = inputs(target, 1, 1, 1, 96, 300, 16, 16)
    key *= torch.linspace(0.1, 3, 300, device=target.device).unsqueeze(1)  # later scores are larger
    poisoned = query.clone()
    poisoned[:, :, ::17] = math.nan
    with fastformer.backend(target.backend):
        expected, output = attention(query, key, value)[0], attention(poisoned, key, value)[0]
    assert output[:, :, ::17].isnan().all()
    others = torch.arange(96) % 17 != 0
    assert torch.equal(output[:, :, others], expected[:, :, others])


@on_kernels
def test_gradient_of_the_lse_alone(target: Target) -> None:
    query, key, value = (x.requires_grad_() for x in inputs(target, 1, 2, 2, 6, 9, 8, 8))
    mask = torch.randn(6, 9, device=target.device, requires_grad=True)
    with fastformer.backend(target.backend):
        _, lse = attention(query, key, value, mask)
        (weights,) = torch.autograd.grad(lse.sum(), mask)  # summed over the heads
    torch.testing.assert_close(weights.sum(-1), torch.full((6,), 2.0, device=target.device), rtol=1e-5, atol=1e-5)


@on_fast_kernels
@pytest.mark.parametrize("masked", [False, True])
def test_threads_change_nothing(target: Target, masked: bool) -> None:
    heads = 4 if masked else 2
    query, key, value = (x.requires_grad_() for x in inputs(target, heads // 2, heads, heads // 2, 400, 400, 32, 32))
    threads = torch.get_num_threads()
    mask = torch.ones(400, 400, dtype=torch.bool, device=target.device) if masked else None
    if masked:
        mask[::96, 100] = False  # most blocks see all of what is theirs

    def run() -> list[Tensor]:
        with fastformer.backend(target.backend):
            output, lse = attention(query, key, value, mask, is_causal=True)
            return [output, lse, *torch.autograd.grad(output.square().sum() + lse.sum(), (query, key, value))]

    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(3)
        three = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three))


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
    exact, _ = reference.attention(query, key, value, attn_mask, **options)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=1e-2)


@given(
    # In tensors of a few elements torch's error is a matter of luck; test_shapes has those that must be there.
    shape=st.tuples(*(st.integers(1, 2) for _ in range(3)), *(st.integers(16, n) for n in (60, 60, 40, 40))),
    causal=st.sampled_from(["no", "top left", "bottom right"]),
    masked=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    target=st.sampled_from(KERNEL_TARGETS),
)
def test_any_shape(shape: tuple[int, ...], causal: str, masked: bool, layout: str, target: Target) -> None:
    batch, groups, kv_heads, seqlen_q, seqlen_k, head_dim, value_dim = shape
    seen_by_the_last_query = min(seqlen_q, seqlen_k) if causal == "top left" else seqlen_k
    assume(seen_by_the_last_query > 1)  # see test_a_query_that_sees_one_key
    query, key, value = inputs(target, batch, groups * kv_heads, kv_heads, seqlen_q, seqlen_k, head_dim, value_dim)
    key = laid_out(target, layout, *key.shape)
    mask = torch.rand(seqlen_q, seqlen_k, device=target.device) > 0.3 if masked else None
    options = {"is_causal": causal != "no", "bottom_right": causal == "bottom right"}
    check_attention(target, query, key, value, mask, with_lse=False, **options)


@on_kernels
def test_a_mask_whose_rows_are_far_apart(target: Target) -> None:
    rows, step = 120, 2**31 // 110  # from the first row of a tile to its last are more than 2^31 elements
    query, key, value = inputs(target, 1, 1, 1, rows, 4, 8, 8)
    mask = torch.rand(rows, 4, device=target.device) > 0.4
    far = torch.empty(rows * step, dtype=torch.bool, device=target.device).as_strided((rows, 4), (step, 1)).copy_(mask)
    with fastformer.backend(target.backend):
        assert torch.equal(attention(query, key, value, far)[0], attention(query, key, value, mask)[0])


@pytest.mark.skipif(not backends.TRITON_INTERPRETED, reason="with a GPU the kernels run on it")
def test_triton_kernels_are_launched_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    @contextlib.contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        devices.append(x.device)
        yield
        devices.pop()

    class Watched:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert devices, "launched on the current device"
            return self.kernel[grid]

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("attention", "attention_backward"):
        module = importlib.import_module(f"fastformer.triton_kernels.{name}")
        for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Watched(getattr(module, kernel)))
    query, key, value = (torch.randn(1, 1, 2, 4, requires_grad=True) for _ in range(3))
    with fastformer.backend("triton"):
        attention(query, key, value)[0].sum().backward()


@on_kernels
def test_a_query_that_sees_one_key(target: Target) -> None:
    """Its weight is 1 whatever the score, so query and key have no gradient but what rounding leaves of equal sums."""
    query, key, value = (x.requires_grad_() for x in inputs(target, 1, 1, 1, 1, 1, 16, 16))
    with fastformer.backend(target.backend):
        output, _ = attention(query, key, value)
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
        assert torch.equal(shared, sdpa(query, key[:, :1].expand_as(key), value[:, :1].expand_as(value)))


@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "torch"], ids=str)
def test_dropout_is_torchs(target: Target) -> None:
    query, key, value = inputs(target, 1, 2, 2, 16, 16, 8, 8)
    torch.manual_seed(3)
    ours = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(3)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    assert torch.equal(ours, theirs)
    for name in ("cpu", "reference") if backends.CPU_LIBRARY else ("reference",):
        with fastformer.backend(name), pytest.raises(ValueError, match="dropout"):
            F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)


def test_opcheck() -> None:
    query, key = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 1, 7, 8, requires_grad=True)
    value, mask = torch.randn(1, 1, 7, 6, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    forward, backward = torch.ops.fastformer.attention_forward, torch.ops.fastformer.attention_backward
    torch.library.opcheck(forward, (query, key, value, None, 0.3, True, False))
    torch.library.opcheck(forward, (query, key, value, mask, 0.3, False, False, 2.0))
    tensors = [x.detach() for x in (query, key, value, mask)]
    output, lse = forward(*tensors, 0.3, True, True, 2.0)
    grads = torch.randn(1, 2, 5, 6), torch.randn(1, 2, 5)
    torch.library.opcheck(backward, (*grads, *tensors, output, lse, 0.3, True, True, 2.0, True))
    torch.library.opcheck(backward, (grads[0], None, *tensors[:3], None, output, lse, 0.3, False, False, None, False))


def test_gradcheck_and_double_backward() -> None:
    query, key, value = (torch.randn(1, 2, 4, 3, dtype=torch.double, requires_grad=True) for _ in range(3))
    mask = torch.randn(4, 4, dtype=torch.double, requires_grad=True)

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return attention(*tensors, scale=0.7, is_causal=True)

    assert torch.autograd.gradcheck(both, (query, key, value, mask))
    assert torch.autograd.gradgradcheck(both, (query, key, value, mask))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_double_backward_of_the_kernel(softcap: float | None) -> None:
    def penalty(backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        with fastformer.backend(backend):
            options = {"is_causal": True, "softcap": softcap, "return_lse": True}
            output, lse = F.scaled_dot_product_attention(*tensors, **options)
            grads = torch.autograd.grad(output.square().sum() + lse.sum(), tensors, create_graph=True)
            return torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)

    tensors = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]
    tensors.append(torch.randn(5, 5, requires_grad=True))
    for mine, theirs in zip(penalty("cpu", *tensors), penalty("torch", *tensors)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    def sdpa(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x * 2, x, x, is_causal=True)

    compiled = torch.compile(sdpa, fullgraph=True, dynamic=dynamic)
    for length in (5, 9, 6):
        x = torch.randn(2, 2, length, 8, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, sdpa(x))
        (mine,) = torch.autograd.grad(y.square().sum(), x)
        (theirs,) = torch.autograd.grad(sdpa(x).square().sum(), x)
        torch.testing.assert_close(mine, theirs)


def test_autocast_computes_in_the_low_precision_like_torch() -> None:
    x = torch.randn(1, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = F.scaled_dot_product_attention(x, x, x.bfloat16())
        theirs = torch.nn.functional.scaled_dot_product_attention(x, x, x.bfloat16())
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch loops over its own attention under vmap
def test_torch_func() -> None:
    x = torch.randn(3, 2, 2, 5, 8)

    def sdpa(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    torch.testing.assert_close(torch.func.vmap(sdpa)(x), sdpa(x))
    loss = lambda x: sdpa(x).square().sum()  # noqa: E731
    (grad,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), grad)
    operator = torch.ops.fastformer.attention_forward
    with torch.no_grad():
        raw = torch.func.vmap(lambda x: operator(x, x, x, None, 8**-0.5, True, False)[0])(x)
        torch.testing.assert_close(raw, sdpa(x))


ONE = torch.ones(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("error", "words", "arguments", "options"),
    [
        (TypeError, "query is a list", ([1.0], ONE, ONE), {}),
        (TypeError, "key has dtype torch.int64", (ONE, ONE.long(), ONE), {}),
        (ValueError, r"query has shape \(4,\), must have at least 2", (ONE[0, 0, 0], ONE, ONE), {}),
        (ValueError, "value has dtype torch.float16, must be torch.float32", (ONE, ONE, ONE.half()), {}),
        (ValueError, r"key has shape \(2, 3, 4\), must have 4 dimensions", (ONE, ONE[0], ONE), {}),
        (ValueError, r"key has shape \(1, 2, 3, 3\), must be \(1, 2, 3, 4\)", (ONE, ONE[..., :3], ONE), {}),
        (ValueError, r"value has shape \(1, 2, 2, 4\), must be \(1, 2, 3, 4\)", (ONE, ONE, ONE[:, :, :2]), {}),
        (ValueError, "query has 2 heads, must have a multiple of key's 4", (ONE, ONE.repeat(1, 2, 1, 1), ONE), {}),
        (ValueError, "without enable_gqa", (ONE.repeat(1, 2, 1, 1), ONE, ONE), {}),
        (
            ValueError,
            r"attn_mask has shape \(5,\), must broadcast to \(1, 2, 3, 3\)",
            (ONE, ONE, ONE, torch.ones(5)),
            {},
        ),
        (TypeError, "attn_mask has dtype torch.int64", (ONE, ONE, ONE, torch.ones(3).long()), {}),
        (ValueError, "scale is nan", (ONE, ONE, ONE), {"scale": math.nan}),
        (ValueError, "dropout_p is 2", (ONE, ONE, ONE), {"dropout_p": 2.0}),
        (ValueError, "causal_alignment is 'left'", (ONE, ONE, ONE), {"causal_alignment": "left"}),
    ],
)
def test_errors(error: type, words: str, arguments: tuple, options: dict) -> None:
    with pytest.raises(error, match=words):
        F.scaled_dot_product_attention(*arguments, **options)


@needs_library
@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("output must be", {"output": torch.ones(1, 2, 3, 4), "grad_output": torch.ones(1, 2, 3, 4)}),
        ("output must be", {"output": torch.ones(1, 2, 5, 4).half()}),
        ("grad_output must have", {"grad_output": torch.ones(1, 2, 3, 4)}),
        ("lse must be float32", {"lse": torch.zeros(1, 2, 3)}),
        ("lse must be float32", {"lse": torch.zeros(1, 2, 5).double()}),
        ("grad_lse must have the shape", {"grad_lse": torch.zeros(1, 2, 3)}),
        ("grad_lse must be float32", {"grad_lse": torch.zeros(1, 2, 5).long()}),
    ],
)
def test_errors_of_the_operator(words: str, changes: dict) -> None:
    x = torch.ones(1, 2, 5, 4)
    tensors = {"grad_output": x, "grad_lse": None, "query": x, "key": x, "value": x, "mask": None, "output": x}
    tensors |= {"lse": torch.zeros(1, 2, 5)} | changes
    with fastformer.backend("cpu"), pytest.raises(RuntimeError, match=words):
        torch.ops.fastformer.attention_backward(*tensors.values(), 1.0, False, False, None, False)


@needs_library
def test_without_query_heads_the_gradients_of_keys_are_zero() -> None:
    query, key, lse = torch.ones(1, 0, 5, 4), torch.ones(1, 2, 5, 4), torch.ones(1, 0, 5)
    tensors = (query, None, query, key, key, None, query, lse)
    with fastformer.backend("cpu"):
        grads = torch.ops.fastformer.attention_backward(*tensors, 1.0, False, False, None, False)
    assert (grads[1] == 0).all() and (grads[2] == 0).all()


def test_a_head_too_wide_for_our_kernels_runs_torchs() -> None:
    x = torch.randn(1, 1, 4, 300)
    assert torch.equal(
        F.scaled_dot_product_attention(x, x, x), torch.nn.functional.scaled_dot_product_attention(x, x, x)
    )
    with fastformer.backend("cpu"), pytest.raises(ValueError, match="head_dim 300"):
        F.scaled_dot_product_attention(x, x, x)
