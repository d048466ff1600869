"""fastformer.nn against torch.nn: same constructors, parameters, outputs and gradients."""

import copy
import importlib.util
import inspect
import itertools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastformer
from fastformer import nn

MODULES = ["LayerNorm", "MultiheadAttention", "RMSNorm", "Softmax", "TransformerEncoderLayer"]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
on_devices = pytest.mark.parametrize("device", DEVICES)

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

B, L, S, E, H = 2, 5, 7, 20, 4  # batch, queries, keys, width, heads


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def twins(name: str, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our module and torch's from one seed: equal parameters, and each loads the other's state_dict."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    torch.manual_seed(0)
    ours = getattr(nn, name)(*args, **kwargs)
    assert type(ours).__module__.startswith("fastformer.") and isinstance(ours, type(theirs))
    mine, reference = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(reference)
    assert all(torch.equal(mine[key], reference[key]) for key in mine)
    with torch.no_grad():  # no vector of ones or zeros
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    copy.deepcopy(theirs).load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def compare(
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    inputs: Sequence[Tensor],
    check: Callable[[Tensor, Tensor], None] = close,
    **options: Any,
) -> None:
    """Equal outputs, and equal gradients of inputs, parameters and masks that want them.

    ``inputs`` that are the same tensor stay the same tensor.
    """

    def run(module: torch.nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        leaves = {id(x): x.detach().clone().requires_grad_() for x in inputs}
        outputs = module(*(leaves[id(x)] for x in inputs), **options)
        outputs = [outputs] if isinstance(outputs, Tensor) else [y for y in outputs if y is not None]
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
        masks = [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]
        return outputs, torch.autograd.grad(outputs, [*leaves.values(), *module.parameters(), *masks], cotangents)

    for mine, reference in zip(run(ours), run(theirs), strict=True):
        for a, b in zip(mine, reference, strict=True):
            assert a.dtype == b.dtype
            check(a, b)


# --- the namespace


@pytest.mark.parametrize("name", MODULES)
def test_signatures(name: str) -> None:
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(theirs.forward).parameters)


def test_other_names_are_torchs() -> None:
    import fastformer.nn.functional as F

    assert nn.Linear is torch.nn.Linear and nn.init is torch.nn.init and nn.utils is torch.nn.utils
    assert nn.functional is F is fastformer.functional
    assert set(dir(torch.nn)) <= set(dir(nn))
    names: dict[str, Any] = {}
    exec("from fastformer.nn import *", names)
    assert names["Linear"] is torch.nn.Linear and names["LayerNorm"] is nn.LayerNorm
    with pytest.raises(AttributeError, match="NoSuchLayer"):
        _ = nn.NoSuchLayer


def test_plain_gpt_with_its_imports_changed() -> None:
    source = (Path(fastformer.__file__).parents[1] / "benchmarks" / "plain_gpt.py").read_text()
    changed = source.replace("import torch.nn.functional as F", "import fastformer.functional as F").replace(
        "from torch import nn", "from fastformer import nn"
    )
    assert sum(a != b for a, b in zip(source.splitlines(), changed.splitlines(), strict=True)) == 2
    models = []
    for text in (source, changed):
        script = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("plain_gpt", None))
        exec(text, script.__dict__)
        torch.manual_seed(0)
        models.append(script.PlainGPT(vocab_size=50, context_length=16, num_layers=2, num_heads=H, d_model=E))
    theirs, ours = models
    assert isinstance(ours.norm, nn.LayerNorm) and not isinstance(theirs.norm, nn.LayerNorm)
    tokens = torch.randint(50, (B, 16))
    close(ours(tokens), theirs(tokens))
    for model in models:
        model(tokens, tokens.roll(1)).backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-5, atol=2e-5, msg=name)


# --- norms and softmax


@on_devices
@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("LayerNorm", {"normalized_shape": 20}, (2, 3, 20)),
        ("LayerNorm", {"normalized_shape": [3, 20], "eps": 1e-3}, (2, 3, 20)),
        ("LayerNorm", {"normalized_shape": 20, "bias": False}, (20,)),
        ("LayerNorm", {"normalized_shape": (20,), "elementwise_affine": False}, (0, 20)),
        ("LayerNorm", {"normalized_shape": 20, "dtype": torch.float64}, (5, 20)),
        ("RMSNorm", {"normalized_shape": 20}, (2, 3, 20)),
        ("RMSNorm", {"normalized_shape": (3, 20), "eps": 1e-3}, (2, 3, 20)),
        ("RMSNorm", {"normalized_shape": 20, "elementwise_affine": False}, (5, 20)),
        ("RMSNorm", {"normalized_shape": 20, "dtype": torch.float64}, (5, 20)),
        ("Softmax", {"dim": -1}, (2, 3, 20)),
        ("Softmax", {"dim": 1}, (2, 3, 20)),
    ],
)
def test_norms_and_softmax(device: str, name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    ours, theirs = (module.to(device) for module in twins(name, **options))
    compare(ours, theirs, [torch.randn(shape, dtype=options.get("dtype"), device=device)])
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_default_eps_is_float32s(dtype: torch.dtype) -> None:
    ours, theirs = twins("RMSNorm", E, dtype=dtype)
    x = 1e-2 * torch.randn(3, E).to(dtype)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_softmax_without_dim() -> None:
    x = torch.randn(3, 4)
    close(nn.Softmax()(x), torch.nn.Softmax()(x))


# --- attention

ATTENTION_OPTIONS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"kdim": 12, "vdim": 9},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12, "bias": False},
]


def attention_masks(kind: str, queries: int, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """(attn_mask, key_padding_mask); no query has every key masked."""
    masked = torch.rand(queries, keys) < 0.3
    masked[:, 0] = False
    padding = torch.arange(keys) >= torch.tensor([keys, keys - 2]).unsqueeze(1)  # [B, S]
    added = torch.randn(queries, keys, requires_grad=True)
    added_padding = torch.zeros(B, keys).masked_fill(padding, -torch.inf)
    return {
        "none": (None, None),
        "bool": (masked, None),
        "added": (added, None),
        "added for each head": (torch.randn(B * H, queries, keys, requires_grad=True), None),
        "padding": (None, padding),
        "added padding": (None, added_padding),
        "bool, padding": (masked, padding),
        "added, padding": (added, added_padding),
        "added, bool padding": (added, padding),
    }[kind]


@on_devices
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("options", ATTENTION_OPTIONS)
def test_attention(device: str, options: dict[str, Any], batch_first: bool, cross: bool) -> None:
    if not cross and "kdim" in options:
        options = {**options, "kdim": E, "vdim": E}
    ours, theirs = (m.to(device) for m in twins("MultiheadAttention", E, H, batch_first=batch_first, **options))
    query = torch.randn(B, L, E, device=device)
    inputs = [query, query, query]
    if cross:
        inputs[1:] = torch.randn(B, S, ours.kdim, device=device), torch.randn(B, S, ours.vdim, device=device)
    if not batch_first:
        transposed = {id(x): x.transpose(0, 1) for x in inputs}
        inputs = [transposed[id(x)] for x in inputs]
    for kind in (
        "none",
        "bool",
        "added",
        "added for each head",
        "padding",
        "added padding",
        "bool, padding",
        "added, padding",
        "added, bool padding",
    ):
        masks = [None if mask is None else mask.to(device) for mask in attention_masks(kind, L, S if cross else L)]
        for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            compare(ours, theirs, inputs, attn_mask=masks[0], key_padding_mask=masks[1], **weights)


def test_attention_where_key_is_value() -> None:
    ours, theirs = twins("MultiheadAttention", E, H, batch_first=True)
    memory = torch.randn(B, S, E)
    compare(ours, theirs, [torch.randn(B, L, E), memory, memory], need_weights=False)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_unbatched(batch_first: bool, need_weights: bool) -> None:
    ours, theirs = twins("MultiheadAttention", E, H, batch_first=batch_first, add_bias_kv=True)
    inputs = [torch.randn(L, E), torch.randn(S, E), torch.randn(S, E)]
    compare(ours, theirs, inputs, need_weights=need_weights)
    padding = torch.arange(S) > 4
    mask = torch.zeros(H, L, S, dtype=torch.bool)
    mask[1, :, 2] = True
    compare(ours, theirs, inputs, need_weights=need_weights, key_padding_mask=padding, attn_mask=mask)
    weights = ours(*inputs, average_attn_weights=False)[1]
    assert weights.shape == theirs(*inputs, average_attn_weights=False)[1].shape == (H, L, S + 1)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_causal_hint(options: dict[str, Any], padded: bool, need_weights: bool) -> None:
    ours, theirs = twins("MultiheadAttention", E, H, batch_first=True, **options)
    query = torch.randn(B, L, E)
    padding = attention_masks("added padding", L, L)[1] if padded else None
    mask = torch.nn.Transformer.generate_square_subsequent_mask(L)
    masks = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": True}
    compare(ours, theirs, [query, query, query], need_weights=need_weights, **masks)


@pytest.mark.parametrize(("batch", "queries"), [(0, L), (B, 0)])
def test_attention_of_nothing(batch: int, queries: int) -> None:
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    memory = torch.randn(batch, S, E)
    padding = torch.zeros(batch, S, dtype=torch.bool)
    for need_weights in (False, True):
        query = torch.randn(batch, queries, E, requires_grad=True)
        output, _ = attention(query, memory, memory, key_padding_mask=padding, need_weights=need_weights)
        assert output.shape == query.shape
        output.sum().backward()
        assert query.grad is not None


def test_attention_masking_every_key_gives_zeros() -> None:
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    torch.nn.init.normal_(attention.out_proj.bias)
    query = torch.randn(B, L, E, requires_grad=True)
    padding = torch.tensor([[False] * L, [True] * L])
    for need_weights, mask in itertools.product(
        (False, True), (padding, torch.zeros(B, L).masked_fill(padding, -torch.inf))
    ):
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
        (
            lambda: attend(torch.nested.nested_tensor([torch.randn(L, E)]), torch.randn(1, S, E)),
            TypeError,
            "query is a nested tensor",
        ),
    ],
)
def test_attention_errors(call: Callable[[], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- encoder layer


@on_devices
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"batch_first": False, "bias": False, "layer_norm_eps": 1e-3},
        {"batch_first": True, "activation": "gelu"},
        {"batch_first": True, "activation": torch.nn.functional.gelu, "bias": False},
        {"batch_first": False, "activation": torch.nn.functional.silu},
        {"batch_first": True, "activation": torch.relu},
        {"batch_first": True, "activation": torch.nn.GELU(approximate="tanh")},
        {"batch_first": True, "activation": torch.nn.SiLU()},
        {"batch_first": True, "activation": torch.tanh},
    ],
)
def test_encoder_layer(device: str, options: dict[str, Any], norm_first: bool) -> None:
    options = {"dropout": 0.0, "norm_first": norm_first, **options}
    ours, theirs = (m.to(device) for m in twins("TransformerEncoderLayer", E, H, 24, **options))
    src = torch.randn(B, L, E, device=device)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(L, device=device)
    padding = torch.arange(L, device=device) >= torch.tensor([[L], [L - 2]], device=device)  # [B, S]
    for masks in (
        {},
        {"src_mask": causal, "is_causal": True},
        {"src_key_padding_mask": padding},
        {"src_mask": causal < 0, "src_key_padding_mask": padding, "is_causal": True},
    ):
        compare(ours, theirs, [src if options["batch_first"] else src.transpose(0, 1).contiguous()], **masks)
    compare(ours, theirs, [src[0]], src_mask=causal)
    ours.eval(), theirs.eval()
    expected = theirs(src)  # with gradients: torch's fast path for inference takes any GELU for the erf form
    with torch.inference_mode():
        close(ours(src), expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_dropout(norm_first: bool) -> None:
    """Without attention dropout, whose draws are the kernel's, our layer draws what torch's draws."""
    ours, theirs = twins("TransformerEncoderLayer", E, H, 24, dropout=0.5, norm_first=norm_first)
    ours.self_attn.dropout = theirs.self_attn.dropout = 0.0
    src = torch.randn(B, L, E)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        results.append(layer(src))
    close(*results)
    assert not torch.equal(ours(src), ours(src))
    ours.eval(), theirs.eval()
    compare(ours, theirs, [src])


def test_encoder_layer_calls_overridden_blocks() -> None:
    class Doubled(nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return 2 * super()._ff_block(x)

    plain, theirs = twins("TransformerEncoderLayer", E, H, 24, dropout=0.0, batch_first=True)
    doubled = Doubled(E, H, 24, dropout=0.0, batch_first=True)
    doubled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        theirs.linear2.weight *= 2
        theirs.linear2.bias *= 2
    src = torch.randn(B, L, E)
    close(doubled(src), theirs(src))


@on_devices
@pytest.mark.parametrize("enable_nested_tensor", [True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "both"])
def test_torchs_encoder_around_our_layer(device: str, enable_nested_tensor: bool, masks: str) -> None:
    pair = twins("TransformerEncoderLayer", E, H, 24, batch_first=True)
    ours, theirs = (
        torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(E), enable_nested_tensor=enable_nested_tensor)
        .to(device)
        .eval()
        for layer in pair
    )
    src = torch.randn(B, L, E, device=device)
    options = {}
    if masks in ("padding", "both"):
        options["src_key_padding_mask"] = torch.arange(L, device=device) >= torch.tensor([[L], [2]], device=device)
    if masks in ("causal", "both"):
        causal = torch.nn.Transformer.generate_square_subsequent_mask(L, device=device)
        options["mask"] = causal if masks == "causal" else causal < 0
    calls = []
    for layer in ours.layers:
        layer.self_attn.out_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        close(ours(src, **options), theirs(src, **options))
    assert len(calls) == 2
    close(ours(src, **options), theirs(src, **options))  # with gradients nothing is nested


def test_encoder_layer_refuses_masks_for_nested_tensors() -> None:
    src = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)])
    with pytest.raises(ValueError, match="src is a nested tensor"):
        nn.TransformerEncoderLayer(E, H, 24)(src, src_key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))


# --- hooks, copies, compilation, autocast


@pytest.mark.parametrize(
    "name",
    ["self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"],
)
@pytest.mark.parametrize("norm_first", [False, True])
def test_hooks(name: str, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, norm_first=norm_first, batch_first=True)
    src = torch.randn(B, L, E, requires_grad=True)
    before = layer(src)
    module, fired = layer.get_submodule(name), []
    handles = [
        module.register_forward_pre_hook(lambda *_: fired.append("before")),
        module.register_forward_hook(lambda *_: fired.append("after")),
        module.register_full_backward_hook(lambda *_: fired.append("backward")),
    ]
    output = layer(src)
    output.sum().backward()
    assert fired == ["before", "after", "backward"]
    close(output, before)
    for handle in handles:
        handle.remove()
    layer(src)
    assert len(fired) == 3
    module.register_forward_hook(lambda _, args, output: None if isinstance(output, tuple) else 2 * output)
    assert name == "self_attn" or not torch.allclose(layer(src), before)


def test_global_hooks() -> None:
    layer, seen = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True), set()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        layer(torch.randn(B, L, E))
    finally:
        handle.remove()
    assert seen == set(layer.modules())


def test_replaced_submodules_are_called() -> None:
    layer, reference = twins("TransformerEncoderLayer", E, H, 24, dropout=0.0, batch_first=True)
    for each in (layer, reference):
        torch.manual_seed(1)
        each.linear1 = torch.nn.Sequential(torch.nn.Linear(E, 24), torch.nn.Tanh())
        each.norm2 = torch.nn.Identity()
    compare(layer, reference, [torch.randn(B, L, E)])


BUILT = [
    ("LayerNorm", (E,), 1),
    ("RMSNorm", (E,), 1),
    ("Softmax", (-1,), 1),
    ("MultiheadAttention", (E, H), 3),
    ("TransformerEncoderLayer", (E, H, 24), 1),
    ("FeedForward", (E, 24), 1),
]


@pytest.mark.parametrize(("name", "args", "inputs"), BUILT)
def test_deepcopy_pickle_and_meta(name: str, args: tuple[Any, ...], inputs: int) -> None:
    module = getattr(nn, name)(*args).eval()
    x = [torch.randn(B, L, E)] * inputs
    expected = module(*x)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is type(module) and repr(copied) == repr(module)
        torch.testing.assert_close(copied(*x), expected)
    if name == "Softmax":
        return
    meta = getattr(nn, name)(*args, device="meta", dtype=torch.float32).eval()
    assert all(parameter.is_meta for parameter in meta.parameters())
    meta.to_empty(device="cpu").load_state_dict(module.state_dict(), strict=True)
    torch.testing.assert_close(meta(*x), expected)


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiled_attention(need_weights: bool) -> None:
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    query = torch.randn(B, L, E)
    padding = attention_masks("padding", L, L)[1]
    compare(compiled, attention, [query, query, query], key_padding_mask=padding, need_weights=need_weights)


@pytest.mark.parametrize("norm_first", [False, True])
def test_compiled_encoder_layer(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        E, H, 24, dropout=0.0, activation="gelu", norm_first=norm_first, batch_first=True
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    causal = torch.nn.Transformer.generate_square_subsequent_mask(L)
    compare(compiled, layer, [torch.randn(B, L, E)], src_mask=causal, is_causal=True)


def test_autocast() -> None:
    def check(a: Tensor, b: Tensor) -> None:
        assert (a - b).abs().max() <= 0.03 * b.abs().max() + 1e-6

    query = torch.randn(B, L, E)
    padding = attention_masks("added padding", L, L)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for options in ({}, {"add_bias_kv": True, "add_zero_attn": True}):
            pair = twins("MultiheadAttention", E, H, batch_first=True, **options)
            for need_weights in (False, True):
                compare(*pair, [query] * 3, check, key_padding_mask=padding, need_weights=need_weights)
        for norm_first in (False, True):
            pair = twins("TransformerEncoderLayer", E, H, 24, 0.0, "gelu", norm_first=norm_first, batch_first=True)
            compare(*pair, [query], check, src_key_padding_mask=padding)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_feed_forward_is_the_same_fused_and_called_layer_by_layer(activation: str, gated: bool) -> None:
    module = nn.FeedForward(16, 40, activation=activation, gated=gated)
    x = torch.randn(3, 5, 16)
    fused = module(x)
    calls = []
    module.linear1.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(module(x), fused)
    assert calls == [1]
    assert module.linear1(x).shape == (3, 5, 40) and (module.linear_gate is not None) == gated


def test_feed_forward_drops_hidden_values_only_while_training() -> None:
    module = nn.FeedForward(8, 64, dropout=0.5)
    x = torch.randn(2, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(("name", "options"), [("activation", {"activation": "swish"}), ("dropout", {"dropout": 1.5})])
def test_feed_forward_refuses(name: str, options: dict) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        nn.FeedForward(4, 8, **options)
