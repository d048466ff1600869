import pytest
import torch
from cuda_support import KERNEL_TARGETS, on_kernels, on_targets
from hypothesis import given
from hypothesis import strategies as st
from support import LAYOUTS, Target, awkward, check, laid_out, tensor
from torch import Tensor

import fastformer
import fastformer.functional as F
from fastformer import reference


def angles(target: Target, *shape: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(*shape, device=target.device) * 6
    return angle.cos(), angle.sin()


def check_rotary(target: Target, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    def ours(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return F.rotary(query, key, cos, sin, interleaved=interleaved)

    def exact(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return reference.rotary(query, key, cos, sin, interleaved=interleaved)

    check(target, ours, ours, exact, [query, key])


# B, H, G, S, D, R
SIZES = [
    (1, 1, 1, 1, 2, 1),
    (2, 3, 1, 5, 10, 5),
    (2, 4, 2, 7, 64, 32),
    (1, 2, 2, 9, 41, 17),
    (2, 1, 1, 3, 16, 0),
    (1, 9, 2, 2, 2080, 1040),
]


@on_targets
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_shapes(target: Target, sizes: tuple[int, ...], interleaved: bool) -> None:
    B, H, G, S, D, R = sizes
    query, key = tensor(target, B, H, S, D), tensor(target, B, G, S, D)
    check_rotary(target, query, key, *angles(target, S, R), interleaved)
    check_rotary(target, query, key, *angles(target, B, S, R), interleaved)


@on_kernels
@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts(target: Target, interleaved: bool) -> None:
    cos, sin = angles(target, 5, 4)
    query = tensor(target, 2, 5, 3, 8).transpose(1, 2)
    check_rotary(target, query, awkward(target, 2, 2, 5, 8), cos, sin, interleaved)
    check_rotary(
        target, tensor(target, 1, 3, 5, 8).expand(2, 3, 5, 8), query, cos.t().contiguous().t(), sin, interleaved
    )
    with fastformer.backend(target.backend):
        turned, _ = F.rotary(query, query, cos, sin, interleaved=interleaved)
    assert turned.transpose(1, 2).is_contiguous()


@on_kernels
@pytest.mark.parametrize("R", [3, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_in_the_dtype_of_query(target: Target, R: int, interleaved: bool) -> None:
    cos, sin = (x.to(target.dtype) for x in angles(target, 5, R))
    check_rotary(target, tensor(target, 1, 2, 5, 2 * R), tensor(target, 1, 2, 5, 2 * R), cos, sin, interleaved)


@on_kernels
@pytest.mark.parametrize(("B", "H", "S", "D"), [(0, 2, 3, 4), (2, 2, 0, 4), (2, 0, 3, 4)])
def test_empty(target: Target, B: int, H: int, S: int, D: int) -> None:
    query = tensor(target, B, H, S, D).requires_grad_()
    with fastformer.backend(target.backend):
        turned, _ = F.rotary(query, tensor(target, B, 1, S, D), *angles(target, S, 2))
        turned.sum().backward()
    assert turned.shape == query.grad.shape == query.shape


@given(
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    S=st.integers(1, 6),
    R=st.integers(0, 40),
    rest=st.integers(0, 5),
    interleaved=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    target=st.sampled_from(KERNEL_TARGETS),
)
def test_any_shape(B: int, H: int, S: int, R: int, rest: int, interleaved: bool, layout: str, target: Target) -> None:
    D = max(2 * R + rest, 1)
    query = laid_out(target, layout, B, H, S, D)
    check_rotary(target, query, tensor(target, B, 1, S, D), *angles(target, S, R), interleaved)


@on_kernels
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(target: Target, interleaved: bool) -> None:
    S, R = 6, 8
    angle = torch.arange(S)[:, None] * 0.3 ** torch.arange(R)
    query, key = tensor(target, 1, 1, 1, 2 * R).expand(1, 1, S, -1), tensor(target, 1, 1, 1, 2 * R).expand(1, 1, S, -1)
    cos, sin = angle.cos().to(target.device), angle.sin().to(target.device)
    with fastformer.backend(target.backend):
        turned_query, turned_key = F.rotary(query, key, cos, sin, interleaved=interleaved)
    scores = (turned_query.double() @ turned_key.double().mT)[0, 0]
    tolerance = 30 * torch.finfo(target.dtype).eps
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=0, atol=tolerance)


def test_opcheck() -> None:
    query, key = torch.randn(2, 3, 5, 9, requires_grad=True), torch.randn(2, 1, 5, 9, requires_grad=True)
    cos, sin = torch.randn(5, 4), torch.randn(5, 4)
    for interleaved in (False, True):
        torch.library.opcheck(torch.ops.fastformer.rotary_forward, (query, key, cos, sin, interleaved))
        torch.library.opcheck(torch.ops.fastformer.rotary_backward, (query, key, cos, sin, interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck_and_double_backward(interleaved: bool) -> None:
    inputs = [torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((1, 2, 3, 6), (1, 1, 3, 6))]
    inputs += [torch.randn(3, 2, dtype=torch.double, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *x: F.rotary(*x, interleaved=interleaved), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: F.rotary(*x, interleaved=interleaved), inputs)


def test_double_backward_of_the_kernel() -> None:
    def penalty(backend: str, query: Tensor) -> Tensor:
        with fastformer.backend(backend):
            turned, _ = F.rotary(query, key, cos, sin)
            (grad,) = torch.autograd.grad(turned.pow(3).sum(), query, create_graph=True)
            return torch.autograd.grad(grad.square().sum(), query)[0]

    query, key = torch.randn(1, 2, 3, 6, requires_grad=True), torch.randn(1, 1, 3, 6)
    cos, sin = torch.randn(3, 2), torch.randn(3, 2)
    torch.testing.assert_close(penalty("cpu", query), penalty("torch", query))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    def scores(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key = F.rotary(query * 2, key, cos, sin)
        return query @ key.mT

    compiled = torch.compile(scores, fullgraph=True, dynamic=dynamic)
    for length in (3, 5, 6):
        query, key = torch.randn(2, 3, length, 8, requires_grad=True), torch.randn(2, 3, length, 8)
        cos, sin = torch.randn(length, 4), torch.randn(length, 4)
        y, expected = compiled(query, key, cos, sin), scores(query, key, cos, sin)
        torch.testing.assert_close(y, expected)
        mine, theirs = (torch.autograd.grad(z.square().sum(), query)[0] for z in (y, expected))
        torch.testing.assert_close(mine, theirs)


def test_torch_func() -> None:
    query, cos, sin = torch.randn(4, 1, 2, 3, 8), torch.randn(3, 4), torch.randn(3, 4)

    def turned(query: Tensor) -> Tensor:
        return F.rotary(query, query, cos, sin)[0]

    expected = torch.stack([turned(x) for x in query])
    torch.testing.assert_close(torch.func.vmap(turned)(query), expected)
    raw = torch.func.vmap(lambda x: torch.ops.fastformer.rotary_forward(x, x, cos, sin, False)[0])(query)
    torch.testing.assert_close(raw, expected)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "query is a list", {"query": [1.0]}),
        (ValueError, r"query has shape \(3, 4\), must be \[batch", {"query": torch.ones(3, 4)}),
        (ValueError, r"key has shape \(2, 1, 4, 8\), must be \(2, 1, 5, 8\)", {"key": torch.ones(2, 1, 4, 8)}),
        (ValueError, "key has dtype torch.float16", {"key": torch.ones(2, 1, 5, 8).half()}),
        (ValueError, r"cos has shape \(4, 4\), must be \[5, R\]", {"cos": torch.ones(4, 4)}),
        (ValueError, "cos has 5 columns, must have at most half", {"cos": torch.ones(5, 5)}),
        (ValueError, r"sin has shape \(5, 3\), must be \(5, 4\)", {"sin": torch.ones(5, 3)}),
        (ValueError, "cos has dtype torch.float16", {"cos": torch.ones(5, 4).half()}),
    ],
)
def test_errors(error: type, words: str, changes: dict) -> None:
    arguments = {"query": torch.ones(2, 3, 5, 8), "key": torch.ones(2, 1, 5, 8)}
    arguments |= {"cos": torch.ones(5, 4), "sin": torch.ones(5, 4)} | changes
    with pytest.raises(error, match=words):
        F.rotary(**arguments)
