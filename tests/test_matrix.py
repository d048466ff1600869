"""Every function and module under every way that torch has of calling it.

A cell that is not there is named in HOLES, with the reason.
"""

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import KERNEL
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import fastformer
import fastformer.functional as F
from fastformer import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

B, S, C, H, HIDDEN, V = 3, 6, 16, 2, 24, 11


@dataclass(frozen=True)
class Row:
    """A function of tensors, or a module called with them.

    ``inputs(length)`` are the arguments for one sequence length; the batch is their first dimension, except of those
    in ``shared``. Modules are built anew for each test.
    """

    name: str
    build: Callable[[], Callable[..., Any]]
    inputs: Callable[[int], list[Tensor]]
    shared: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[int, ...] = ()  # inputs by which there is no gradient


def tokens(length: int) -> Tensor:
    return torch.randn(B, length, C)


def heads(length: int) -> Tensor:
    return torch.randn(B, H, length, C // H)


def row_vector(_: int) -> Tensor:
    return torch.randn(C)


def matrix(rows: int, cols: int) -> Callable[[int], Tensor]:
    return lambda _: torch.randn(rows, cols) / cols**0.5


def visible(length: int) -> Tensor:
    """bool [B, 1, length, length], no row empty."""
    return torch.rand(B, 1, length, length).lt(0.6) | torch.eye(length, dtype=torch.bool)


def targets(length: int) -> Tensor:
    return torch.randint(V, (B, length))


def angles(length: int) -> Tensor:
    return torch.randn(length, C // H // 2)


def packed(length: int) -> Tensor:
    return torch.randn(B * length, H, C // H)


def starts(length: int) -> Tensor:
    """Of three sequences, the second one empty; the last row is no sequence's."""
    return torch.tensor([0, length + 2, length + 2, B * length - 1], dtype=torch.int32)


def function(name: str, call: Callable[..., Any], *makers: Callable[[int], Tensor], **fields: tuple[int, ...]) -> Row:
    return Row(name, lambda: call, lambda n: [make(n) for make in makers], **fields)


def module(name: str, build: Callable[[], torch.nn.Module], *makers: Callable[[int], Tensor], **options: Any) -> Row:
    return Row(name, build, lambda n: [make(n) for make in makers], (), options)


def sdpa(**options: Any) -> Callable[..., Any]:
    return lambda *tensors: F.scaled_dot_product_attention(*tensors, **options)


def attention_with_sinks(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, sinks=sinks, return_lse=True)


def attention_with_alibi(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, alibi_slopes=slopes)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, cu_seq: Tensor) -> Tensor:
    return F.varlen_attn(query, key, value, cu_seq, cu_seq, 64, 64, is_causal=True)


LAYER = {"dim_feedforward": HIDDEN, "dropout": 0.0, "activation": "gelu", "batch_first": True}

FUNCTIONS = [
    function("softmax", lambda x: F.softmax(x, -1), tokens),
    function("softmax, masked", lambda x: F.softmax(x, -1, scale=0.5, is_causal=True), heads),
    function("layer_norm", lambda x, w, b: F.layer_norm(x, (C,), w, b), tokens, row_vector, row_vector, shared=(1, 2)),
    function("rms_norm", lambda x, w: F.rms_norm(x, (C,), w), tokens, row_vector, shared=(1,)),
    function(
        "add_layer_norm", lambda x, r, w: F.add_layer_norm(x, r, (C,), w), tokens, tokens, row_vector, shared=(2,)
    ),
    function("add_rms_norm", lambda x, r: F.add_rms_norm(x, r, (C,)), tokens, tokens),
    function("attention", sdpa(is_causal=True), heads, heads, heads),
    function("attention, masked", sdpa(), heads, heads, heads, visible),
    function("attention, window", sdpa(is_causal=True, window=(3, 0)), heads, heads, heads),
    function("attention, sinks", attention_with_sinks, heads, heads, heads, lambda _: torch.randn(H), shared=(3,)),
    function(
        "attention, ALiBi", attention_with_alibi, heads, heads, heads, lambda _: torch.rand(H), shared=(3,), fixed=(3,)
    ),
    function("attention, dropout", sdpa(dropout_p=0.4), heads, heads, heads),
    function("varlen_attn", packed_attention, packed, packed, packed, starts, shared=(3,)),
    function("linear", F.linear, tokens, matrix(HIDDEN, C), lambda _: torch.randn(HIDDEN), shared=(1, 2)),
    function(
        "feed_forward",
        lambda x, w1, b1, w2, b2: F.feed_forward(x, w1, b1, w2, b2),
        tokens,
        matrix(HIDDEN, C),
        lambda _: torch.randn(HIDDEN),
        matrix(C, HIDDEN),
        row_vector,
        shared=(1, 2, 3, 4),
    ),
    function(
        "feed_forward, gated",
        lambda x, w1, wg, w2: F.feed_forward(x, w1, None, w2, None, activation="silu", weight_gate=wg),
        tokens,
        matrix(HIDDEN, C),
        matrix(HIDDEN, C),
        matrix(C, HIDDEN),
        shared=(1, 2, 3),
    ),
    function("linear_cross_entropy", F.linear_cross_entropy, tokens, matrix(V, C), targets, shared=(1,)),
    function("rotary", F.rotary, heads, heads, angles, angles, shared=(2, 3), fixed=(2, 3)),
]
MODULES = [
    module("Softmax", lambda: nn.Softmax(-1), tokens),
    module("LayerNorm", lambda: nn.LayerNorm(C), tokens),
    module("RMSNorm", lambda: nn.RMSNorm(C), tokens),
    module("Linear", lambda: nn.Linear(C, HIDDEN), tokens),
    module("FeedForward", lambda: nn.FeedForward(C, HIDDEN, activation="silu", gated=True), tokens),
    module("MultiheadAttention", lambda: nn.MultiheadAttention(C, H, batch_first=True), tokens, tokens, tokens),
    module(
        "MultiheadAttention, no weights",
        lambda: nn.MultiheadAttention(C, H, batch_first=True),
        *(tokens,) * 3,
        need_weights=False,
    ),
    module("TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(C, H, **LAYER), tokens),
    module("TransformerDecoderLayer", lambda: nn.TransformerDecoderLayer(C, H, **LAYER), tokens, tokens),
    module(
        "TransformerEncoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(C, H, norm_first=True, **LAYER), 1),
        tokens,
    ),
    module(
        "TransformerDecoder",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(C, H, norm_first=True, **LAYER), 1),
        *(tokens,) * 2,
    ),
    module("Transformer", lambda: nn.Transformer(C, H, 1, 1, **LAYER), tokens, tokens),
    module("PositionalEncoding", lambda: nn.PositionalEncoding(C, 32, batch_first=True), tokens),
    module("PositionalEncoding, learned", lambda: nn.PositionalEncoding(C, 32, kind="learned"), tokens),
    module("PositionalEncoding, rotary", lambda: nn.PositionalEncoding(C // H, 32, kind="rotary"), heads, heads),
]
if hasattr(nn, "LinearCrossEntropyLoss"):  # not in torch 2.11
    MODULES.append(
        module(
            "LinearCrossEntropyLoss",
            lambda: nn.LinearCrossEntropyLoss(C, V),
            lambda n: tokens(n).flatten(0, 1),
            lambda n: targets(n).flatten(),
        )
    )

COLUMNS: dict[str, Callable[[Row], None]] = {}
HOLES: dict[tuple[str, str], str] = {
    **{(row.name, "functional_call"): "a function has no parameters of its own" for row in FUNCTIONS},
    **{(row.name, "pickle"): "a function is pickled by its name" for row in FUNCTIONS},
    **{
        ("attention, dropout", column): "torch, compiled code and transformed functions don't drop the same weights"
        for column in ("eager", "compile", "autocast", "grad_scaler", "vmap", "func_grad", "subclass")
    },
    **{
        ("varlen_attn", column): "without a kernel the lengths are read, which a graph can't"
        for column in ("compile", "fake")
        if KERNEL == "torch"
    },
}


def column(check: Callable[[Row], None]) -> Callable[[Row], None]:
    COLUMNS[check.__name__.removeprefix("check_")] = check
    return check


def leaves_of(row: Row, inputs: list[Tensor]) -> list[Tensor]:
    return [
        x.detach().clone().requires_grad_() if x.is_floating_point() and i not in row.fixed else x
        for i, x in enumerate(inputs)
    ]


def run(row: Row, call: Callable[..., Any], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the inputs and of a module's parameters), for cotangents that depend on shapes alone."""
    leaves = leaves_of(row, inputs)
    torch.manual_seed(1)  # of dropout
    outputs = flatten(call(*leaves, **row.options))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    wanted = [x for x in leaves if x.requires_grad]
    wanted += call.parameters() if isinstance(call, torch.nn.Module) else []
    grads = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
    return outputs, [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, grads)]


def flatten(outputs: Any) -> list[Tensor]:
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [y for y in outputs if y is not None]


def close(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        if isinstance(mine, list | tuple):
            close(mine, reference, tolerance)
        else:
            assert mine.dtype == reference.dtype
            scale = max(1.0, reference.detach().abs().max().item())
            torch.testing.assert_close(mine, reference, rtol=0, atol=tolerance * scale)


@column
def check_eager(row: Row) -> None:
    call, inputs = row.build(), row.inputs(S)
    with fastformer.backend("torch"):
        expected = run(row, call, inputs)
    with fastformer.backend(KERNEL):
        close(run(row, call, inputs), expected)


@column
def check_compile(row: Row) -> None:
    """In one graph: for one length, functions down to machine code; and told to be dynamic for ten lengths."""
    call = row.build()
    machine_code = "aot_eager" if isinstance(call, torch.nn.Module) else "inductor"
    for dynamic, backend, lengths in ((False, machine_code, [S]), (True, "aot_eager", range(S, S + 10))):
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
        with fastformer.backend(KERNEL), torch._dynamo.config.patch(error_on_recompile=True):
            for length in lengths:
                inputs = row.inputs(length)
                close(run(row, compiled, inputs), run(row, call, inputs))


@column
def check_autocast(row: Row) -> None:
    """The dtypes of torch's own functions, and values as near the float32 ones as bfloat16 is."""
    call, inputs = row.build(), row.inputs(S)
    exact = run(row, call, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with fastformer.backend("torch"):
            theirs = run(row, call, inputs)
        with fastformer.backend(KERNEL):
            ours = run(row, call, inputs)
    for mine, reference, truth in zip(
        itertools.chain(*ours), itertools.chain(*theirs), itertools.chain(*exact), strict=True
    ):
        assert mine.dtype == reference.dtype
        error, allowed = ((x.double() - truth).abs().max() for x in (mine, reference))
        assert error <= 2 * allowed + 2**-7 * truth.abs().max(), (error, allowed)


@column
def check_grad_scaler(row: Row) -> None:
    """Scaled float16 gradients, unscaled, are those without scaling; an overflow is seen and skips the step."""
    call, inputs = row.build(), row.inputs(S)
    leaf = inputs[0].requires_grad_()
    optimizer = torch.optim.SGD([leaf], lr=0.0)

    def backward(scaler: torch.amp.GradScaler) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16), fastformer.backend(KERNEL):
            loss = sum(y.float().square().mean() for y in flatten(call(*inputs, **row.options)))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return leaf.grad.clone()

    plain = backward(torch.amp.GradScaler("cpu", enabled=False))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    close([backward(scaler)], [plain], 2e-3)
    assert scaler.get_scale() == 1024.0


def batched(row: Row, inputs: list[Tensor]) -> tuple[int | None, ...]:
    return tuple(None if i in row.shared else 0 for i in range(len(inputs)))


@column
def check_vmap(row: Row) -> None:
    """Over a new first dimension, the same as one call after another."""
    call = row.build()
    several = [row.inputs(S) for _ in range(3)]
    stacked = [
        several[0][i] if i in row.shared else torch.stack([inputs[i] for inputs in several])
        for i in range(len(several[0]))
    ]
    for inputs in several:
        for i in row.shared:
            inputs[i] = several[0][i]
    every = torch.vmap(lambda *xs: flatten(call(*xs, **row.options)), in_dims=batched(row, stacked))
    outputs = every(*stacked)
    singles = [flatten(call(*inputs, **row.options)) for inputs in several]
    close(outputs, [torch.stack(each) for each in zip(*singles)])


@column
def check_func_grad(row: Row) -> None:
    """torch.func.grad, and per-sample gradients by vmap of it, against autograd."""
    call = row.build()
    several = [row.inputs(S) for _ in range(2)]
    for i in row.shared:
        several[1][i] = several[0][i]

    def loss(*inputs: Tensor) -> Tensor:
        return sum(y.float().square().sum() for y in flatten(call(*inputs, **row.options)))

    def autograd(inputs: list[Tensor]) -> Tensor:
        leaf = inputs[0].detach().clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, *inputs[1:]), leaf)[0]

    expected = [autograd(inputs) for inputs in several]
    close([torch.func.grad(loss)(*several[0])], expected[:1])
    stacked = [
        several[0][i] if i in row.shared else torch.stack([inputs[i] for inputs in several])
        for i in range(len(several[0]))
    ]
    close([torch.vmap(torch.func.grad(loss), in_dims=batched(row, stacked))(*stacked)], [torch.stack(expected)])


@column
def check_functional_call(row: Row) -> None:
    """With other parameters than the module's own, and their gradients by torch.func."""
    call, inputs = row.build(), row.inputs(S)
    other = copy.deepcopy(call)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    parameters = dict(other.named_parameters())
    close(
        flatten(torch.func.functional_call(call, parameters, tuple(inputs), row.options)),
        flatten(other(*inputs, **row.options)),
    )
    if not parameters:
        return

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        outputs = flatten(torch.func.functional_call(call, parameters, tuple(inputs), row.options))
        return sum(y.square().sum() for y in outputs)

    grads = torch.func.grad(loss)({name: parameter.detach() for name, parameter in parameters.items()})
    loss(parameters).backward()
    close(list(grads.values()), [parameter.grad for parameter in parameters.values()])


@column
def check_checkpoint(row: Row) -> None:
    """Activations computed again in backward."""
    call, inputs = row.build(), row.inputs(S)

    def again(*tensors: Tensor, **options: Any) -> Any:
        return checkpoint(call, *tensors, use_reentrant=False, **options)

    with fastformer.backend(KERNEL):
        outputs, grads = run(row, call, inputs)
        close(run(row, again, inputs), (outputs, grads[: sum(x.requires_grad for x in leaves_of(row, inputs))]))


@column
def check_fake(row: Row) -> None:
    """Shapes, dtypes and strides without values, of outputs and gradients; and on the meta device."""
    call, inputs = row.build(), row.inputs(S)
    with fastformer.backend(KERNEL):
        expected = run(row, call, inputs)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            leaves = [mode.from_tensor(x) for x in leaves_of(row, inputs)]
            outputs = flatten(call(*leaves, **row.options))
            wanted = [x for x in leaves if x.requires_grad]
            grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs], allow_unused=True)
    for fake, real in zip([*outputs, *grads], [*expected[0], *expected[1][: len(grads)]], strict=True):
        assert fake is None or (fake.shape, fake.dtype) == (real.shape, real.dtype)
    for fake, real in zip(outputs, expected[0]):
        assert fake.stride() == real.stride()
    on_meta = call.to("meta") if isinstance(call, torch.nn.Module) else call
    outputs = flatten(on_meta(*(x.to("meta") for x in inputs), **row.options))
    assert [(y.shape, y.dtype, y.device.type) for y in outputs] == [(y.shape, y.dtype, "meta") for y in expected[0]]


@column
def check_pickle(row: Row) -> None:
    call, inputs = row.build(), row.inputs(S)
    again = pickle.loads(pickle.dumps(call))
    assert type(again) is type(call)
    close(run(row, again, inputs), run(row, call, inputs), 0.0)


@column
def check_subclass(row: Row) -> None:
    """Tensors that wrap others (DTensor, quantized weights) go to torch, whose functions know what to do with them."""
    call, inputs = row.build(), row.inputs(S)
    wrapped = [TwoTensor(x, x.clone()) if x.is_floating_point() else x for x in inputs]
    for mine, expected in zip(flatten(call(*wrapped, **row.options)), flatten(call(*inputs, **row.options))):
        close([mine.a, mine.b], [expected, expected])


CELLS = [
    pytest.param(row, name, id=f"{row.name}-{name}")
    for row in (*FUNCTIONS, *MODULES)
    for name in COLUMNS
    if (row.name, name) not in HOLES
]


@pytest.mark.parametrize(("row", "column"), CELLS)
def test_cell(row: Row, column: str) -> None:
    COLUMNS[column](row)


def test_nothing_is_missing() -> None:
    rows = {row.name.split(",")[0] for row in (*FUNCTIONS, *MODULES)}
    functions = {name for name, value in vars(F).items() if getattr(value, "__module__", "") == F.__name__}
    functions = {name for name in functions if not name.startswith("_")} - {"scaled_dot_product_attention"}
    modules = {name for name in nn.__all__ if getattr(nn, name) is not getattr(torch.nn, name, None)} - {"functional"}
    assert rows == functions | modules | {"attention"}
    assert all(name in {row.name for row in FUNCTIONS} and column in COLUMNS for name, column in HOLES)
