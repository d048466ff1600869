"""attention_forward and attention_backward as operators: registration, compilation, transforms, and errors."""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import needs_library
from torch import Tensor

import fastformer
import fastformer.functional as F
from fastformer import backends


def test_opcheck() -> None:
    query, key = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 1, 7, 8, requires_grad=True)
    value, mask = torch.randn(1, 1, 7, 6, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    slopes, sinks = torch.rand(2), torch.randn(2, requires_grad=True)
    forward, backward = torch.ops.fastformer.attention_forward, torch.ops.fastformer.attention_backward
    features = {
        "softcap": 2.0,
        "window_left": 3,
        "window_right": 1,
        "alibi_slopes": slopes,
        "sinks": sinks,
        "dropout_p": 0.2,
        "dropout_state": torch.tensor([5, 7]),
    }
    torch.library.opcheck(forward, (query, key, value, None, 0.3, True, False))
    torch.library.opcheck(forward, (query, key, value, mask, 0.3, False, True), features)
    tensors = [x.detach() for x in (query, key, value, mask)]
    features["sinks"] = sinks.detach()
    output, lse = forward(*tensors, 0.3, False, True, **features)
    softcap = features.pop("softcap")
    grads = torch.randn(1, 2, 5, 6), torch.randn(1, 2, 5)
    torch.library.opcheck(backward, (*grads, *tensors, output, lse, 0.3, False, True, softcap, True), features)
    output, lse = forward(*tensors[:3], None, 0.3, True, False)
    torch.library.opcheck(backward, (grads[0], None, *tensors[:3], None, output, lse, 0.3, True, False, None, False))


def test_opcheck_of_packed_sequences() -> None:
    query, key, value = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    ends = torch.tensor([0, 4, 4, 8], dtype=torch.int32)
    sequences = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 4, "max_seqlen_k": 4}
    forward, backward = torch.ops.fastformer.attention_forward, torch.ops.fastformer.attention_backward
    torch.library.opcheck(forward, (query, key, value, None, 0.3, True, True), sequences)
    tensors = [x.detach() for x in (query, key, value)]
    output, lse = forward(*tensors, None, 0.3, True, True, **sequences)
    grads = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9)
    torch.library.opcheck(backward, (*grads, *tensors, None, output, lse, 0.3, True, True, None, False), sequences)


@pytest.mark.parametrize("needs_grad_mask", [False, True])
def test_what_is_not_asked_for_has_no_elements(needs_grad_mask: bool) -> None:
    x, mask, lse = torch.randn(1, 2, 5, 8), torch.randn(5, 5), torch.zeros(1, 2, 5)
    grads = torch.ops.fastformer.attention_backward(
        x, None, x, x, x, mask, x, lse, 0.3, False, False, None, needs_grad_mask
    )
    assert grads[3].shape == ((1, 2, 5, 5) if needs_grad_mask else (0,)) and grads[4].shape == (0,)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    def sdpa(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x * 2, x, x, is_causal=True)

    compiled = torch.compile(sdpa, fullgraph=True, dynamic=dynamic)
    for length in (5, 9, 6):
        check_compiled(compiled, sdpa, torch.randn(2, 2, length, 8, requires_grad=True))


def test_compile_with_every_feature() -> None:
    slopes, sinks = torch.rand(2), torch.randn(2)

    def sdpa(x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril(2)
        options = {"window": (4, 1), "softcap": 3.0, "alibi_slopes": slopes, "sinks": sinks}
        output, lse = F.scaled_dot_product_attention(
            x * 2, x, x, mask, causal_alignment="bottom_right", return_lse=True, **options
        )
        return output + lse.unsqueeze(-1)

    compiled = torch.compile(sdpa, fullgraph=True, dynamic=True)
    for length in (5, 9):
        check_compiled(compiled, sdpa, torch.randn(2, 2, length, 8, requires_grad=True))


def test_compiled_dropout_is_drawn_anew_by_each_call() -> None:
    x = torch.ones(1, 2, 16, 8)
    compiled = torch.compile(
        lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5, window=(4, 4)), fullgraph=True
    )
    first, second = compiled(), compiled()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    third = compiled()
    torch.manual_seed(3)
    assert torch.equal(compiled(), third)


def check_compiled(compiled: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], x: Tensor) -> None:
    y = compiled(x)
    torch.testing.assert_close(y, eager(x))
    (mine,) = torch.autograd.grad(y.square().sum(), x)
    (theirs,) = torch.autograd.grad(eager(x).square().sum(), x)
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
        F.scaled_dot_product_attention(query, key, value).sum().backward()


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
