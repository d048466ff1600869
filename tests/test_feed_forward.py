import math
import sys

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

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
on_activations = pytest.mark.parametrize("activation", ACTIVATIONS)
#: Where widths that are multiples of 8 go to products of our own (csrc/cuda/feed_forward_fused.cu).
FUSED_TARGETS = [target for target in CUDA_TARGETS if target.dtype != torch.float32]
on_fused = pytest.mark.parametrize("target", FUSED_TARGETS, ids=str)

Arguments = list["Tensor | None"]  # input, weight1, bias1, weight2, bias2, weight_gate


def arguments(
    target: Target, rows: tuple[int, ...], C: int, hidden: int, C2: int, *, bias: bool = True, gated: bool = False
) -> Arguments:
    weight_gate = tensor(target, hidden, C, scale=C**-0.5) if gated else None
    weights = tensor(target, hidden, C, scale=C**-0.5), tensor(target, C2, hidden, scale=hidden**-0.5)
    biases = (tensor(target, hidden), tensor(target, C2)) if bias else (None, None)
    return [tensor(target, *rows, C), weights[0], biases[0], weights[1], biases[1], weight_gate]


def layer(activation: str):
    """F.feed_forward as a function of its tensors alone."""

    def run(input, weight1, bias1, weight2, bias2, weight_gate=None):
        return F.feed_forward(input, weight1, bias1, weight2, bias2, activation=activation, weight_gate=weight_gate)

    return run


def check_feed_forward(target: Target, inputs: Arguments, activation: str) -> None:
    def exact(input, weight1, bias1, weight2, bias2, weight_gate):
        weights = (input, weight1, bias1, weight2, bias2)
        return reference.feed_forward(*weights, activation=activation, weight_gate=weight_gate)

    check(target, layer(activation), layer(activation), exact, inputs)


@on_targets
@on_activations
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("bias", "width"), [(False, 37), (True, 37), (True, 40)])
def test_activations(target: Target, activation: str, gated: bool, bias: bool, width: int) -> None:
    check_feed_forward(target, arguments(target, (2, 19), 13, width, 11, bias=bias, gated=gated), activation)


@on_fused
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_small_values_of_activations_keep_their_digits(target: Target, activation: str) -> None:
    """To the left, where an error rule that goes by a row's largest value would not notice."""
    C = 16
    x = torch.linspace(-5, 9, 40 * C).view(40, C).to(target.device, target.dtype)
    one = torch.eye(C, device=target.device, dtype=target.dtype)
    with fastformer.backend(target.backend):
        values = F.feed_forward(x, one, None, one, None, activation=activation).double()
    expected = reference.feed_forward(x.double(), one.double(), None, one.double(), None, activation=activation)
    info = torch.finfo(target.dtype)
    assert ((values - expected).abs() / expected.abs().clamp_min(info.smallest_normal)).max() <= 0.51 * info.eps


@on_fused
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_of_extreme_values(target: Target, activation: str) -> None:
    """Products with zeros make NaN of infinities: one value a row."""
    most = torch.finfo(target.dtype).max
    x = torch.tensor([[most], [-most], [0.0], [torch.nan]], device=target.device, dtype=target.dtype)
    x = torch.cat([x, x.new_zeros(4, 7)], 1)
    one = torch.eye(8, device=target.device, dtype=target.dtype)
    with fastformer.backend(target.backend):
        values = F.feed_forward(x, one, None, one, None, activation=activation)[:, 0]
    assert values[:3].tolist() == [most, 0.0, 0.0]
    assert values[3].isnan()


@on_kernels
@pytest.mark.parametrize("rows", [(), (1,), (127,), (129,), (2, 3, 43)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_rows(target: Target, rows: tuple[int, ...], gated: bool) -> None:
    check_feed_forward(target, arguments(target, rows, 16, 33, 17, gated=gated), "gelu")


@pytest.mark.skipif(not backends.CPU_LIBRARY, reason="the CPU kernels were not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(131, 401, 799, 21), (260, 385, 48, 385), (32, 0, 16, 16)], ids=str)
def test_several_blocks_of_a_product(dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> None:
    """Rows, columns and depths that are no multiples of a block's, or of the two that bfloat16 takes at once."""
    rows, C, hidden, C2 = sizes
    target = Target("cpu", "cpu", dtype)
    inputs = arguments(target, (rows,), max(C, 1), hidden, C2)
    if C == 0:
        inputs[0], inputs[1] = inputs[0][:, :0], inputs[1][:, :0]
    check_feed_forward(target, inputs, "gelu")


@on_kernels
@pytest.mark.parametrize("sizes", [(1, 7, 3), (7, 1, 3), (7, 3, 1), (64, 128, 64)], ids=str)
def test_widths(target: Target, sizes: tuple[int, int, int]) -> None:
    check_feed_forward(target, arguments(target, (9,), *sizes), "silu")


@on_fused
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("sizes", "activation"),
    [
        ((1, 8, 24, 8), "gelu"),
        ((7, 24, 8, 40), "silu"),
        ((8, 40, 136, 8), "relu"),
        ((63, 136, 40, 24), "gelu_tanh"),
        ((64, 64, 64, 64), "silu"),
        ((65, 24, 72, 136), "gelu"),
        ((127, 72, 136, 40), "relu"),
        ((128, 128, 128, 128), "gelu_tanh"),
        ((129, 136, 72, 136), "silu"),
        ((130, 8, 264, 72), "gelu"),
    ],
    ids=str,
)
def test_edges_of_tiles(target: Target, sizes: tuple[int, int, int, int], activation: str, gated: bool) -> None:
    """One off a tile, in rows, columns and depth; tiles of 128 are for more than 64 rows and columns."""
    check_feed_forward(target, arguments(target, sizes[:1], *sizes[1:], gated=gated), activation)


@on_fused
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("sizes", "launches"),  # of the forward pass: one more for a product whose depth is split
    [((7, 520, 16, 520), 3), ((70, 8, 520, 16), 3), ((66, 2056, 72, 8), 3), ((520, 8, 16, 8), 2)],
    ids=str,
)
def test_split_depths(target: Target, sizes: tuple[int, int, int, int], launches: int, gated: bool) -> None:
    inputs = arguments(target, sizes[:1], *sizes[1:], gated=gated)
    check_feed_forward(target, inputs, "gelu_tanh")
    if target.slow:
        emulator = sys.modules["fastformer_simt"]
        before = emulator.counters()["launches"]
        with fastformer.backend(target.backend):
            layer("gelu_tanh")(*inputs)
        assert emulator.counters()["launches"] - before == launches


@on_fused
@given(
    rows=st.integers(1, 150),
    widths=st.tuples(*[st.integers(1, 18)] * 3),
    activation=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    bias=st.booleans(),
)
def test_any_shape_of_tiles(
    target: Target, rows: int, widths: tuple[int, int, int], activation: str, gated: bool, bias: bool
) -> None:
    C, hidden, C2 = (8 * width for width in widths)
    check_feed_forward(target, arguments(target, (rows,), C, hidden, C2, gated=gated, bias=bias), activation)


@pytest.mark.skipif(not backends.CPU_LIBRARY, reason="the CPU kernels were not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_more_rows_than_one_panel(dtype: torch.dtype, gated: bool) -> None:
    target = Target("cpu", "cpu", dtype)
    check_feed_forward(
        target, arguments(target, (600 if dtype == torch.float32 else 1100,), 4, 16384, 4, gated=gated), "gelu_tanh"
    )


@pytest.mark.skipif(not backends.CPU_LIBRARY, reason="the CPU kernels were not built")
def test_bias_gradients_of_many_rows() -> None:
    one, bias1, bias2 = torch.ones(1, 1), torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    with fastformer.backend("cpu"):
        y = F.feed_forward(torch.ones(200_000, 1), one, bias1, one, bias2, activation="relu")
        grads = torch.autograd.grad(y, (bias1, bias2), torch.full_like(y, 0.1))
    for grad in grads:
        torch.testing.assert_close(grad.item(), 200_000 * torch.tensor(0.1).item(), rtol=2e-6, atol=0)


@on_kernels
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("widths", [(10, 18, 12), (16, 24, 8)], ids=str)
def test_layouts(target: Target, widths: tuple[int, int, int], gated: bool) -> None:
    C, hidden, C2 = widths
    inputs = arguments(target, (6,), *widths)
    inputs[0] = awkward(target, 2, 3, C).transpose(0, 1)
    inputs[1], inputs[3] = awkward(target, hidden, C, scale=0.3), tensor(target, hidden, C2, scale=0.3).t()
    inputs[2], inputs[4] = tensor(target, 1).expand(hidden), tensor(target, C2 + 1)[1:]
    if gated:  # rows further apart than those of weight1
        inputs[5] = tensor(target, hidden, 2 * C, scale=0.3)[:, :C]
    check_feed_forward(target, inputs, "gelu")


@on_kernels
def test_rows_that_begin_off_16_bytes(target: Target) -> None:
    inputs = arguments(target, (6,), 16, 24, 8)
    inputs[0] = tensor(target, 6 * 16 + 1)[1:].view(6, 16)
    inputs[1] = tensor(target, 24, 17, scale=0.3)[:, 1:]
    inputs[3] = tensor(target, 1, 24, scale=0.3).expand(8, 24)
    check_feed_forward(target, inputs, "gelu")


@on_kernels
@pytest.mark.parametrize("gated", [False, True])
def test_no_rows(target: Target, gated: bool) -> None:
    inputs = arguments(target, (2, 0), 4, 6, 5, gated=gated)
    leaves = [x.requires_grad_() for x in inputs if x is not None]
    with fastformer.backend(target.backend):
        y = layer("gelu")(*inputs)
        y.sum().backward()
    assert y.shape == (2, 0, 5)
    assert all(x.grad.shape == x.shape and (x.grad == 0).all() for x in leaves)


@given(
    rows=st.integers(1, 40),
    C=st.integers(1, 40),
    hidden=st.integers(1, 70),
    C2=st.integers(1, 20),
    activation=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    target=st.sampled_from(KERNEL_TARGETS),
)
def test_any_shape(
    rows: int, C: int, hidden: int, C2: int, activation: str, gated: bool, layout: str, target: Target
) -> None:
    _, *weights = arguments(target, (rows,), C, hidden, C2, gated=gated)
    inputs = [laid_out(target, layout, rows, C), *weights]
    with fastformer.backend(target.backend):
        y = layer(activation)(*inputs)
    exact = reference.feed_forward(*inputs[:5], activation=activation, weight_gate=inputs[5])
    scale = 40 * torch.finfo(target.dtype).eps * max(1.0, float(exact.abs().max()))
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=scale)


@on_kernels
@on_activations
@pytest.mark.parametrize("width", [1, 8])
def test_the_whole_range_of_an_activation(target: Target, activation: str, width: int) -> None:
    one = torch.eye(width, dtype=target.dtype, device=target.device)
    magnitudes = torch.logspace(-30, 4 if target.dtype == torch.float16 else 15, 250)
    x = torch.cat((torch.linspace(-30, 30, 1201), magnitudes, -magnitudes))
    x = x.to(target.dtype).to(target.device)
    x = x[x != 0]  # where the slope of relu is a matter of taste
    x = x[: len(x) // width * width].view(-1, width).requires_grad_()
    with fastformer.backend(target.backend):
        y = F.feed_forward(x, one, None, one, None, activation=activation)
        (slope,) = torch.autograd.grad(y.sum(), x)
    exact_x = x.detach().double().requires_grad_()
    exact = reference.ACTIVATIONS[activation](exact_x)
    (exact_slope,) = torch.autograd.grad(exact.nan_to_num(nan=0.0).sum(), exact_x)
    eps = torch.finfo(target.dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=2 * eps, atol=8e-7)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=2 * eps, atol=8e-7)


@on_kernels
@pytest.mark.parametrize("widths", [(6, 10, 7), (8, 16, 24)], ids=str)
def test_only_what_needs_a_gradient_gets_one(target: Target, widths: tuple[int, int, int]) -> None:
    inputs = arguments(target, (5,), *widths, gated=True)
    for i in (0, 2):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        everything = [x.detach().requires_grad_() for x in inputs]
        with fastformer.backend(target.backend):
            layer("silu")(*leaves).sum().backward()
            layer("silu")(*everything).sum().backward()
        assert [x.grad is not None for x in leaves] == [i == j for j in range(6)]
        assert torch.equal(leaves[i].grad, everything[i].grad)


@pytest.mark.skipif(not backends.CPU_LIBRARY, reason="the CPU kernels were not built")
def test_bias_gradients_do_not_depend_on_the_number_of_threads() -> None:
    def bias_gradients(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        hidden = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
        grads = torch.ops.fastformer.feed_forward_backward(
            hidden[:, :1], hidden[:, :1], torch.ones(200, 1), None, torch.ones(1, 200), hidden,
            "gelu", True, True, False, True,
        )  # fmt: skip
        return [grads[2], grads[5]]

    threads = torch.get_num_threads()
    try:
        one, two = bias_gradients(1), bias_gradients(2)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_dropout_takes_torchs_way() -> None:
    inputs = arguments(Target("torch", "cpu", torch.float32), (50,), 8, 64, 8)[:5]
    with fastformer.backend("auto"):
        assert torch.equal(F.feed_forward(*inputs, dropout_p=0.5, training=False), F.feed_forward(*inputs))
        dropped = F.feed_forward(*inputs, dropout_p=1.0)
    torch.testing.assert_close(dropped, inputs[4].expand(50, 8))
    with fastformer.backend("cpu"), pytest.raises(ValueError, match="dropout in the hidden layer"):
        F.feed_forward(*inputs, dropout_p=0.5)


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated: bool) -> None:
    x, w1, b1, w2, b2, wg = (
        None if t is None else t.requires_grad_()
        for t in arguments(Target("cpu", "cpu", torch.float32), (2, 3), 4, 6, 5, gated=gated)
    )
    for save_hidden in (True, False):
        torch.library.opcheck(torch.ops.fastformer.feed_forward_forward, (x, w1, b1, wg, w2, b2, "gelu", save_hidden))
    x, w1, w2, wg = (None if t is None else t.detach() for t in (x, w1, w2, wg))
    hidden, grad = torch.randn(6, 12 if gated else 6), torch.randn(2, 3, 5)
    for needs in ((True, True, True, True), (False, True, True, False), (True, False, False, True)):
        torch.library.opcheck(torch.ops.fastformer.feed_forward_backward, (grad, x, w1, wg, w2, hidden, "gelu", *needs))


@on_activations
@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck_and_double_backward(activation: str, gated: bool) -> None:
    target = Target("auto", "cpu", torch.float64)
    inputs = [x.requires_grad_() for x in arguments(target, (2,), 2, 3, 2, gated=gated) if x is not None]
    assert torch.autograd.gradcheck(layer(activation), inputs)
    assert torch.autograd.gradgradcheck(layer(activation), inputs)


@on_activations
def test_double_backward_of_the_kernel(activation: str) -> None:
    inputs = arguments(Target("cpu", "cpu", torch.float32), (5,), 4, 6, 3, gated=True)
    inputs = [x.requires_grad_() for x in inputs]

    def penalty(backend: str) -> tuple[Tensor, ...]:
        with fastformer.backend(backend):
            grads = torch.autograd.grad(layer(activation)(*inputs).square().sum(), inputs, create_graph=True)
            return torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    torch.testing.assert_close(penalty("cpu"), penalty("torch"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    compiled = torch.compile(layer("gelu"), fullgraph=True, dynamic=dynamic)
    for rows in (3, 5, 6):
        inputs = arguments(Target("auto", "cpu", torch.float32), (2, rows), 4, 6, 5, gated=True)
        inputs = [x.requires_grad_() for x in inputs]
        y, expected = compiled(*inputs), layer("gelu")(*inputs)
        torch.testing.assert_close(y, expected)
        mine, theirs = (torch.autograd.grad(z.square().sum(), inputs) for z in (y, expected))
        torch.testing.assert_close(mine, theirs)


def test_autocast_gives_the_dtypes_that_torch_gives() -> None:
    inputs = [x.requires_grad_() for x in arguments(Target("cpu", "cpu", torch.float32), (9,), 16, 32, 16)[:5]]
    results = {}
    for backend in ("cpu", "torch"):
        with fastformer.backend(backend), torch.autocast("cpu", torch.bfloat16):
            y = F.feed_forward(*inputs)
        results[backend] = (y, *torch.autograd.grad(y.float().square().sum(), inputs))
    for mine, theirs in zip(results["cpu"], results["torch"]):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05 * theirs.detach().abs().max().item())


def test_torch_func() -> None:
    inputs = arguments(Target("auto", "cpu", torch.float32), (3, 4), 5, 6, 5)[:5]
    expected = F.feed_forward(*inputs)
    torch.testing.assert_close(torch.func.vmap(lambda x: F.feed_forward(x, *inputs[1:]))(inputs[0]), expected)
    x, w1, b1, w2, b2 = inputs
    raw = torch.func.vmap(
        lambda x: torch.ops.fastformer.feed_forward_forward(x, w1, b1, None, w2, b2, "gelu", False)[0]
    )(x)
    torch.testing.assert_close(raw, expected)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "input is a list", {"input": [1.0]}),
        (TypeError, "input has dtype torch.int64", {"input": torch.ones(3, 4, dtype=torch.long)}),
        (ValueError, r"input has shape \(3, 5\), must end in 4", {"input": torch.ones(3, 5)}),
        (ValueError, r"weight1 has shape \(6,\), must have 2 dimensions", {"weight1": torch.ones(6)}),
        (ValueError, r"weight2 has shape \(5, 7\), must be \(5, 6\)", {"weight2": torch.ones(5, 7)}),
        (ValueError, "weight2 has dtype torch.float16, must be torch.float32", {"weight2": torch.ones(5, 6).half()}),
        (ValueError, r"bias1 has shape \(5,\), must be \(6,\)", {"bias1": torch.ones(5)}),
        (ValueError, r"bias2 has shape \(6,\), must be \(5,\)", {"bias2": torch.ones(6)}),
        (ValueError, r"weight_gate has shape \(6, 5\), must be \(6, 4\)", {"weight_gate": torch.ones(6, 5)}),
        (ValueError, "activation is 'tanh', must be one of gelu", {"activation": "tanh"}),
        (ValueError, "dropout_p is 1.5, must be in", {"dropout_p": 1.5}),
        (ValueError, "dropout_p is nan, must be in", {"dropout_p": math.nan}),
    ],
)
def test_errors(error: type, words: str, changes: dict) -> None:
    arguments = {"input": torch.ones(3, 4), "weight1": torch.ones(6, 4), "bias1": None, "weight2": torch.ones(5, 6)}
    with pytest.raises(error, match=words):
        F.feed_forward(**(arguments | {"bias2": None} | changes))
