import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as torch_functional
from cuda_support import CUDA_TARGETS, KERNEL_TARGETS, on_kernels, on_targets
from hypothesis import given
from hypothesis import strategies as st
from support import LAYOUTS, Target, awkward, check, laid_out, tensor
from torch import Tensor

import fastformer
import fastformer.functional as F
from fastformer import backends, reference


def check_norm(
    target: Target,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rms: bool = False,
    eps: float = 1e-5,
) -> None:
    shape = x.shape[-1:]

    def ours(x: Tensor, r: Tensor | None, w: Tensor | None, b: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        if rms:
            return F.rms_norm(x, shape, w, eps) if r is None else F.add_rms_norm(x, r, shape, w, eps)
        return F.layer_norm(x, shape, w, b, eps) if r is None else F.add_layer_norm(x, r, shape, w, b, eps)

    def exact(x: Tensor, r: Tensor | None, w: Tensor | None, b: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        if r is not None:  # the kernels norm the sum as it is rounded for `summed`
            rounded = (x + r).to(target.dtype).double() - (x + r)
            r = r + rounded.detach()
        normed, summed = reference.layer_norm(x, r, w, b, eps=eps, rms=rms)
        return normed if r is None else (normed, summed)

    check(target, ours, ours, exact, [x, residual, weight, bias])


@on_targets
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("add", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 64), (5, 65), (130, 127), (4, 1024)])
def test_shapes(target: Target, shape: tuple[int, ...], add: bool, affine: bool, rms: bool) -> None:
    check_norm(
        target,
        tensor(target, *shape) + 0.5,
        residual=tensor(target, *shape) if add else None,
        weight=tensor(target, shape[-1]) if affine else None,
        bias=tensor(target, shape[-1]) if affine and not rms else None,
        rms=rms,
    )


@on_kernels
def test_one_column(target: Target) -> None:
    """With one column the normed value is exactly 0, so the gradient is exactly 0 too."""
    x = tensor(target, 4, 1).requires_grad_()
    with fastformer.backend(target.backend):
        y = F.layer_norm(x, (1,))
        y.sum().backward()
    assert (y == 0).all() and (x.grad == 0).all()


@on_kernels
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 4)])
def test_empty(target: Target, shape: tuple[int, ...]) -> None:
    x = tensor(target, *shape).requires_grad_()
    weight = tensor(target, shape[-1]).requires_grad_()
    with fastformer.backend(target.backend):
        y = F.layer_norm(x, shape[-1:], weight)
        y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert (weight.grad == 0).all()


@on_kernels
def test_layouts(target: Target) -> None:
    check_norm(target, awkward(target, 5, 33), residual=tensor(target, 33, 5).t(), weight=awkward(target, 33))
    check_norm(target, tensor(target, 1, 40).expand(3, 40), bias=tensor(target, 40))


@on_kernels
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_a_very_long_row(target: Target, rms: bool) -> None:
    cols = 20_011 if target.slow else 262_144  # both need more than one block in the Triton kernel
    bias = None if rms else tensor(target, cols)
    check_norm(target, tensor(target, 2, cols), weight=tensor(target, cols), bias=bias, rms=rms)


@on_kernels
@pytest.mark.parametrize("cols", [33, 40, 151, 304])
def test_float32_weights_with_a_low_precision_input(target: Target, cols: int) -> None:
    weight, bias = torch.randn(2, cols, device=target.device)
    check_norm(target, tensor(target, 9, cols), weight=weight, bias=bias)


@on_kernels
def test_vectors_that_are_not_aligned(target: Target) -> None:
    weight, bias = tensor(target, 65)[1:], tensor(target, 67)[3:]
    check_norm(target, tensor(target, 5, 64), weight=weight, bias=bias)
    check_norm(target, tensor(target, 5, 64), weight=weight.float()[:64], rms=True)
    check_norm(target, tensor(target, 5, 63), weight=weight[:63], bias=bias[:63])


@pytest.mark.skipif("cpu" not in backends.CUDA_DEVICES, reason="without the emulator of the CUDA C++ kernels")
def test_vectors_that_are_not_aligned_leave_the_accesses_to_rows_wide() -> None:
    emulator = sys.modules["fastformer_simt"]
    accesses = [emulator.counters()["accesses"]]
    x = torch.randn(5, 64)
    with fastformer.backend("cuda"):
        for weight, bias in (torch.randn(2, 64), torch.randn(2, 65)[:, 1:]):
            leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
            torch.autograd.grad(F.layer_norm(leaves[0], (64,), *leaves[1:]).sum(), leaves)
            accesses.append(emulator.counters()["accesses"])
    aligned, not_aligned = (after - before for before, after in itertools.pairwise(accesses))
    assert aligned == not_aligned > 0


# Widths on either side of where the CUDA C++ kernels, forward and backward, go from registers to shared memory and to a
# loop, in the widest accesses and, if odd, single ones. Of more rows than the emulated device has blocks at once.
@pytest.mark.parametrize("cols", [1027, 6143, 6151, 8184, 8200, 16383, 16384, 16387, 16392])
@pytest.mark.parametrize("target", CUDA_TARGETS, ids=str)
def test_every_way_to_hold_a_row(target: Target, cols: int) -> None:
    weight, bias = tensor(target, cols), tensor(target, cols)
    check_norm(target, tensor(target, 5, cols), residual=tensor(target, 5, cols), weight=weight, bias=bias)
    check_norm(target, tensor(target, 5, cols), weight=weight.float(), rms=True)


@on_kernels
def test_large_mean_does_not_cancel(target: Target) -> None:
    check_norm(target, tensor(target, 4, 256) + 100)


@on_kernels
def test_several_dimensions(target: Target) -> None:
    x, weight, bias = tensor(target, 3, 4, 5), tensor(target, 4, 5), tensor(target, 4, 5)
    with fastformer.backend(target.backend):
        y = F.layer_norm(x, (4, 5), weight, bias)
        flat = F.layer_norm(x.flatten(1), (20,), weight.flatten(), bias.flatten())
        normed, summed = F.add_layer_norm(x, x, [4, 5], weight, bias)
    assert torch.equal(y, flat.view_as(x))
    assert torch.equal(summed, x + x) and normed.shape == x.shape


@on_kernels
def test_nan_spreads_over_its_row_only(target: Target) -> None:
    x = tensor(target, 2, 40)
    x[0, 17] = math.nan
    with fastformer.backend(target.backend):
        y = F.layer_norm(x, (40,))
    assert y[0].isnan().all() and not y[1].isnan().any()


@given(
    rows=st.integers(1, 200),
    cols=st.integers(8, 150),  # of two columns the gradient is what two nearly equal terms leave: rounding alone
    rms=st.booleans(),
    add=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    target=st.sampled_from([target for target in KERNEL_TARGETS if not target.slow] or KERNEL_TARGETS),
)
def test_any_shape(rows: int, cols: int, rms: bool, add: bool, layout: str, target: Target) -> None:
    residual = tensor(target, rows, cols) if add else None
    check_norm(target, laid_out(target, layout, rows, cols), residual=residual, weight=tensor(target, cols), rms=rms)


def test_backward_is_bitwise_the_same_for_any_number_of_threads() -> None:
    x, weight, grad = torch.randn(1000, 64), torch.randn(64), torch.randn(1000, 64)
    _, _, mean, rstd = torch.ops.fastformer.layer_norm_forward(x, None, weight, None, 1e-5, False)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.fastformer.layer_norm_backward(grad, None, x, weight, mean, rstd, True, False))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@on_kernels
@pytest.mark.parametrize(("affine", "cols"), [("both", 1051), ("weight", 130), ("bias", 130), ("none", 64)])
def test_a_row_does_not_depend_on_its_place(target: Target, affine: str, cols: int) -> None:
    x, weight, bias = tensor(target, 7, cols), tensor(target, cols), tensor(target, cols)
    weight, bias = (weight if affine in ("both", "weight") else None), (bias if affine in ("both", "bias") else None)
    with fastformer.backend(target.backend):
        together = F.layer_norm(x, (cols,), weight, bias)
        alone = torch.cat([F.layer_norm(row, (cols,), weight, bias) for row in x.split(1)])
    assert torch.equal(together, alone)


@on_kernels
@pytest.mark.parametrize("cols", [7, 768, 1025, 20_000])
def test_rows_of_equal_values(target: Target, cols: int) -> None:
    """Whose mean, a sum of many, is rounded by more than they differ."""
    x = torch.full((2, cols), 1000.123, device=target.device).to(target.dtype)
    x[1] = -1e-3 / 3
    with fastformer.backend(target.backend):
        assert (F.layer_norm(x, (cols,)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not backends.CPU_LIBRARY, reason="compares calls of the C++ kernel")
def test_large_results_are_those_of_small_calls(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 12288, 784).to(dtype)  # goes past the cache of 32 MiB in either dtype
    weight, bias = torch.randn(2, 784).to(dtype)
    with fastformer.backend("cpu"):
        normed = F.layer_norm(x, (784,), weight, bias)
        both = F.add_layer_norm(x, residual, (784,), weight, bias)
        for rows in (slice(0, 64), slice(6100, 6200), slice(12224, 12288)):
            assert torch.equal(normed[rows], F.layer_norm(x[rows], (784,), weight, bias))
            small = F.add_layer_norm(x[rows], residual[rows], (784,), weight, bias)
            assert all(torch.equal(large[rows], part) for large, part in zip(both, small))


def test_gradient_of_summed_alone() -> None:
    x, residual = torch.randn(2, 3, 8, requires_grad=True).unbind(0)
    with fastformer.backend("cpu"):
        _, summed = F.add_layer_norm(x, residual, (8,))
    grads = torch.autograd.grad(summed.sum(), (x, residual))
    assert all((g == 1).all() for g in grads)


def test_dropout_of_the_added_branch() -> None:
    x, residual = torch.ones(100, 100), torch.zeros(100, 100)
    _, summed = F.add_layer_norm(x, residual, (100,), dropout_p=0.25)
    assert summed.unique().tolist() == pytest.approx([0, 4 / 3])
    assert 0.2 < (summed == 0).float().mean() < 0.3
    _, summed = F.add_rms_norm(x, residual, (100,), dropout_p=0.25, training=False)
    assert torch.equal(summed, x)


def test_opcheck() -> None:
    x, r, w, b = (torch.randn(*shape, requires_grad=True) for shape in ((3, 4, 9), (3, 4, 9), (9,), (9,)))
    forward, backward = torch.ops.fastformer.layer_norm_forward, torch.ops.fastformer.layer_norm_backward
    for arguments in ((x, None, None, None, 1e-5, False), (x, r, w, b, 1e-5, False), (x, r, w, None, 1e-5, True)):
        torch.library.opcheck(forward, arguments)
    _, summed, mean, rstd = (t.detach() for t in forward(x, r, w, b, 1e-5, False))
    torch.library.opcheck(backward, (summed, summed, summed, w.detach(), mean, rstd, True, False))


@on_kernels
def test_results_are_what_the_fake_kernel_says(target: Target) -> None:
    x, weight, statistics = (
        tensor(target, 3, 9),
        torch.ones(9, device=target.device),
        torch.ones(3, device=target.device),
    )
    arguments = (x, None, x, weight, statistics, statistics, False, False)
    with fastformer.backend(target.backend):
        torch.library.opcheck(torch.ops.fastformer.layer_norm_backward, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_gradcheck_and_double_backward(rms: bool) -> None:
    x, r, w = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((3, 5), (3, 5), (5,)))
    function = F.add_rms_norm if rms else F.add_layer_norm
    assert torch.autograd.gradcheck(lambda x, r, w: function(x, r, (5,), w, eps=1e-3), (x, r, w))
    assert torch.autograd.gradgradcheck(lambda x, r, w: function(x, r, (5,), w, eps=1e-3), (x, r, w))


def test_double_backward_of_the_kernel() -> None:
    def penalty(function: object, *inputs: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    inputs = [torch.randn(4, 9, requires_grad=True), torch.randn(9, requires_grad=True)]
    with fastformer.backend("cpu"):
        ours = penalty(lambda x, w: F.layer_norm(x, (9,), w), *inputs)
    theirs = penalty(lambda x, w: torch_functional.layer_norm(x, (9,), w), *inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    weight = torch.randn(9, requires_grad=True)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        normed, summed = F.add_layer_norm(x, x * 2, (9,), weight)
        return F.rms_norm(normed, (9,)) + summed

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for rows in (3, 5, 6):
        x = torch.randn(rows, 9, requires_grad=True)
        torch.testing.assert_close(compiled(x, weight), function(x, weight))
        mine = torch.autograd.grad(compiled(x, weight).square().sum(), (x, weight))
        theirs = torch.autograd.grad(function(x, weight).square().sum(), (x, weight))
        torch.testing.assert_close(mine, theirs)


def test_autocast_keeps_the_dtype_that_torch_gives() -> None:
    x = torch.randn(3, 9).bfloat16()
    weight = torch.randn(9)
    with torch.autocast("cpu", torch.bfloat16):
        ours, torchs = F.layer_norm(x, (9,), weight, weight), torch_functional.layer_norm(x, (9,), weight, weight)
    assert ours.dtype == torchs.dtype


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, r"normalized_shape is \(4,\)", lambda x: F.layer_norm(x, (4,))),
        (ValueError, "normalized_shape is", lambda x: F.layer_norm(x, ())),
        (ValueError, r"weight has shape \(4,\), must be \(3,\)", lambda x: F.layer_norm(x, (3,), torch.ones(4))),
        (TypeError, "bias is a int", lambda x: F.layer_norm(x, (3,), None, 1)),
        (ValueError, "eps is nan, must be a finite number", lambda x: F.layer_norm(x, (3,), eps=math.nan)),
        (TypeError, "input has dtype torch.int64", lambda x: F.rms_norm(x.long(), (3,))),
        (ValueError, "residual has shape", lambda x: F.add_layer_norm(x, x[:1], (3,))),
        (ValueError, "residual has dtype", lambda x: F.add_rms_norm(x, x.bfloat16(), (3,))),
        (ValueError, "dropout_p is 2", lambda x: F.add_layer_norm(x, x, (3,), dropout_p=2)),
    ],
)
def test_errors(error: type, words: str, call: object) -> None:
    with pytest.raises(error, match=words):
        call(torch.ones(2, 3))


@pytest.mark.skipif(not backends.CPU_LIBRARY, reason="the CPU kernels were not built")
@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("mean and rstd must be float32", {"mean": torch.ones(2).bfloat16()}),
        ("mean and rstd must be float32", {"rstd": torch.ones(2).double()}),
        ("mean and rstd must have an element a row", {"rstd": torch.ones(1)}),
        ("weight must be float32, bfloat16 or float16", {"weight": torch.ones(3).long()}),
    ],
)
def test_errors_of_the_operator(words: str, changes: dict) -> None:
    x, row_values = torch.ones(2, 3), torch.ones(2)
    tensors = {"grad_output": x, "grad_summed": None, "summed": x, "weight": None}
    tensors |= {"mean": row_values, "rstd": row_values} | changes
    with fastformer.backend("cpu"), pytest.raises(RuntimeError, match=words):
        torch.ops.fastformer.layer_norm_backward(*tensors.values(), False, False)
