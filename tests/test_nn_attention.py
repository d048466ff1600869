"""nn.MultiheadAttention against torch.nn's."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_support import B, E, H, L, S, added, causal_mask, close, compare, judge, on_devices, padding_mask, twins
from torch import Tensor

from fastformer import nn

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

OPTIONS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"kdim": 12, "vdim": 9},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12, "bias": False},
]

MASKS = [
    "none",
    "bool",
    "added",
    "bool for each head",
    "added for each head",
    "padding",
    "added padding",
    "bool, padding",
    "added, padding",
    "added, bool padding",
]


def draw_masks(kind: str, batch: int, queries: int, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """(attn_mask, key_padding_mask) of one of MASKS; no query has every key masked. Unbatched with a batch of 0."""
    masked = torch.rand(queries, keys) < 0.3
    each_masked = torch.rand(max(batch, 1) * H, queries, keys) < 0.3
    masked[..., 0] = each_masked[..., 0] = False
    padding = padding_mask(keys, *[keys, keys - 2, 2][: max(batch, 1)])
    padding = padding if batch else padding_mask(keys, keys - 2)[0]
    additive = torch.randn(queries, keys, requires_grad=True)
    return {
        "none": (None, None),
        "bool": (masked, None),
        "added": (additive, None),
        "bool for each head": (each_masked, None),
        "added for each head": (torch.randn_like(each_masked, dtype=torch.float32).requires_grad_(), None),
        "padding": (None, padding),
        "added padding": (None, added(padding)),
        "bool, padding": (masked, padding),
        "added, padding": (additive, added(padding)),
        "added, bool padding": (additive, padding),
    }[kind]


@on_devices
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("layout", ["batch first", "sequence first", "unbatched"])
@pytest.mark.parametrize("options", OPTIONS)
def test_attention(device: str, options: dict[str, Any], layout: str, cross: bool) -> None:
    if not cross and "kdim" in options:
        options = {**options, "kdim": E, "vdim": E}
    batch_first = layout == "batch first"
    ours, theirs = (m.to(device) for m in twins("MultiheadAttention", E, H, batch_first=batch_first, **options))
    shape = {"batch first": (B, L), "sequence first": (L, B), "unbatched": (L,)}[layout]
    memory_shape = [S if size == L else size for size in shape]
    query = torch.randn(*shape, E, device=device)
    inputs = [query, query, query]
    if cross:
        inputs[1:] = (torch.randn(*memory_shape, width, device=device) for width in (ours.kdim, ours.vdim))
    for kind in MASKS:
        masks = draw_masks(kind, 0 if layout == "unbatched" else B, L, S if cross else L)
        names = ("attn_mask", "key_padding_mask")
        given = {name: mask if mask is None else mask.to(device) for name, mask in zip(names, masks)}
        for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            compare(ours.train(), theirs.train(), inputs, **given, **weights)
            with torch.no_grad():
                mine, reference = (module.eval()(*inputs, **given, **weights) for module in (ours, theirs))
            assert (mine[1] is None) == (reference[1] is None)
            close(mine[0], reference[0])
            if reference[1] is not None:
                close(mine[1], reference[1])


def test_attention_where_key_is_value() -> None:
    ours, theirs = twins("MultiheadAttention", E, H, batch_first=True)
    memory = torch.randn(B, S, E)
    compare(ours, theirs, [torch.randn(B, L, E), memory, memory], need_weights=False)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_causal_hint(options: dict[str, Any], padded: bool, need_weights: bool) -> None:
    ours, theirs = twins("MultiheadAttention", E, H, batch_first=True, **options)
    query = torch.randn(B, L, E)
    padding = added(padding_mask(L, L, L - 2)) if padded else None
    masks = {"attn_mask": causal_mask(L), "key_padding_mask": padding, "is_causal": True}
    compare(ours, theirs, [query, query, query], need_weights=need_weights, **masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["none", "added", "bool, padding"])
def test_attention_in_low_precision(dtype: torch.dtype, need_weights: bool, kind: str) -> None:
    ours, theirs = twins("MultiheadAttention", 64, H, batch_first=True, dtype=dtype)
    query = torch.randn(3, 24, 64).to(dtype)
    attn_mask, padding = draw_masks(kind, 3, 24, 24)
    if kind == "added":
        attn_mask = attn_mask.detach().to(dtype).requires_grad_()
    judge(ours, theirs, [query] * 3, need_weights=need_weights, attn_mask=attn_mask, key_padding_mask=padding)


def test_attention_weights_of_scores_beyond_float16() -> None:
    """Of queries and keys whose product float16 holds only once it is scaled."""
    ours, theirs = twins("MultiheadAttention", 64, 1, bias=False, batch_first=True, dtype=torch.float16)
    with torch.no_grad():
        for module in (ours, theirs):
            for weight in module.in_proj_weight.chunk(3):
                weight.copy_(torch.eye(64))
    x = torch.full((1, 2, 64), 40.0, dtype=torch.float16)
    assert (x @ x.mT).isinf().all()
    for mine, reference in zip(ours(x, x, x), theirs(x, x, x)):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize(("batch", "queries"), [(0, L), (B, 0)])
def test_attention_of_nothing(batch: int, queries: int) -> None:
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    memory = torch.randn(batch, S, E)
    padding = torch.zeros(batch, S, dtype=torch.bool)
    mask = torch.zeros(batch * H, queries, S)
    for need_weights in (False, True):
        query = torch.randn(batch, queries, E, requires_grad=True)
        output, _ = attention(query, memory, memory, padding, need_weights=need_weights, attn_mask=mask)
        assert output.shape == query.shape
        output.sum().backward()
        assert query.grad is not None


def test_attention_masking_every_key_gives_zeros() -> None:
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    torch.nn.init.normal_(attention.out_proj.bias)
    query = torch.randn(B, L, E, requires_grad=True)
    padding = padding_mask(L, L, 0)
    for need_weights, mask in itertools.product((False, True), (padding, added(padding))):
        output, weights = attention(query, query, query, key_padding_mask=mask, need_weights=need_weights)
        close(output[1], attention.out_proj.bias.expand(L, E))
        assert weights is None or not weights[1].any()
        (gradient,) = torch.autograd.grad(output.sum(), query)
        assert gradient.isfinite().all() and not gradient[1].any()


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_dropout(need_weights: bool) -> None:
    attention = nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    query = torch.randn(B, L, E)

    def run() -> Tensor:
        return attention(query, query, query, need_weights=need_weights)[0]

    assert not torch.equal(run(), run())
    attention.eval()
    assert torch.equal(run(), run())
    average = torch.zeros_like(query)
    expected = run()
    attention.train()
    for _ in range(400):
        average += run().detach() / 400
    assert (average - expected).abs().max() < 0.25


def attend(query: Tensor, memory: Tensor, **options: Any) -> None:
    nn.MultiheadAttention(E, H, batch_first=True)(query, memory, memory, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attend(torch.randn(E), torch.randn(E)), ValueError, "query has shape"),
        (lambda: attend(torch.randn(B, L, E), torch.randn(S, E)), ValueError, "key has shape"),
        (lambda: attend(torch.randn(B, L, E), torch.randn(B, S, E + 1)), ValueError, "key has shape.*must be 20"),
        (lambda: attend(torch.randn(B, L, E), torch.randn(B + 1, S, E)), ValueError, "key has a batch of 3"),
        (lambda: attend(torch.randn(L, E), torch.randn(S, E), is_causal=True), ValueError, "attn_mask must be given"),
        (
            lambda: attend(torch.randn(L, E), torch.randn(S, E), attn_mask=torch.zeros(S, L)),
            ValueError,
            r"attn_mask has shape \(7, 5\), must be \(5, 7\) or \(4, 5, 7\)",
        ),
        (
            lambda: attend(torch.randn(B, L, E), torch.randn(B, S, E), key_padding_mask=torch.zeros(S)),
            ValueError,
            "key_padding_mask has shape",
        ),
        (
            lambda: attend(torch.randn(L, E), torch.randn(S, E), attn_mask=torch.zeros(L, S, dtype=torch.int32)),
            TypeError,
            "attn_mask has dtype torch.int32",
        ),
    ],
)
def test_attention_errors(call: Callable[[], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_nested_tensors_are_torchs_own_case() -> None:
    ours, theirs = (module.eval() for module in twins("MultiheadAttention", E, H, batch_first=True))
    nested = torch.nested.nested_tensor([torch.randn(L, E), torch.randn(S, E)])
    with torch.no_grad():
        outputs = (module(nested, nested, nested, need_weights=False)[0] for module in (ours, theirs))
        for mine, reference in zip(*(output.unbind() for output in outputs), strict=True):
            close(mine, reference)
