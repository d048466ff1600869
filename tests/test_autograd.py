"""The functions under the rarer ways of autograd, and of calling them at all."""

import sys
import threading
from collections.abc import Callable

import pytest
import torch
from support import KERNEL, needs_library
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fastformer
import fastformer.functional as F
from fastformer import backends
from fastformer.ops import _common

C = 16


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5)


def attend_to_itself(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def tied_loss(weight: Tensor) -> Tensor:
    return F.linear_cross_entropy(0.2 * weight[:4], weight, torch.arange(4))


def tied_feed_forward(weight: Tensor) -> Tensor:
    return F.feed_forward(weight[:3], weight, None, weight.t(), None)


def multiplied_by_itself(weight: Tensor) -> Tensor:
    return F.linear(weight[:3], weight, weight[:, 0])


def normed_twice(x: Tensor) -> Tensor:
    return F.rms_norm(F.rms_norm(x, (C,), x[0]), (C,), x[0])


TIED = [attend_to_itself, tied_loss, tied_feed_forward, multiplied_by_itself, normed_twice]


@pytest.mark.parametrize("function", TIED)
def test_gradients_of_gradients_of_inputs_that_come_from_one_another(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 4, 8, C) if function is attend_to_itself else torch.randn(11, C)

    def grads(x: Tensor, backend: str) -> list[Tensor]:
        x = x.requires_grad_()
        with fastformer.backend(backend):
            loss = function(x).square().sum()
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            (plain,) = torch.autograd.grad(function(x).square().sum(), x)
            (second,) = torch.autograd.grad(first.square().sum(), x)
        return [first, plain, second]

    for mine, exact in zip(grads(x.clone(), KERNEL), grads(x.double(), "reference"), strict=True):
        close(mine / exact.abs().max(), exact / exact.abs().max())


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_gradients_of_gradients_of_some_inputs(wanted: tuple[int, ...]) -> None:
    inputs = [torch.randn(1, 2, 5, 8, requires_grad=i in wanted) for i in range(3)]

    def grads(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        output, lse = F.scaled_dot_product_attention(*inputs, return_lse=True)
        loss = (output * lse.unsqueeze(-1)).sum() + lse.sum()
        return torch.autograd.grad(loss, [inputs[i] for i in wanted], create_graph=True)

    with fastformer.backend(KERNEL):
        mine = grads(inputs)
    exact = grads([x.detach().double().requires_grad_(x.requires_grad) for x in inputs])
    for a, b in zip(mine, exact, strict=True):
        close(a, b)


FUNCTIONS = [
    lambda x: F.softmax(x, -1),
    lambda x: F.rms_norm(x, (C,)),
    lambda x: F.layer_norm(x, (C,)),
    lambda x: F.linear(x, torch.linspace(-1, 1, 4 * C).view(4, C).to(x), torch.ones(4).to(x)),
    lambda x: F.feed_forward(x, torch.ones(4, C).to(x), None, torch.ones(C, 4).to(x), None),
    lambda x: F.rotary(x[None, None], x[None, None], torch.ones(4, 8), torch.ones(4, 8))[0],
    lambda x: F.linear_cross_entropy(x, torch.eye(C).to(x), torch.arange(4)),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_mode_runs_torchs_own(function: Callable[[Tensor], Tensor]) -> None:
    x, direction = torch.randn(4, C), torch.randn(4, C)
    step = 1e-5 * direction.double()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x.double(), direction.double()))).tangent
        single = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent
    close(single, tangent)
    with torch.no_grad():
        close(tangent, (function(x.double() + step) - function(x.double() - step)) / 2e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_batched_gradients_and_traced_graphs(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, C, requires_grad=True)
    with fastformer.backend(KERNEL):
        y = function(x)
        cotangents = torch.randn(3, *y.shape)
        (batched,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, retain_graph=True)
        close(batched, torch.stack([torch.autograd.grad(y, x, c, retain_graph=True)[0] for c in cotangents]))
        expected = torch.autograd.grad(y, x, cotangents[0])[0]

    def gradient(x: Tensor, cotangent: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x, cotangent)[0]

    for mode in ("real", "symbolic"):
        graph = make_fx(gradient, tracing_mode=mode)(x, cotangents[0])
        close(graph(x.detach(), cotangents[0]), expected)
    close(function(x), y)  # what was traced leaves nothing behind


@needs_library
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_devices_are_checked(backend: str) -> None:
    x, meta = torch.randn(1, 2, 4, C), torch.randn(C, device="meta")
    angles = torch.randn(4, 8)
    with fastformer.backend(backend):
        for name, call in {
            "weight": lambda: F.rms_norm(x, (C,), meta),
            "bias": lambda: F.layer_norm(x, (C,), torch.ones(C), meta),
            "residual": lambda: F.add_layer_norm(x, x.to("meta"), (C,)),
            "key": lambda: F.rotary(x, x.to("meta"), angles, angles),
            "cos": lambda: F.rotary(x, x, angles.to("meta"), angles.to("meta")),
            "value": lambda: F.scaled_dot_product_attention(x, x, x.to("meta")),
            "attn_mask": lambda: F.scaled_dot_product_attention(x, x, x, torch.ones(4, 4, device="meta").bool()),
            "weight2": lambda: F.feed_forward(x, torch.eye(C), None, torch.eye(C, device="meta"), None),
        }.items():
            with pytest.raises(ValueError, match=f"{name} is on meta"):
                call()


def test_backward_in_threads_leaves_the_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_common, "_KERNELS", {})  # as for users: kernels to choose from need the request in backward
    with fastformer.backend(KERNEL):
        outputs = [F.softmax(torch.randn(64, 64, requires_grad=True), -1) for _ in range(400)]
    before, interval = backends.requested(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda part: [y.sum().backward() for y in part], args=(outputs[i::4],))
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert backends.requested() == before


def test_explain_checks_as_the_call_does() -> None:
    x = torch.randn(4, C)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\)"):
        fastformer.explain(F.rms_norm, x, (C,), torch.randn(3))
    assert "torch (our kernels don't have a kernel for torch.float64)" in fastformer.explain(
        F.rms_norm, x, (C,), torch.randn(C).double()
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: F.rms_norm(x.to(torch.complex64), (C,)), TypeError, "input has dtype torch.complex64"),
        (lambda x: F.rms_norm(x.double(), (C,), torch.ones(C).long()), TypeError, "weight has dtype torch.int64"),
        (lambda x: F.layer_norm(x, (C,), eps="1e-5"), TypeError, "eps is a str, must be a number"),
        (lambda x: F.softmax(x, -1, scale="2"), TypeError, "scale is a str, must be a number"),
    ],
)
def test_errors_of_the_quick_way(call: Callable[[Tensor], Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(torch.randn(4, C))


@needs_library
@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_results_may_be_changed_in_place(function: Callable[[Tensor], Tensor]) -> None:
    """Where torch's may: backward of these doesn't need its result."""
    x = torch.randn(4, C, requires_grad=True)
    with fastformer.backend("cpu"):
        y = function(x)
        assert not y._is_view()
        y *= 2
        close(torch.autograd.grad(y.sum(), x)[0], 2 * torch.autograd.grad(function(x).sum(), x)[0])
