import math

import pytest
import torch
from cuda_support import CUDA_TARGETS, KERNEL_TARGETS, on_kernels, on_targets
from hypothesis import given
from hypothesis import strategies as st
from support import LAYOUTS, Target, awkward, check, laid_out, tensor
from torch import Tensor

import fastformer
import fastformer.functional as F
from fastformer import backends, reference


def plain(x: Tensor) -> Tensor:
    return F.softmax(x, -1)


def check_softmax(target: Target, x: Tensor, mask: Tensor | None = None, **options: object) -> None:
    # A number added to a whole row changes nothing, so the gradient by it is 0 and what comes out is rounding alone.
    shifts_rows = mask is not None and mask.shape[-1] < x.shape[-1]
    check(
        target,
        lambda x, mask: F.softmax(x, -1, mask=mask, **options),
        lambda x, mask: F.softmax(x, -1, mask=mask, **options),
        lambda x, mask: reference.softmax(x, mask=mask, **options),
        [x, mask],
        grad=not shifts_rows,
    )


@on_targets
@pytest.mark.parametrize(
    "shape", [(1,), (1, 1), (3, 7), (2, 3, 64), (5, 65), (2, 2, 3, 127), (4, 1024), (1, 2, 1, 2, 33)]
)
def test_shapes(target: Target, shape: tuple[int, ...]) -> None:
    check_softmax(target, tensor(target, *shape, scale=3.0))


@on_kernels
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty(target: Target, shape: tuple[int, ...]) -> None:
    x = tensor(target, *shape).requires_grad_()
    with fastformer.backend(target.backend):
        y = F.softmax(x, -1)
        y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize("target", [target for target in KERNEL_TARGETS if target.backend != "triton"], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 0, 4), (0, 3, 4)])
def test_the_operator_refuses_a_mask_that_does_not_broadcast(target: Target, shape: tuple[int, ...]) -> None:
    x = tensor(target, *shape)
    with fastformer.backend(target.backend), pytest.raises(RuntimeError, match="mask must broadcast"):
        torch.ops.fastformer.softmax_forward(x, tensor(target, 5), 1.0, False)


@on_kernels
def test_layouts(target: Target) -> None:
    check_softmax(target, awkward(target, 5, 33))
    check_softmax(target, tensor(target, 6, 5).t())
    check_softmax(target, tensor(target, 1, 40).expand(3, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not backends.CPU_LIBRARY, reason="compares calls of the C++ kernel")
def test_large_results_are_those_of_small_calls(dtype: torch.dtype) -> None:
    x = torch.randn(12288, 784).to(dtype).requires_grad_()  # goes past the cache of 32 MiB in either dtype
    grad = torch.randn(12288, 784).to(dtype)
    with fastformer.backend("cpu"):
        y = plain(x)
        (dx,) = torch.autograd.grad(y, x, grad)
        for rows in (slice(0, 64), slice(6100, 6200), slice(12224, 12288)):
            part = x.detach()[rows].requires_grad_()
            small = plain(part)
            assert torch.equal(y[rows], small)
            assert torch.equal(dx[rows], torch.autograd.grad(small, part, grad[rows])[0])


@on_kernels
def test_a_very_long_row(target: Target) -> None:
    check_softmax(target, tensor(target, 1 if target.slow else 3, 262_144, scale=4.0))


@on_targets
@pytest.mark.parametrize("mask_shape", [(2, 3, 4, 9), (2, 1, 1, 9), (3, 4, 1), (4, 9), (9,), (1,)])
@pytest.mark.parametrize("boolean", [True, False])
def test_masks(target: Target, mask_shape: tuple[int, ...], boolean: bool) -> None:
    mask = torch.rand(mask_shape, device=target.device) > 0.4 if boolean else tensor(target, *mask_shape)
    check_softmax(target, tensor(target, 2, 3, 4, 9), mask, scale=0.5)


@on_kernels
@pytest.mark.parametrize("cols", [15, 16, 17, 31, 32, 33, 64, 130])
@pytest.mark.parametrize("boolean", [True, False])
def test_masks_of_wider_rows(target: Target, cols: int, boolean: bool) -> None:
    mask = torch.rand(5, cols, device=target.device) > 0.3 if boolean else tensor(target, 5, cols)
    check_softmax(target, tensor(target, 3, 5, cols), mask, scale=0.5)


# Widths on either side of where the CUDA C++ kernels go from 8 lanes to a warp, a block, a loop that keeps the row in
# shared memory and one that doesn't, in the widest accesses and, if odd, single ones.
@pytest.mark.parametrize("cols", [128, 131, 264, 1032, 1027, 8200, 16392, 16387, 30008, 60008, 60001, 120_008])
@pytest.mark.parametrize("target", CUDA_TARGETS, ids=str)
def test_every_way_to_hold_a_row(target: Target, cols: int) -> None:
    x = tensor(target, 3, cols)
    check_softmax(target, x, is_causal=True)
    check_softmax(target, x)
    check_softmax(target, x, torch.rand(3, cols, device=target.device) > 0.3)
    if cols <= 16392:
        check_softmax(target, awkward(target, 3, cols), torch.rand(3, 1, device=target.device) > 0.5)
        check_softmax(target, x, tensor(target, 3, cols), is_causal=True, scale=0.5)
        check_softmax(target, x, tensor(target, 3, cols).float())
        check_softmax(target, x, awkward(target, 1, cols))


@on_kernels
@pytest.mark.parametrize("scale", [0.7, 1 / 3, -1.7])
def test_huge_scaled_scores(target: Target, scale: float) -> None:
    """The greatest one's exponential is 1 whatever the rounding of scale * x."""
    greatest = 1e4 if target.dtype == torch.float16 else 1e30
    x = tensor(target, 20, 37).double().mul(greatest).to(target.dtype)
    with fastformer.backend(target.backend):
        y = F.softmax(x, -1, scale=scale)
    expected = (x.double() * scale).softmax(-1)
    torch.testing.assert_close(y.double(), expected, rtol=2e-3 if target.dtype == torch.float16 else 0, atol=1e-3)


@on_targets
def test_causal_with_mask_and_rows_without_columns(target: Target) -> None:
    x = tensor(target, 2, 6, 5)
    mask = torch.ones(6, 5, dtype=torch.bool, device=target.device)
    mask[3] = False
    check_softmax(target, x, mask, is_causal=True, scale=0.3)
    with fastformer.backend(target.backend):
        y = F.softmax(x, -1, mask=mask, is_causal=True)
    assert (y[:, 3] == 0).all()
    assert (y[:, 0, 1:] == 0).all() and (y[:, 0, 0] == 1).all()


@on_kernels
def test_values_that_overflow_an_exponential(target: Target) -> None:
    x = torch.tensor([[1e4, 1e4, -1e4], [-math.inf, 0.0, 1.0], [-math.inf] * 3], device=target.device).to(target.dtype)
    with fastformer.backend(target.backend):
        y = F.softmax(x, -1)
    assert y[0].tolist() == [0.5, 0.5, 0.0]
    assert y[1, 0] == 0 and not y[1].isnan().any()
    assert y[2].tolist() == [0.0, 0.0, 0.0]


@on_kernels
def test_nan_spreads_over_its_row_only(target: Target) -> None:
    x = tensor(target, 3, 40)
    x[1] = -math.inf
    x[:2, 17] = math.nan
    with fastformer.backend(target.backend):
        y = F.softmax(x, -1)
    assert y[:2].isnan().all() and not y[2].isnan().any()


@on_kernels
def test_other_dimensions_and_dtype(target: Target) -> None:
    x = tensor(target, 4, 5, 6)
    with fastformer.backend(target.backend):
        assert torch.equal(F.softmax(x, 1), F.softmax(x.transpose(1, 2), -1).transpose(1, 2))
        assert F.softmax(x, -1, dtype=torch.float32).dtype == torch.float32


@given(
    # In one row, or with steep scores, one element decides, and how close torch comes is a matter of luck.
    rows=st.integers(4, 12),
    cols=st.integers(1, 150),
    causal=st.booleans(),
    scale=st.sampled_from([-0.4, 0.0, 0.7, 1.0]),
    layout=st.sampled_from(LAYOUTS),
    target=st.sampled_from(KERNEL_TARGETS),
)
def test_any_shape(rows: int, cols: int, causal: bool, scale: float, layout: str, target: Target) -> None:
    check_softmax(target, laid_out(target, layout, rows, cols), is_causal=causal, scale=scale)


@on_kernels
def test_rows_sum_to_one_and_shifting_changes_nothing(target: Target) -> None:
    x = tensor(target, 7, 50).round()
    with fastformer.backend(target.backend):
        y, shifted = F.softmax(x, -1), F.softmax(x + 4, -1)
    assert torch.equal(y, shifted)
    torch.testing.assert_close(
        y.double().sum(-1), torch.ones_like(y[:, 0]).double(), rtol=0, atol=50 * torch.finfo(y.dtype).eps
    )


def test_opcheck() -> None:
    x, mask = torch.randn(3, 4, 9, requires_grad=True), torch.randn(4, 9, requires_grad=True)
    torch.library.opcheck(torch.ops.fastformer.softmax_forward, (x, None, 0.5, True))
    torch.library.opcheck(torch.ops.fastformer.softmax_forward, (x, mask, 0.5, False))
    y = torch.softmax(x, -1).detach()
    torch.library.opcheck(torch.ops.fastformer.softmax_backward, (torch.randn(3, 4, 9), y, 0.5))


def test_gradcheck_and_double_backward() -> None:
    x, mask = (
        torch.randn(3, 5, dtype=torch.double, requires_grad=True),
        torch.randn(5, dtype=torch.double, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda x, m: F.softmax(x, -1, scale=0.7, mask=m, is_causal=True), (x, mask))
    assert torch.autograd.gradgradcheck(lambda x, m: F.softmax(x, -1, scale=0.7, mask=m, is_causal=True), (x, mask))


def test_double_backward_of_the_kernel() -> None:
    def penalty(function: object, x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    x = torch.randn(4, 9, requires_grad=True)
    with fastformer.backend("cpu"):
        ours = penalty(lambda x: F.softmax(x, -1, scale=0.5), x)
    torch.testing.assert_close(ours, penalty(lambda x: torch.softmax(0.5 * x, -1), x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    mask = torch.rand(9) > 0.3
    compiled = torch.compile(lambda x: F.softmax(x * 2, -1, mask=mask), fullgraph=True, dynamic=dynamic)
    for rows in (3, 5, 6):
        x = torch.randn(rows, 9, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, F.softmax(x * 2, -1, mask=mask))
        (mine,) = torch.autograd.grad(y.square().sum(), x)
        (theirs,) = torch.autograd.grad(F.softmax(x * 2, -1, mask=mask).square().sum(), x)
        torch.testing.assert_close(mine, theirs)


def test_autocast_keeps_the_dtype_that_torch_gives() -> None:
    x = torch.randn(3, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert F.softmax(x, -1).dtype == torch.softmax(x, -1).dtype


def test_torch_func() -> None:
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(torch.func.vmap(plain)(x), torch.softmax(x, -1))
    loss = lambda x: plain(x).square().sum()  # noqa: E731
    torch.testing.assert_close(
        torch.func.grad(loss)(x), torch.func.grad(lambda x: torch.softmax(x, -1).square().sum())(x)
    )
    raw = torch.func.vmap(lambda x: torch.ops.fastformer.softmax_forward(x, None, 1.0, False))(x)
    torch.testing.assert_close(raw, torch.softmax(x, -1))


@pytest.mark.parametrize(
    ("error", "words", "arguments", "options"),
    [
        (TypeError, "input is a list", ([1.0],), {}),
        (TypeError, "input has dtype torch.int64", (torch.ones(3, dtype=torch.long),), {}),
        (IndexError, "dim is 2", (torch.ones(3), 2), {}),
        (ValueError, "scale is nan", (torch.ones(3), 0), {"scale": math.nan}),
        (ValueError, r"mask has shape \(4,\), must broadcast to \(3,\)", (torch.ones(3), 0), {"mask": torch.ones(4)}),
        (TypeError, "mask has dtype torch.int64", (torch.ones(3), 0), {"mask": torch.ones(3, dtype=torch.long)}),
        (ValueError, "dim is 0, must be the last", (torch.ones(3, 3), 0), {"is_causal": True}),
        (ValueError, "must have at least 2 dimensions", (torch.ones(3), 0), {"is_causal": True}),
    ],
)
def test_errors(error: type, words: str, arguments: tuple, options: dict) -> None:
    if len(arguments) == 1:
        arguments = (*arguments, -1)
    with pytest.raises(error, match=words):
        F.softmax(*arguments, **options)
