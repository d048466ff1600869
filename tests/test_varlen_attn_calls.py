"""varlen_attn differentiated, compiled, explained, with nothing to do, and with arguments that don't fit."""

import inspect
import math
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from packed_support import LSE, Packed, Problem, on_fewer_targets
from support import KERNEL, KERNEL_TARGETS, Target, needs_library, on_kernels
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest

import fastformer
import fastformer.functional as F
from fastformer.ops import attention_torch
from fastformer.ops.attention_torch import Options

H, G, D = 4, 2, 8
CU = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
CU_K = torch.tensor([0, 5, 9, 12], dtype=torch.int32)


def tensors() -> list[Tensor]:
    """Of 3, 0 and 6 queries and 5, 4 and 3 keys."""
    shapes = ((9, H, D), (12, G, D), (12, G, 6))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


# --- autograd


@pytest.mark.parametrize("page_size", [0, 16])
@on_fewer_targets
def test_what_no_sequence_uses_gets_zeros(target: Target, page_size: int) -> None:
    """Exactly: outputs and gradients. It is NaN."""
    lengths = ((17, 20), (0, 0), (2, 0), (3, 40))
    problem = Problem(target, Packed(lengths, rest=4, room=5, page_size=page_size, window=(-1, 0)))
    leaves = [x.requires_grad_() for x in problem.inputs[:3]]
    with fastformer.backend(target.backend):
        output, lse = problem.varlen(*leaves, None)
        grad_query, grad_key, grad_value = torch.autograd.grad(output.sum() + lse.isfinite().sum(), leaves)
    assert not output[22:].any() and (lse[:, 22:] == -math.inf).all()
    assert not output[17:19].any() and (lse[:, 17:19] == -math.inf).all()  # queries without keys
    assert not grad_query[17:19].any() and not grad_query[22:].any() and grad_query[19:22].any()
    for x, grad in zip(leaves[1:], (grad_key, grad_value)):
        unused = problem.unused(x)
        assert not grad[unused].any() and grad[~unused].any(-1).all()
    with fastformer.backend(target.backend), torch.no_grad():
        again, again_lse = problem.varlen(*leaves, None)
    assert torch.equal(again.isnan(), output.isnan()) and torch.equal(again_lse.isinf(), lse.isinf())


def test_gradients_of_everything_that_is_no_index() -> None:
    cu_seq_q = torch.tensor([0, 2, 2, 4], dtype=torch.int32)
    cu_seq_k = torch.tensor([0, 3, 5, 6], dtype=torch.int32)
    shapes = {"query": (4, 2, 2), "key": (7, 1, 2), "value": (7, 1, 1), "sinks": (2,), "alibi_slopes": (3, 2)}
    inputs = [torch.rand(shape, dtype=torch.double, requires_grad=True) for shape in shapes.values()]

    def both(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        arrays = {"cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k, "max_q": 2, "max_k": 3, "enable_gqa": True}
        return F.varlen_attn(**dict(zip(shapes, inputs)), **arrays, window_size=(1, 1), softcap=2.0, return_aux=LSE)

    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)


@pytest.mark.parametrize("paged", [False, True], ids=["packed", "paged"])
@on_kernels
def test_double_backward(target: Target, paged: bool) -> None:
    problem = Problem(target, Packed(((17, 20), (4, 0), (3, 9)), sinks="learned", page_size=16 * paged, window=(12, 0)))

    def penalty(double: bool) -> tuple[Tensor, ...]:
        leaves = [(x.double() if double else x).detach().requires_grad_() for x in problem.inputs]
        output, lse = problem.varlen(*leaves)
        loss = output.square().sum() + lse[lse.isfinite()].sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    with fastformer.backend(target.backend):
        ours = penalty(False)
    tolerance = 2e-3 if target.dtype == torch.float32 else 5e-2
    for mine, exact in zip(ours, penalty(True), strict=True):
        scale = exact.abs().max().item()
        torch.testing.assert_close(mine.double() / scale, exact / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("count", [1, 4])
def test_pages_that_many_sequences_share(count: int) -> None:
    """Their gradients are added up in one order."""
    cu, used = torch.arange(65, dtype=torch.int32), torch.full((64,), 128, dtype=torch.int32)
    query, table = torch.randn(64, 2, 64), torch.zeros(64, 8, dtype=torch.int32)
    pool = [torch.randn(40, 16, 2, 64, requires_grad=True) for _ in range(2)]
    factors = torch.randn(64, 2, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        results = []
        for _ in range(3):
            output = F.varlen_attn(query, *pool, cu, None, 1, 128, seqused_k=used, block_table=table)
            results.append(torch.autograd.grad((output * factors).sum(), pool))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("target", [target for target in KERNEL_TARGETS if target.backend == "cpu"], ids=str)
def test_threads_change_nothing(target: Target) -> None:
    """Nor does a second run: outputs and gradients to the bit."""
    case = Packed(((130, 200), (1, 900), (300, 300), (3, 70)), sinks="learned", alibi=1, rest=2, window=(-1, 0))
    problem = Problem(target, case)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 1):
            torch.set_num_threads(count)
            leaves = [x.detach().requires_grad_() for x in problem.inputs]
            with fastformer.backend("cpu"):
                output, lse = problem.varlen(*leaves)
                loss = output.float().square().sum() + lse[lse.isfinite()].sum()
                results.append([output, lse, *torch.autograd.grad(loss, leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(results[0], other))


# --- compiled code, and what runs


@needs_library
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    def function(qkv: Tensor, cu: Tensor, sinks: Tensor, longest: int, window: int) -> Tensor:
        query, key, value = (2 * qkv).split((H, G, G), 1)
        options = {"window_size": (window, 0), "sinks": sinks, "enable_gqa": True}
        return F.varlen_attn(query, key, value, cu, cu, longest, longest, **options)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager" if dynamic else "inductor")
    sinks = torch.randn(H, requires_grad=True)
    for lengths in ((3, 0, 6), (4, 5, 1), (1, 8, 9))[: 3 if dynamic else 1]:
        qkv = torch.randn(sum(lengths) + 2, H + 2 * G, D, requires_grad=True)
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        results = []
        for call in (compiled, function):
            output = call(qkv, cu, sinks, max(lengths), 3)
            results.append([output, *torch.autograd.grad(output.square().sum(), (qkv, sinks))])
        torch.testing.assert_close(*results)


@needs_library
def test_compiled_decoding() -> None:
    """A growing cache in pages, without compiling again."""
    pool = [torch.randn(6, 16, G, D) for _ in range(2)]
    table = torch.randperm(6, dtype=torch.int32).view(2, 3)
    cu = torch.tensor([0, 1, 2], dtype=torch.int32)

    def function(query: Tensor, used: Tensor) -> Tensor:
        options = {"seqused_k": used, "block_table": table, "enable_gqa": True, "is_causal": True}
        return F.varlen_attn(query * 2, *pool, cu, None, 1, 48, **options)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(14, 19):
            query, used = torch.randn(2, H, D), torch.tensor([step, 3 * step - 20], dtype=torch.int32)
            torch.testing.assert_close(compiled(query, used), function(query, used))


def test_explain() -> None:
    def said(*inputs: Tensor, **options: Any) -> str:
        arguments = {"enable_gqa": True, **options}
        return fastformer.explain(F.varlen_attn, *inputs, CU, CU_K, 6, 5, **arguments)

    query, key, value = (x.detach() for x in tensors())
    if KERNEL == "cpu":
        assert said(query, key, value) == "varlen_attn: cpu (torch's own function has no packed sequences on cpu)"
    doubles = (x.double() for x in (query, key, value))
    assert said(*doubles) == "varlen_attn: torch (our kernels don't have a kernel for torch.float64)"
    slopes = torch.ones(H, requires_grad=True)
    assert said(query, key, value, alibi_slopes=slopes).endswith("don't have a gradient of alibi_slopes)")
    with fastformer.backend("reference"):
        assert said(query, key, value) == "varlen_attn: reference (requested)"


def test_nothing_to_do() -> None:
    """No sequences, no queries at all, no heads."""
    query, key, value = tensors()
    none = torch.zeros(1, dtype=torch.int32)
    output = F.varlen_attn(query, key, value, none, none, 0, 0, enable_gqa=True)
    assert output.shape == (9, H, 6) and not output.any()
    empty = F.varlen_attn(query[:0], key, value, CU * 0, CU_K, 0, 5, enable_gqa=True)
    assert empty.shape == (0, H, 6)
    gradients = torch.autograd.grad(output.sum() + empty.sum(), (query, key, value), allow_unused=True)
    assert all(grad is None or not grad.any() for grad in gradients)
    headless = F.varlen_attn(query[:, :0], key[:, :0], value[:, :0], CU, CU_K, 6, 5)
    assert headless.shape == (9, 0, 6)


@on_fewer_targets
def test_no_sequences(target: Target) -> None:
    query, key, value = (x.detach().to(target.device, target.dtype).requires_grad_() for x in tensors())
    none = torch.zeros(1, dtype=torch.int32, device=target.device)
    slopes = torch.zeros(0, H, device=target.device)
    with fastformer.backend(target.backend):
        options = {"alibi_slopes": slopes, "return_aux": LSE, "enable_gqa": True}
        output, lse = F.varlen_attn(query, key, value, none, none, 0, 0, **options)
        (grad,) = torch.autograd.grad(output.sum(), query)
    assert output.dtype == target.dtype and not output.any() and not grad.any()
    assert lse.dtype == torch.float32 and (lse == -math.inf).all()


def test_what_torchs_own_leaves_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs torch's varlen_attn leaves rows of no sequence as they are in memory, in gradients too, and gives rows
    without keys an lse of infinity."""

    def stays(x: Tensor, first: int) -> Tensor:
        x = torch.cat((x[:first], torch.full_like(x[first:], math.nan)))
        return x.clone()

    class Torchs(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return stays(query, 9), torch.full((H, 11), math.inf)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
            assert not grad_output[9:].any()
            return stays(grad_output, 9), *(stays(torch.ones(14, H, D), 12) for _ in range(2))

    def varlen_attn(query: Tensor, key: Tensor, value: Tensor, *lengths: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return Torchs.apply(query, key, value)

    module = SimpleNamespace(varlen_attn=varlen_attn, AuxRequest=AuxRequest)
    monkeypatch.setattr(attention_torch, "_torch_varlen", lambda: module)
    rows = [torch.randn(count, H, D, requires_grad=True) for count in (11, 14, 14)]
    options = Options(1.0, cu_seqlens_q=CU, cu_seqlens_k=CU_K, max_seqlen_q=6, max_seqlen_k=5)
    output, lse = attention_torch.varlen(*(x.transpose(0, 1).unsqueeze(0) for x in rows), None, options)
    grads = torch.autograd.grad(output.sum(), rows)
    assert (lse == -math.inf).all() and not output[:, :, 9:].any()
    for grad, used in zip(grads, (9, 12, 12)):
        assert grad[:used].all() and not grad[used:].any()


def test_when_torchs_own_is_not_enough() -> None:
    """Its lse has no gradient, which it does not say."""
    query, key, value = (torch.empty(1, H, 9, D, dtype=torch.half, device="meta") for _ in range(3))
    with mock.patch.object(Tensor, "device", SimpleNamespace(type="cuda")):
        lacks = partial(attention_torch.varlen_lacks, query, key, value, Options(1.0))
        assert lacks(return_lse=True, record=True) == "gradient of the log-sum-exp"
        assert not lacks(return_lse=True, record=False) and not lacks(return_lse=False, record=True)


# --- arguments that don't fit

X = torch.zeros(9, 2, 4)
POOL = torch.zeros(3, 16, 2, 4)
LENGTHS = torch.tensor([3, 0, 6], dtype=torch.int32)
TABLE = torch.tensor([[0], [-1], [2]], dtype=torch.int32)
PAGED = {"key": POOL, "value": POOL, "block_table": TABLE, "seqused_k": LENGTHS, "cu_seq_k": None}


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "query is a list", {"query": [X]}),
        (TypeError, "query has dtype torch.int32", {"query": X.int()}),
        (ValueError, r"query has shape \(1, 9, 2, 4\), must have 3", {"query": X[None]}),
        (TypeError, "key is a NoneType", {"key": None}),
        (ValueError, "key has dtype torch.float16", {"key": X.half()}),
        (ValueError, "key is on meta, must be on cpu", {"key": X.to("meta")}),
        (ValueError, r"key has shape \(3, 16, 2, 4\), must be \[tokens", {"key": POOL}),
        (ValueError, r"key has shape \(9, 2, 4\), must be \[pages", PAGED | {"key": X}),
        (ValueError, r"key has shape \(9, 2, 3\), must be \(9, 2, 4\)", {"key": X[..., :3]}),
        (ValueError, "value has dtype torch.float64", {"value": X.double()}),
        (ValueError, r"value has shape \(8, 2, 4\), must be \(9, 2, 4\)", {"value": X[:8]}),
        (ValueError, "key has 1 heads and query 2", {"key": X[:, :1], "value": X[:, :1]}),
        (ValueError, "query has 1 heads", {"query": X[:, :1], "enable_gqa": True}),
        (ValueError, "key has pages of 8, must", PAGED | {"key": POOL[:, :8], "value": POOL[:, :8]}),
        (ValueError, "key has pages of 24", PAGED | dict.fromkeys(("key", "value"), torch.zeros(2, 24, 2, 4))),
        (TypeError, "cu_seq_q is a list", {"cu_seq_q": [0, 3, 3, 9]}),
        (TypeError, "cu_seq_q has dtype torch.int64", {"cu_seq_q": CU.long()}),
        (ValueError, r"cu_seq_q has shape \(1, 4\), must have 1", {"cu_seq_q": CU[None]}),
        (ValueError, r"cu_seq_q has shape \(0,\)", {"cu_seq_q": CU[:0]}),
        (ValueError, "cu_seq_q is on meta", {"cu_seq_q": CU.to("meta")}),
        (ValueError, r"cu_seq_q is \[1, 3, 3, 9\], must ascend from 0 to at most 9", {"cu_seq_q": CU.clamp(1)}),
        (ValueError, r"cu_seq_q is \[0, 4, 3, 9\]", {"cu_seq_q": torch.tensor([0, 4, 3, 9], dtype=torch.int32)}),
        (ValueError, r"cu_seq_q is \[0, 6, 6, 18\]", {"cu_seq_q": CU * 2, "max_q": 18}),
        (ValueError, "cu_seq_k is None", {"cu_seq_k": None}),
        (TypeError, "cu_seq_k has dtype torch.float32", {"cu_seq_k": CU.float()}),
        (ValueError, r"cu_seq_k has shape \(3,\), must be \(4,\)", {"cu_seq_k": CU[:3]}),
        (ValueError, r"cu_seq_k is \[0, 6, 6, 18\]", {"cu_seq_k": CU * 2, "max_k": 18}),
        (ValueError, "max_q is 5, must not be less than the longest sequence, 6", {"max_q": 5}),
        (ValueError, "max_q is -1", {"max_q": -1}),
        (TypeError, "max_q is a float", {"max_q": 6.0}),
        (ValueError, "max_k is 5, must not be less", {"max_k": 5}),
        (ValueError, "max_k is 5, must not be less", PAGED | {"max_k": 5}),
        (TypeError, "max_k is a bool", {"max_k": True}),
        (TypeError, "return_aux is a bool", {"return_aux": True}),
        (ValueError, "scale is nan", {"scale": math.nan}),
        (TypeError, "scale is a str", {"scale": "1"}),
        (ValueError, "window_size is 3, must be", {"window_size": 3}),
        (ValueError, r"window_size is \(-2, 0\)", {"window_size": (-2, 0)}),
        (ValueError, r"window_size is \(None, 0\)", {"window_size": (None, 0)}),
        (ValueError, r"window_size is \(1, 2, 3\)", {"window_size": (1, 2, 3)}),
        (TypeError, "is_causal is a str, must be a bool", {"is_causal": "yes"}),
        (TypeError, "seqused_k has dtype torch.int64", {"seqused_k": LENGTHS.long()}),
        (ValueError, r"seqused_k has shape \(2,\), must be \(3,\)", {"seqused_k": LENGTHS[:2]}),
        (ValueError, r"seqused_k is \[4, 1, 7\], must be from 0 to \[3, 0, 6\]", {"seqused_k": LENGTHS + 1}),
        (ValueError, r"seqused_k is \[2, -1, 5\]", {"seqused_k": LENGTHS - 1}),
        (ValueError, r"seqused_k is \[3, 0, 17\]", PAGED | {"seqused_k": torch.tensor([3, 0, 17], dtype=torch.int32)}),
        (ValueError, "seqused_k is None, must be given", PAGED | {"seqused_k": None}),
        (TypeError, "block_table has dtype torch.int64", PAGED | {"block_table": TABLE.long()}),
        (ValueError, r"block_table has shape \(3,\), must have 2", PAGED | {"block_table": TABLE[:, 0]}),
        (ValueError, r"block_table has shape \(2, 1\), must be \(3, 1\)", PAGED | {"block_table": TABLE[:2]}),
        (ValueError, r"block_table has a row \[3\], must have pages from 0 to 2", PAGED | {"block_table": TABLE + 1}),
        (ValueError, r"block_table has a row \[-1\]", PAGED | {"block_table": TABLE - 1}),
        (ValueError, "num_splits is 0", {"num_splits": 0}),
        (ValueError, "num_splits is True", {"num_splits": True}),
        (ValueError, "softcap is 0", {"softcap": 0}),
        (ValueError, r"alibi_slopes has shape \(3,\), must be \(2,\) or \(3, 2\)", {"alibi_slopes": torch.zeros(3)}),
        (TypeError, "alibi_slopes has dtype torch.int64", {"alibi_slopes": torch.zeros(2).long()}),
        (ValueError, r"sinks has shape \(3,\), must be \(2,\)", {"sinks": torch.zeros(3)}),
        (TypeError, "sinks is a float", {"sinks": 0.0}),
    ],
)
def test_errors(error: type[Exception], words: str, changes: dict[str, Any]) -> None:
    arguments = {"query": X, "key": X, "value": X, "cu_seq_q": CU, "cu_seq_k": CU, "max_q": 6, "max_k": 6}
    with pytest.raises(error, match=words):
        F.varlen_attn(**arguments | changes)


def test_every_argument_has_an_error() -> None:
    marks = next(mark for mark in test_errors.pytestmark if mark.name == "parametrize")
    named = {words.split()[0] for _, words, _ in marks.args[1]}
    assert named == inspect.signature(F.varlen_attn).parameters.keys() - {"enable_gqa"}


def test_the_arguments_of_the_table_of_errors_fit() -> None:
    for changes in ({}, PAGED):
        arguments = {"query": X, "key": X, "value": X, "cu_seq_q": CU, "cu_seq_k": CU, "max_q": 6, "max_k": 6}
        assert F.varlen_attn(**arguments | changes).shape == X.shape
