import inspect
import math

import pytest
import torch
import torch.nn.functional as torch_functional
from cuda_support import CUDA_TARGETS, KERNEL_TARGETS, on_kernels, on_targets
from hypothesis import given
from hypothesis import strategies as st
from support import LAYOUTS, Target, awkward, check, laid_out, needs_library, tensor
from torch import Tensor

import fastformer
import fastformer.functional as F
from fastformer import backends, reference

CPU = Target("cpu", "cpu", torch.float32)
#: Where sizes that are multiples of 8 go to products of our own (csrc/cuda/linear_cross_entropy_fused.cu).
FUSED_TARGETS = [target for target in CUDA_TARGETS if target.dtype != torch.float32]
on_fused = pytest.mark.parametrize("target", FUSED_TARGETS, ids=str)
#: Whose bfloat16 logits are never rounded, if V is a multiple of 8.
EXACT_LOGITS = [Target("cpu", "cpu", torch.bfloat16)] if backends.CPU_LIBRARY else []
EXACT_LOGITS += [target for target in FUSED_TARGETS if target.dtype == torch.bfloat16]


def targets_of(target: Target, rows: int, classes: int, ignored: int = -100) -> Tensor:
    """Class indices, every fourth one ignored."""
    indices = torch.randint(0, classes, (rows,))
    indices[3::4] = ignored
    return indices.to(target.device)


def exact_loss(target: Tensor, reduction: str = "mean", weight: Tensor | None = None, **options: object):
    """The reference, reduced, as a function of input, weight and bias."""

    def run(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
        losses, _ = reference.linear_cross_entropy(input, linear_weight, linear_bias, target, **options)
        kept = target != options.get("ignore_index", -100)
        shares = kept.double() if weight is None else weight.double()[torch.where(kept, target, 0)] * kept
        if reduction == "none":
            return losses * shares
        return (losses * shares).sum() / (shares.sum() if reduction == "mean" else 1)

    return run


def loss(target: Tensor, **options: object):
    """F.linear_cross_entropy as a function of input, weight and bias."""
    return lambda x, w, b: F.linear_cross_entropy(x, w, target, linear_bias=b, **options)


def check_loss(
    target: Target, inputs: list[Tensor | None], indices: Tensor, weight: Tensor | None = None, **options: object
) -> None:
    ours = loss(indices, weight=weight, **options)
    check(target, ours, ours, exact_loss(indices, weight=weight, **options), inputs)


def layer(target: Target, rows: int, C: int, V: int, *, bias: bool = False) -> list[Tensor | None]:
    weight = tensor(target, V, C, scale=2 * C**-0.5)
    return [tensor(target, rows, C), weight, tensor(target, V) if bias else None]


@on_targets
@pytest.mark.parametrize("sizes", [(1, 1, 2), (5, 7, 13), (33, 16, 257)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_losses_of_rows(target: Target, sizes: tuple[int, int, int], bias: bool, label_smoothing: float) -> None:
    rows, C, V = sizes
    indices = targets_of(target, rows, V)
    inputs = layer(target, rows, C, V, bias=bias)
    check_loss(target, inputs, indices, reduction="none", label_smoothing=label_smoothing)


@on_targets
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_scalar_losses(target: Target, reduction: str, bias: bool, label_smoothing: float) -> None:
    inputs = layer(target, 40, 16, 67, bias=bias)
    check_scalar_loss(target, inputs, targets_of(target, 40, 67, ignored=7), reduction, label_smoothing)


def check_scalar_loss(
    target: Target, inputs: list[Tensor | None], indices: Tensor, reduction: str, label_smoothing: float
) -> None:
    """Class 7 is ignored."""
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": 7}
    with fastformer.backend(target.backend):
        total = loss(indices, **options)(*inputs)
        each = loss(indices, **(options | {"reduction": "none"}))(*inputs)
    summed = each.double().sum() / (1 if reduction == "sum" else (indices != 7).sum())
    torch.testing.assert_close(total.double(), summed, rtol=6 * torch.finfo(target.dtype).eps, atol=0)
    # A low-precision sum may be right by luck in torch; its gradients are many numbers, and no luck.
    grads = [_gradients(loss(indices, **options), inputs, target.backend)]
    grads += [_gradients(loss(indices, **options), inputs, "torch")]
    exact = _gradients(exact_loss(indices, **options), [None if x is None else x.double() for x in inputs], "torch")
    for mine, theirs, truth in zip(*grads, exact):
        verdict = fastformer.accuracy.judge(mine, theirs, truth, factor=fastformer.accuracy.GRADIENT_FACTOR)
        assert verdict.ok, verdict


def _gradients(function, inputs: list[Tensor | None], backend: str) -> tuple[Tensor, ...]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    with fastformer.backend(backend):
        return torch.autograd.grad(function(*leaves), [x for x in leaves if x is not None])


@on_fused
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("sizes", "label_smoothing"),
    [
        ((2, 8, 8), 0.1),
        ((7, 40, 1000), 0.0),
        ((63, 136, 264), 0.1),
        ((64, 64, 64), 0.0),
        ((65, 40, 264), 0.0),
        ((66, 1032, 72), 0.0),
        ((127, 8, 136), 1.0),
        ((128, 128, 128), 0.0),
        ((129, 136, 264), 0.1),
    ],
    ids=str,
)
def test_edges_of_tiles(target: Target, sizes: tuple[int, int, int], bias: bool, label_smoothing: float) -> None:
    """One off a tile, in rows, columns and vocabulary; tiles of 128 are for more than 64 rows and columns."""
    rows, C, V = sizes
    inputs = layer(target, rows, C, V, bias=bias)
    check_loss(target, inputs, targets_of(target, rows, V), reduction="none", label_smoothing=label_smoothing)
    indices = targets_of(target, rows, V, ignored=7)
    check_scalar_loss(target, inputs, indices, "sum" if bias else "mean", label_smoothing)


@on_fused
@pytest.mark.parametrize("sizes", [(1, 520, 64), (3, 64, 1000)], ids=str)
def test_split_depths(target: Target, sizes: tuple[int, int, int]) -> None:
    """Of the logits, and of input's gradient."""
    rows, C, V = sizes
    check_loss(target, layer(target, rows, C, V, bias=True), targets_of(target, rows, V), reduction="none")


@on_fused
@given(
    rows=st.integers(1, 150),
    widths=st.tuples(st.integers(1, 18), st.integers(1, 34)),
    bias=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_any_shape_of_tiles(
    target: Target, rows: int, widths: tuple[int, int], bias: bool, label_smoothing: float
) -> None:
    C, V = (8 * width for width in widths)
    inputs = layer(target, rows, C, V, bias=bias)
    check_loss(target, inputs, targets_of(target, rows, V), reduction="none", label_smoothing=label_smoothing)


@on_fused
def test_gradients_of_inputs_are_added_up_in_float32(target: Target) -> None:
    """Many parts of the vocabulary add about the same, which in 16 bits would be rounded to one side each time."""
    x, weight = tensor(target, 16, 8, scale=0.1), 0.9 + tensor(target, 8192, 8, scale=0.01)
    weight[0] = 0.0
    indices = torch.zeros(16, dtype=torch.int64, device=target.device)
    grad, _ = _gradients(loss(indices, reduction="sum"), [x, weight, None], target.backend)
    exact, _ = _gradients(exact_loss(indices, "sum"), [x.double(), weight.double(), None], "torch")
    torch.testing.assert_close(grad.double(), exact, rtol=torch.finfo(target.dtype).eps, atol=0)


@on_fused
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_losses_are_the_same_without_gradients(target: Target, reduction: str) -> None:
    x, w, b = layer(target, 70, 24, 264, bias=True)
    indices = targets_of(target, 70, 264)
    losses = []
    for needs_grad in (False, True):
        with fastformer.backend(target.backend):
            x = x.detach().requires_grad_(needs_grad)
            losses.append(F.linear_cross_entropy(x, w, indices, linear_bias=b, reduction=reduction))
    assert torch.equal(*losses)


@on_targets
@pytest.mark.parametrize("V", [20, 24])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_class_weights(target: Target, reduction: str, V: int) -> None:
    indices, weight = targets_of(target, 9, V), torch.rand(V, device=target.device).to(target.dtype)
    inputs = layer(target, 9, 8, V)
    ours = loss(indices, weight=weight, reduction=reduction)
    with fastformer.backend(target.backend):
        mine = ours(*inputs)
    expected = exact_loss(indices, reduction, weight)(*(x if x is None else x.double() for x in inputs))
    torch.testing.assert_close(
        mine.double(), expected, rtol=0, atol=8 * torch.finfo(target.dtype).eps * expected.abs().max().item()
    )
    check_loss(target, inputs, indices, weight=weight, reduction="none")


@pytest.mark.parametrize("target", [target for target in KERNEL_TARGETS if target.backend != "triton"], ids=str)
def test_a_very_large_vocabulary(target: Target) -> None:
    V = 16_384 if target.slow and target in FUSED_TARGETS else 262_144  # else half a minute
    bias = torch.full((V,), 100.0, dtype=target.dtype, device=target.device)
    inputs = [*layer(target, 4, 8, V)[:2], bias]
    check_loss(target, inputs, targets_of(target, 4, V), reduction="none", label_smoothing=0.1)


@on_fused
def test_a_block_goes_over_a_row_in_a_loop(target: Target) -> None:
    """In the kernels around the library's products, which large vocabularies above don't reach in 16 bits."""
    check_loss(target, layer(target, 8, 7, 9001, bias=True), targets_of(target, 8, 9001), reduction="none")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_several_chunks(dtype: torch.dtype, bias: bool) -> None:
    target = Target("cpu", "cpu", dtype)
    inputs = layer(target, 600, 8, 20_000, bias=bias)
    check_loss(target, inputs, targets_of(target, 600, 20_000), reduction="none")


@on_kernels
@pytest.mark.parametrize("V", [20, 24])
def test_layouts(target: Target, V: int) -> None:
    indices = targets_of(target, 12, V)[::2]
    inputs = [awkward(target, 6, 8), tensor(target, 8, V).t(), tensor(target, 1).expand(V)]
    check_loss(target, inputs, indices, reduction="none")


@on_fused
def test_rows_that_begin_off_16_bytes(target: Target) -> None:
    x, w, b = tensor(target, 6 * 16 + 1)[1:].view(6, 16), tensor(target, 24, 17)[:, 1:], tensor(target, 25)[1:]
    check_loss(target, [x, w, b], targets_of(target, 6, 24), reduction="none")
    x, w = tensor(target, 6, 24)[:, 8:], tensor(target, 1, 16).expand(24, 16)
    check_loss(target, [x, w, b], targets_of(target, 6, 24), reduction="none")


@on_kernels
@pytest.mark.parametrize("V", [20, 24])
def test_more_dimensions_and_none(target: Target, V: int) -> None:
    x, w, _ = layer(target, 12, 8, V)
    indices = targets_of(target, 12, V)
    with fastformer.backend(target.backend):
        flat = F.linear_cross_entropy(x, w, indices, reduction="none")
        assert torch.equal(
            F.linear_cross_entropy(x.view(3, 4, 8), w, indices.view(3, 4), reduction="none"), flat.view(3, 4)
        )
        assert F.linear_cross_entropy(x[0], w, indices[0]).shape == ()
        torch.testing.assert_close(F.linear_cross_entropy(x[0], w, indices[0], reduction="none"), flat[0])


@on_targets
@pytest.mark.parametrize("sizes", [(4, 7), (8, 16)], ids=str)
def test_nothing_to_learn_from(target: Target, sizes: tuple[int, int]) -> None:
    x, w, _ = (x if x is None else x.requires_grad_() for x in layer(target, 5, *sizes))
    ignored = torch.full((5,), -100, device=target.device)
    with fastformer.backend(target.backend):
        mean = F.linear_cross_entropy(x, w, ignored)
        mean.backward()
        assert mean.isnan() and (x.grad == 0).all() and (w.grad == 0).all()
        assert F.linear_cross_entropy(x, w, ignored, reduction="sum") == 0
    with fastformer.backend("auto"):
        assert F.linear_cross_entropy(x[:0], w, ignored[:0]).isnan()
        assert F.linear_cross_entropy(x[:0], w, ignored[:0], reduction="sum") == 0
    with fastformer.backend("reference"):
        assert F.linear_cross_entropy(x, w[:0], ignored, reduction="sum") == 0


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_products_in_blocks(dtype: torch.dtype, reduction: str) -> None:
    """Enough rows and columns for our own product, whose blocks of logits are gone when the loss of a row is known."""
    target = Target("cpu", "cpu", dtype)
    inputs = layer(target, 45, 24, 9001, bias=True)
    indices = targets_of(target, 45, 9001)
    check_loss(target, inputs, indices, reduction=reduction, label_smoothing=0.1)
    with fastformer.backend("cpu"), torch.no_grad():
        without_gradients = F.linear_cross_entropy(*inputs[:2], indices, linear_bias=inputs[2], reduction=reduction)
    with fastformer.backend("cpu"):
        with_gradients = F.linear_cross_entropy(*inputs[:2], indices, linear_bias=inputs[2], reduction=reduction)
    assert torch.equal(without_gradients, with_gradients)


@needs_library
@pytest.mark.parametrize("rows", [3, 40])
def test_words_that_are_ruled_out(rows: int) -> None:
    bias = torch.zeros(1000)
    bias[:600] = -math.inf  # a whole block of them, and more
    x, w = torch.randn(rows, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
    indices = torch.randint(600, 1000, (rows,))
    losses, grads = [], []
    for backend in ("cpu", "torch"):
        with fastformer.backend(backend):
            losses.append(F.linear_cross_entropy(x, w, indices, linear_bias=bias))
            grads.append(torch.autograd.grad(losses[-1], (x, w)))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0], grads[1])
    assert (grads[0][1][:600] == 0).all()


@on_fused
@pytest.mark.parametrize("rows", [3, 70])
def test_words_that_are_ruled_out_of_tiles(target: Target, rows: int) -> None:
    x, w, bias = layer(target, rows, 16, 264, bias=True)
    bias[:136] = -math.inf  # a whole tile of them, and more
    indices = torch.randint(136, 264, (rows,), device=target.device)
    for reduction in ("none", "sum"):
        ours = loss(indices, reduction=reduction)

        def exact(*inputs: Tensor, reduction: str = reduction) -> Tensor:
            return torch_functional.cross_entropy(torch_functional.linear(*inputs), indices, reduction=reduction)

        check(target, ours, ours, exact, [x, w, bias])
        _, by_weight, by_bias = _gradients(lambda *y: ours(*y).sum(), [x, w, bias], target.backend)  # noqa: B023
        assert (by_weight[:136] == 0).all() and (by_bias[:136] == 0).all()


@pytest.mark.parametrize("target", CUDA_TARGETS, ids=str)
@pytest.mark.parametrize("V", [20, 24])
def test_a_target_that_is_no_word(target: Target, V: int) -> None:
    """Nobody has looked at targets in the memory of a GPU: its loss lacks a logit, and nothing else happens."""
    namespace = torch.ops.fastformer_simt if target.slow else torch.ops.fastformer
    x, w, _ = layer(target, 4, 8, V)
    indices = torch.tensor([-1, V, V + 3, 2**40], device=target.device)
    shares = torch.ones(4, device=target.device)
    losses, lse, *_ = namespace.linear_cross_entropy_forward(x, w, None, indices, None, -100, 0.0, False)
    torch.testing.assert_close(losses, lse)
    total, _, *grads = namespace.linear_cross_entropy_forward(x, w, None, indices, shares, -100, 0.0, True)
    torch.testing.assert_close(total, lse.sum())
    probabilities = (x.double() @ w.double().t()).softmax(-1)
    for grad, exact in zip(grads, (probabilities @ w.double(), probabilities.t() @ x.double())):
        tolerance = 4 * torch.finfo(target.dtype).eps
        torch.testing.assert_close(grad.double(), exact, rtol=tolerance, atol=tolerance)


@on_kernels
@pytest.mark.parametrize("zeros", [(0, 0), (7, 5)], ids=str)
def test_huge_logits(target: Target, zeros: tuple[int, int]) -> None:
    x, w = torch.tensor([[100.0], [-100.0]]), torch.tensor([[100.0], [-100.0], [0.0]])
    x, w = torch_functional.pad(x, (0, zeros[0])), torch_functional.pad(w, (0, zeros[0], 0, zeros[1]))
    x, w = (y.to(target.dtype).to(target.device).requires_grad_() for y in (x, w))
    with fastformer.backend(target.backend):
        losses = F.linear_cross_entropy(x, w, torch.tensor([0, 2], device=target.device), reduction="none")
        losses.sum().backward()
    assert losses[0] == 0 and abs(losses[1].item() - 1e4) <= 1e4 * torch.finfo(target.dtype).eps
    assert x.grad.isfinite().all() and w.grad.isfinite().all()


@given(
    rows=st.integers(1, 40),
    C=st.integers(1, 20),
    V=st.integers(1, 150),
    bias=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    layout=st.sampled_from(LAYOUTS),
    target=st.sampled_from(KERNEL_TARGETS),
)
def test_any_shape(rows: int, C: int, V: int, bias: bool, label_smoothing: float, layout: str, target: Target) -> None:
    _, *weights = layer(target, rows, C, V, bias=bias)
    inputs, indices = [laid_out(target, layout, rows, C), *weights], targets_of(target, rows, V)
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    with fastformer.backend(target.backend):
        losses = loss(indices, **options)(*inputs)
    exact = exact_loss(indices, **options)(*inputs)
    tolerance = 16 * torch.finfo(target.dtype).eps
    torch.testing.assert_close(losses.double(), exact, rtol=tolerance, atol=tolerance)


@on_kernels
def test_any_incoming_gradient(target: Target) -> None:
    indices = targets_of(target, 10, 20)
    ours, exact = loss(indices), exact_loss(indices)
    inputs = layer(target, 10, 8, 20, bias=True)
    check(target, lambda *y: 3 * ours(*y), lambda *y: 3 * ours(*y), lambda *y: 3 * exact(*y), inputs)


@needs_library
@pytest.mark.parametrize("rows", [64, 4096])
def test_scaled_losses_in_float16(rows: int) -> None:
    """A gradient scaler's first factor is beyond float16, and without a factor gradients of a mean are below it."""
    x, weight = torch.randn(rows, 32, requires_grad=True), (torch.randn(100, 32) * 0.1).requires_grad_()
    indices = torch.randint(0, 100, (rows,))

    def gradients(backend: str) -> list[Tensor]:
        with fastformer.backend(backend), torch.autocast("cpu", torch.float16):
            scaled = F.linear_cross_entropy(x, weight, indices) * 65536.0
            return list(torch.autograd.grad(scaled, (x, weight)))

    exact = torch.autograd.grad(exact_loss(indices)(x.double(), weight.double(), None) * 65536.0, (x, weight))
    for ours, torchs, truth in zip(gradients("cpu"), gradients("torch"), exact):
        assert (ours - truth).norm() <= 1.5 * (torchs - truth).norm()


@needs_library
def test_the_saved_gradients_survive_a_second_backward() -> None:
    x, w, _ = (y if y is None else y.requires_grad_() for y in layer(CPU, 10, 8, 20))
    with fastformer.backend("cpu"):
        total = F.linear_cross_entropy(x, w, targets_of(CPU, 10, 20))
    total.backward(retain_graph=True)
    once = w.grad.clone()
    total.backward(retain_graph=True)
    total.backward()
    torch.testing.assert_close(w.grad, 3 * once)


@needs_library
def test_losses_of_rows_and_their_sum_have_one_gradient() -> None:
    inputs, indices = layer(CPU, 10, 8, 20, bias=True), targets_of(CPU, 10, 20)
    summed = _gradients(loss(indices, reduction="sum", label_smoothing=0.1), inputs, "cpu")
    each = _gradients(lambda *x: loss(indices, reduction="none", label_smoothing=0.1)(*x).sum(), inputs, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(summed, each))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_what_our_kernels_lack_is_torchs(reduction: str) -> None:
    x, w, b = layer(CPU, 6, 4, 5, bias=True)
    indices, weight = targets_of(CPU, 6, 5), torch.rand(5)
    logits = torch_functional.linear(x, w, b)
    probabilities = torch.rand(6, 5).softmax(-1)
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": weight}
    for target in (indices, probabilities):
        for backend in ("auto", "torch", "reference"):
            with fastformer.backend(backend):
                ours = F.linear_cross_entropy(x, w, target, linear_bias=b, **options)
            torch.testing.assert_close(ours, torch_functional.cross_entropy(logits, target, **options))
        with fastformer.backend("cpu"), pytest.raises(ValueError, match=r"class (weights|probabilities)"):
            F.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    several = torch.randn(5, 2, 3, 4)
    logits = torch_functional.linear(x, several.reshape(-1, 4)).view(6, 5, 2, 3)
    target = torch.randint(0, 5, (6, 2, 3))
    ours = F.linear_cross_entropy(x, several, target, reduction=reduction)
    torch.testing.assert_close(ours, torch_functional.cross_entropy(logits, target, reduction=reduction))


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch 2.13 has them")
def test_options_are_torchs_own() -> None:
    x, w, _ = layer(CPU, 6, 4, 5)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None)
    indices = targets_of(CPU, 6, 5)
    ours = F.linear_cross_entropy(x, w, indices, options=options)
    torch.testing.assert_close(ours, F.linear_cross_entropy(x, w, indices))
    with fastformer.backend("cpu"), pytest.raises(ValueError, match="torch's options"):
        F.linear_cross_entropy(x, w, indices, options=options)


@pytest.mark.skipif(not hasattr(torch_functional, "linear_cross_entropy"), reason="torch 2.13 has it")
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_torchs_function_gives_the_same(reduction: str, label_smoothing: float) -> None:
    theirs = torch_functional.linear_cross_entropy
    assert inspect.signature(F.linear_cross_entropy).parameters.keys() == inspect.signature(theirs).parameters.keys()
    x, w, b = layer(CPU, 6, 4, 5, bias=True)
    options = {"linear_bias": b, "reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": 3}
    indices = torch.randint(0, 5, (6,))
    torch.testing.assert_close(F.linear_cross_entropy(x, w, indices, **options), theirs(x, w, indices, **options))


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias: bool) -> None:
    x, w, b = (None if y is None else y.requires_grad_() for y in layer(CPU, 5, 4, 7, bias=bias))
    indices = targets_of(CPU, 5, 7)
    forward, backward = (
        torch.ops.fastformer.linear_cross_entropy_forward,
        torch.ops.fastformer.linear_cross_entropy_backward,
    )
    shares = torch.rand(5)
    for row_weight, save_grads in ((None, False), (shares, False), (shares, True)):
        torch.library.opcheck(forward, (x, w, b, indices, row_weight, -100, 0.1, save_grads))
    x, w, b = (None if y is None else y.detach() for y in (x, w, b))
    torch.library.opcheck(backward, (shares, x, w, b, indices, torch.rand(5), -100, 0.1))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck_and_double_backward(reduction: str) -> None:
    inputs = [y.double().requires_grad_() for y in layer(CPU, 4, 3, 5, bias=True)]
    ours = loss(targets_of(CPU, 4, 5), reduction=reduction, label_smoothing=0.1)
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


@needs_library
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_double_backward_of_the_kernel(reduction: str) -> None:
    inputs = [y.requires_grad_() for y in layer(CPU, 5, 4, 7, bias=True)]
    ours = loss(targets_of(CPU, 5, 7), reduction=reduction, label_smoothing=0.1)

    def penalty(backend: str) -> tuple[Tensor, ...]:
        with fastformer.backend(backend):
            grads = torch.autograd.grad(ours(*inputs).square().sum(), inputs, create_graph=True)
            return torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    torch.testing.assert_close(penalty("cpu"), penalty("torch"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    def total(x: Tensor, w: Tensor, indices: Tensor) -> Tensor:
        each = F.linear_cross_entropy(x, w, indices, reduction="none")
        return F.linear_cross_entropy(x * 2, w, indices) + each.square().sum()

    compiled = torch.compile(total, fullgraph=True, dynamic=dynamic)
    for rows in (3, 5, 6):
        x, w, _ = (y if y is None else y.requires_grad_() for y in layer(CPU, rows, 4, 7))
        indices = targets_of(CPU, rows, 7)
        y, expected = compiled(x, w, indices), total(x, w, indices)
        torch.testing.assert_close(y, expected)
        mine, theirs = (torch.autograd.grad(z, (x, w)) for z in (y, expected))
        torch.testing.assert_close(mine, theirs)


def test_autocast_gives_the_dtypes_that_torch_gives() -> None:
    inputs, indices = layer(CPU, 9, 16, 30, bias=True), targets_of(CPU, 9, 30)
    for reduction in ("none", "mean"):
        results = {}
        for backend in ("cpu", "torch"):
            leaves = [x.detach().requires_grad_() for x in inputs]
            with fastformer.backend(backend), torch.autocast("cpu", torch.bfloat16):
                y = loss(indices, reduction=reduction)(*leaves)
            results[backend] = (y, *torch.autograd.grad(y.square().sum(), leaves))
        assert results["cpu"][0].dtype == torch.float32
        for mine, theirs in zip(results["cpu"], results["torch"]):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05 * theirs.detach().abs().max().item())


def test_torch_func() -> None:
    x, w, _ = layer(CPU, 6, 4, 5)
    indices = targets_of(CPU, 6, 5)
    ours = torch.func.grad(lambda w: F.linear_cross_entropy(x, w, indices))(w)
    theirs = torch.func.grad(lambda w: torch_functional.cross_entropy(x @ w.T, indices))(w)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "input is a list", {"input": [1.0]}),
        (ValueError, r"linear_weight has shape \(5, 3\), must be .* C = 4", {"linear_weight": torch.ones(5, 3)}),
        (ValueError, "linear_weight has dtype torch.float16", {"linear_weight": torch.ones(5, 4).half()}),
        (ValueError, r"target has shape \(2,\), must be \(3,\)", {"target": torch.ones(2, dtype=torch.long)}),
        (TypeError, "target has dtype torch.int32", {"target": torch.ones(3, dtype=torch.int32)}),
        (ValueError, r"linear_bias has shape \(4,\), must be \(5,\)", {"linear_bias": torch.ones(4)}),
        (ValueError, r"weight has shape \(4,\), must be \(5,\)", {"weight": torch.ones(4)}),
        (ValueError, "reduction is 'max', must be one of none", {"reduction": "max"}),
        (ValueError, "label_smoothing is 1.5, must be in", {"label_smoothing": 1.5}),
        (ValueError, "label_smoothing is nan, must be in", {"label_smoothing": math.nan}),
        (ValueError, "ignore_index is 1, must be None", {"target": torch.rand(3, 5), "ignore_index": 1}),
        ((IndexError, RuntimeError), r"target\[1\] is 7, which is out of bounds", {"target": torch.tensor([1, 7, 0])}),
        ((IndexError, RuntimeError), r"target\[0\] is -1, which is out", {"target": torch.tensor([-1, 1, 0])}),
        (IndexError, r"target\[2\] is 5, which is out", {"target": torch.tensor([1, 1, 5]), "weight": torch.ones(5)}),
    ],
)  # fmt: skip
@needs_library
def test_errors(error: type, words: str, changes: dict) -> None:
    arguments = {"input": torch.ones(3, 4), "linear_weight": torch.ones(5, 4), "target": torch.tensor([0, 1, 2])}
    with fastformer.backend("cpu"), pytest.raises(error, match=words):
        F.linear_cross_entropy(**(arguments | changes))


@pytest.mark.parametrize("target", EXACT_LOGITS, ids=str)
@pytest.mark.parametrize("logit", [20.0, 100.0, 2000.0])
def test_confident_rows_have_small_gradients(target: Target, logit: float) -> None:
    """Probabilities come from logits that are as exact as the log-sum-exp, whatever their size."""
    weight = torch_functional.normalize(torch.randn(504, 64), dim=1).bfloat16().to(target.device)
    indices = torch.arange(100, device=target.device)
    input = (logit * weight[:100].double()).bfloat16().requires_grad_()
    with fastformer.backend(target.backend):
        F.linear_cross_entropy(input, weight, indices, reduction="sum").backward()
    exact = input.detach().double().requires_grad_()
    torch_functional.cross_entropy(exact @ weight.double().T, indices, reduction="sum").backward()
    assert (input.grad - exact.grad).abs().max() <= 0.01 * exact.grad.abs().max() + 1e-6


def test_the_operator_on_no_rows() -> None:
    x, w, y = torch.empty(0, 4), torch.randn(7, 4), torch.empty(0, dtype=torch.int64)
    operator = torch.ops.fastformer.linear_cross_entropy_forward
    loss, lse, grad_input, grad_weight, _ = operator(x, w, None, y, torch.empty(0), -100, 0.0, True)
    assert loss == 0 and lse.shape == (0,) and grad_input.shape == x.shape
    assert grad_weight.shape == w.shape and (grad_weight == 0).all()
