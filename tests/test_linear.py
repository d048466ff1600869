from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from hypothesis import given
from hypothesis import strategies as st
from support import (
    KERNEL,
    KERNEL_TARGETS,
    LAYOUTS,
    TARGETS,
    Target,
    awkward,
    check,
    laid_out,
    needs_library,
    tensor,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fastformer
import fastformer.functional as F
from fastformer import backends, nn, reference
from fastformer.ops import linear as linear_operation

# There is no Triton kernel.
on_targets = pytest.mark.parametrize("target", [t for t in TARGETS if t.backend != "triton"], ids=str)
KERNELS = [t for t in KERNEL_TARGETS if t.backend != "triton"]
on_kernels = pytest.mark.parametrize("target", KERNELS, ids=str)


@pytest.fixture
def ours_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` leaves nothing to torch's function for its size."""
    forms = [(form, dtype) for form in ("linear", "linear_few_rows") for dtype in backends.KERNEL_DTYPES]
    measured = {key: backends.Measurement(key[0], (), (key[1],), "2x") for key in forms}
    monkeypatch.setattr(linear_operation, "_SMALL", {})
    monkeypatch.setattr(backends, "FASTER", measured)
    monkeypatch.setattr(backends, "_decided", {})


def check_linear(target: Target, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    def sums(cotangents: list[Tensor]) -> dict[int, Tensor]:
        return {} if bias is None or not bias.numel() else {2: cotangents[0].flatten(0, -2).abs().sum(0).max()}

    check(target, F.linear, torch_functional.linear, reference.linear, [input, weight, bias], sums=sums)


# rows, columns of the weight, rows of the weight: fewer rows than the kernel for few rows takes, more, and around
# the edges of its tiles, groups and depths.
SIZES = [
    (1, 1, 1),
    (1, 5, 3),
    (1, 2049, 100),
    (1, 4097, 9),
    (2, 33, 48),
    (3, 64, 49),
    (4, 31, 47),
    (5, 100, 96),
    (6, 17, 95),
    (7, 1030, 21),
    (8, 768, 51),
    (9, 40, 24),
    (16, 130, 8),
    (17, 66, 50),
    (32, 65, 31),
    (33, 64, 64),
    (70, 31, 130),
]


@on_targets
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_shapes(target: Target, sizes: tuple[int, int, int], has_bias: bool) -> None:
    rows, cols, outputs = sizes
    bias = tensor(target, outputs) if has_bias else None
    check_linear(target, tensor(target, rows, cols), tensor(target, outputs, cols), bias)


@on_targets
@pytest.mark.parametrize("shape", [(2, 3), (40, 2), (2, 2, 10), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("cols", [24, 0])
def test_leading_dimensions_and_empty_ones(target: Target, shape: tuple[int, ...], cols: int) -> None:
    check_linear(target, tensor(target, *shape, cols), tensor(target, 7, cols), tensor(target, 7))


@on_targets
def test_a_vector_and_no_outputs(target: Target) -> None:
    input, weight = tensor(target, 24), tensor(target, 7, 24)
    check(target, F.linear, torch_functional.linear, reference.linear, [input, weight, tensor(target, 7)])
    check_linear(target, tensor(target, 3, 24), tensor(target, 0, 24), tensor(target, 0))


@on_kernels
@pytest.mark.parametrize("rows", [3, 50])
def test_layouts(target: Target, rows: int) -> None:
    bias = awkward(target, 40)
    for input in (awkward(target, rows, 40), tensor(target, 40, rows).t(), tensor(target, 1, 40).expand(rows, 40)):
        for weight in (
            tensor(target, 40, 40),
            tensor(target, 40, 40).t(),
            awkward(target, 40, 40),
            tensor(target, 80, 60)[3:43, 7:47],
            tensor(target, 1, 40).expand(40, 40),
        ):
            check_linear(target, input, weight, bias)


@given(
    batch=st.integers(0, 3),
    length=st.integers(1, 20),
    cols=st.integers(1, 70),
    outputs=st.integers(1, 70),
    input_layout=st.sampled_from(LAYOUTS),
    weight_layout=st.sampled_from(LAYOUTS),
    target=st.sampled_from(KERNELS) if KERNELS else st.nothing(),
)
def test_any_shape(
    batch: int, length: int, cols: int, outputs: int, input_layout: str, weight_layout: str, target: Target
) -> None:
    input = laid_out(target, input_layout if batch else "contiguous", batch, length, cols)
    check_linear(target, input, laid_out(target, weight_layout, outputs, cols), tensor(target, outputs))


@on_kernels
def test_long_sums_lose_no_more_than_short_ones(target: Target) -> None:
    """All of one sign, so that a single chain of additions would drift."""
    for rows in (1, 8):
        input, weight = tensor(target, rows, 50000).abs(), tensor(target, 10, 50000).abs()
        check(target, F.linear, torch_functional.linear, reference.linear, [input, weight, None], grad=False)


@on_kernels
def test_what_is_not_finite_goes_where_torchs_goes(target: Target) -> None:
    input, weight = tensor(target, 3, 50), tensor(target, 20, 50)
    input[0, 3], input[1, 4], weight[7, 5] = float("inf"), float("nan"), float("-inf")
    with fastformer.backend(target.backend):
        output = F.linear(input, weight)
    expected = torch_functional.linear(input.double(), weight.double())
    assert torch.equal(output.isnan(), expected.isnan()) and torch.equal(output.isinf(), expected.isinf())


@needs_library
def test_threads_change_nothing() -> None:
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        input, weight = torch.randn(3, 700).to(dtype), torch.randn(1000, 700).to(dtype)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with fastformer.backend("cpu"):
                results.append(F.linear(input, weight))
        torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_opcheck() -> None:
    input, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 9), (5, 9), (5,)))
    grad = torch.randn(2, 3, 5)
    for few in (input, input.detach().repeat(10, 1, 1).requires_grad_()):
        torch.library.opcheck(torch.ops.fastformer.linear_forward, (few, weight, bias))
        torch.library.opcheck(torch.ops.fastformer.linear_forward, (few, weight, None))
    for arguments in ((input, weight, True), (None, weight, False), (input, None, False), (None, None, True)):
        detached = (None if x is None else x.detach() for x in arguments[:2])
        torch.library.opcheck(torch.ops.fastformer.linear_backward, (grad, *detached, arguments[2]))


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradcheck_and_double_backward(has_bias: bool) -> None:
    shapes = ((2, 3, 6), (4, 6), *([(4,)] if has_bias else []))
    inputs = [torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(F.linear, inputs)
    assert torch.autograd.gradgradcheck(F.linear, inputs)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 20, 6)], ids=str)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_gradients_of_what_needs_one(shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    values = [torch.randn(shape), torch.randn(5, 6), torch.randn(5)]

    def derivatives(backend: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(values)]
        needed = [leaves[i] for i in wanted]
        with fastformer.backend(backend):
            first = torch.autograd.grad(F.linear(*leaves).pow(3).sum(), needed)
            again = torch.autograd.grad(F.linear(*leaves).pow(3).sum(), needed, create_graph=True)
            second = torch.autograd.grad(sum(x.square().sum() for x in again), needed)
        return [*first, *again, *second]

    for mine, theirs in zip(derivatives(KERNEL), derivatives("torch"), strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(mine / scale, theirs / scale, rtol=1e-4, atol=1e-5)


@needs_library
def test_only_what_backward_needs_is_kept() -> None:
    """As by torch: a frozen weight needs no input."""
    input, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with fastformer.backend("cpu"), hooks:
        F.linear(input, weight)
        assert [x.shape for x in kept] == [weight.shape]
        kept.clear()
        F.linear(input.detach(), weight.requires_grad_())
        assert [x.shape for x in kept] == [input.shape]


@pytest.mark.parametrize("backend", ["auto", KERNEL])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    weight, bias = torch.randn(300, 70, requires_grad=True), torch.randn(300)
    compiled = torch.compile(lambda x: F.linear(x * 2, weight, bias), fullgraph=True, dynamic=dynamic, backend=counter)
    lengths = (3, 20, 40, 50)  # few rows and many
    with fastformer.backend(backend):
        for length in lengths:
            x = torch.randn(length, 70, requires_grad=True)
            y, expected = compiled(x), torch_functional.linear(x * 2, weight, bias)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            mine, theirs = (torch.autograd.grad(z.square().sum(), (x, weight)) for z in (y, expected))
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
    assert not dynamic or counter.frame_count == 1


def test_export_with_any_number_of_rows() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(70, 300)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    model = Model()
    program = torch.export.export(model, (torch.randn(5, 70),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    for rows in (2, 40):
        x = torch.randn(rows, 70)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("ours_at_any_size")
@pytest.mark.parametrize("backend", ["auto", KERNEL])
def test_autocast(backend: str) -> None:
    layer = nn.Linear(40, 30)
    x = torch.randn(3, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16), fastformer.backend(backend):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), torch_functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0.05)
    assert layer.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in fastformer.explain(F.linear, x, layer.weight)


class Doubled(Tensor):
    """Has its own linear."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * result if function is torch_functional.linear else result


@pytest.mark.usefixtures("ours_at_any_size")
@pytest.mark.parametrize("rows", [3, 100])
def test_a_class_with_its_own_linear(rows: int) -> None:
    x, weight = torch.randn(rows, 8), torch.randn(8, 8)
    torch.testing.assert_close(F.linear(x, weight.as_subclass(Doubled)).as_subclass(Tensor), 2 * F.linear(x, weight))


@pytest.mark.usefixtures("ours_at_any_size")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_torchs_own_cases(backend: str) -> None:
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    cases = [
        (x, weight[0], None),  # a weight that is a vector
        (x, weight, torch.randn(1)),  # a bias for all
        (x, weight, torch.randn(4, 5)),  # one for each element
        (x.double(), weight.double(), None),
        (x.to(torch.int64), weight.to(torch.int64), None),
        (x.to(torch.complex64), weight.to(torch.complex64), None),
        (x, weight.to_sparse(), None),
        (torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged), weight, None),
    ]
    for arguments in cases:
        with fastformer.backend(backend):
            ours, theirs = F.linear(*arguments), torch_functional.linear(*arguments)
        if ours.is_nested:
            ours, theirs = ours.values(), theirs.values()
        torch.testing.assert_close(ours, theirs)
    assert fastformer.explain(F.linear, x, weight.double().float(), torch.randn(1)).startswith("linear: torch")


@pytest.mark.usefixtures("ours_at_any_size")
def test_torch_func_and_forward_mode() -> None:
    x, weight = torch.randn(3, 4, 6), torch.randn(5, 6)
    expected = torch_functional.linear(x, weight)
    torch.testing.assert_close(torch.func.vmap(lambda x: F.linear(x, weight))(x), expected)
    raw = torch.func.vmap(lambda x: torch.ops.fastformer.linear_forward(x, weight, None))(x)
    torch.testing.assert_close(raw, expected)
    grad = torch.func.grad(lambda x: F.linear(x, weight).sum())(x)
    torch.testing.assert_close(grad, weight.sum(0).expand_as(x))
    _, tangent = torch.func.jvp(lambda x: F.linear(x, weight), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch_functional.linear(torch.ones_like(x), weight))


@needs_library
def test_auto_knows_few_rows_from_many(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = backends.Measurement("linear_few_rows", (), (torch.bfloat16,), "3x", least=(1000, 2000))
    monkeypatch.setattr(backends, "FASTER", {("linear_few_rows", torch.bfloat16): measured})
    monkeypatch.setattr(backends, "_decided", {})
    weight = torch.randn(30, 40, dtype=torch.bfloat16)

    def chosen(rows: int, weight: Tensor) -> str:
        return fastformer.explain(F.linear, torch.randn(rows, 40, dtype=torch.bfloat16), weight).split()[1]

    assert [chosen(rows, weight) for rows in (0, 1, 32, 33)] == ["cpu", "cpu", "cpu", "torch"]
    assert chosen(1, weight[:20]) == chosen(1, weight.requires_grad_()) == "torch"
    assert chosen(1, torch.randn(40, 30, dtype=torch.bfloat16).t()) == "torch"


def test_the_module() -> None:
    torch.manual_seed(0)
    ours = nn.Linear(8, 4, bias=False)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(8, 4, bias=False)
    assert torch.equal(ours.weight, theirs.weight) and repr(ours) == repr(theirs)
    x = torch.randn(2, 8)
    with fastformer.backend(KERNEL):
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("backend", ["auto", KERNEL, "torch"])
@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "input is a list", {"input": [1.0]}),
        (TypeError, "weight is a float", {"weight": 1.0}),
        (TypeError, "bias is a float", {"bias": 1.0}),
        (ValueError, r"input has shape \(3, 4\), must end in 5, the columns of weight", {"input": torch.ones(3, 4)}),
        (ValueError, r"input has shape \(\), must end in 5", {"input": torch.ones(())}),
        (ValueError, "weight has dtype torch.float16, must be torch.float32", {"weight": torch.ones(7, 5).half()}),
        (ValueError, "weight is on meta", {"weight": torch.ones(7, 5, device="meta")}),
        (ValueError, r"bias has shape \(6,\), must be \(7,\)", {"bias": torch.ones(6)}),
        (ValueError, "bias has dtype torch.float16", {"bias": torch.ones(7).half()}),
    ],
)
def test_errors(backend: str, error: type, words: str, changes: dict) -> None:
    arguments = {"input": torch.ones(3, 5), "weight": torch.ones(7, 5), "bias": torch.ones(7)} | changes
    with pytest.raises(error, match=words), fastformer.backend(backend):
        F.linear(**arguments)
