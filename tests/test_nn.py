"""fastformer.nn as a namespace, and its smaller modules against torch.nn's."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from module_support import MODULES, B, E, H, L, close, compare, judge, on_devices, twins

import fastformer
from fastformer import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]

# --- the namespace


@pytest.mark.parametrize("name", MODULES)
def test_signatures(name: str) -> None:
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(theirs.forward).parameters)


def test_other_names_are_torchs() -> None:
    import fastformer.nn.functional as F

    assert nn.Embedding is torch.nn.Embedding and nn.init is torch.nn.init and nn.utils is torch.nn.utils
    assert nn.functional is F is fastformer.functional
    assert set(dir(torch.nn)) <= set(dir(nn))
    names: dict[str, Any] = {}
    exec("from fastformer.nn import *", names)
    assert names["Embedding"] is torch.nn.Embedding and names["LayerNorm"] is nn.LayerNorm
    with pytest.raises(AttributeError, match="NoSuchLayer"):
        _ = nn.NoSuchLayer


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


@pytest.mark.parametrize(
    ("name", "options"),
    [("LayerNorm", {}), ("LayerNorm", {"bias": False}), ("LayerNorm", {"elementwise_affine": False}), ("RMSNorm", {})],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_low_precision(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = twins(name, (4, 32), dtype=dtype, **options)
    judge(ours, theirs, [torch.randn(16, 4, 32).to(dtype)])


@pytest.mark.parametrize(("name", "argument"), [("LayerNorm", E), ("RMSNorm", E), ("Softmax", -1)])
def test_nested_tensors(name: str, argument: int) -> None:
    sequences = [torch.randn(3, E), torch.randn(5, E)]
    module = getattr(nn, name)(argument)
    output = module(torch.nested.nested_tensor(sequences, layout=torch.jagged))
    for mine, sequence in zip(output.unbind(), sequences, strict=True):
        close(mine, module(sequence))


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_softmax_without_dim() -> None:
    x = torch.randn(3, 4)
    close(nn.Softmax()(x), torch.nn.Softmax()(x))


# --- loss

needs_torchs_loss = pytest.mark.skipif("LinearCrossEntropyLoss" not in MODULES, reason="torch.nn has no such class")


@needs_torchs_loss
@on_devices
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "ignore_index": 3, "reduction": "sum"},
        {"reduction": "none", "label_smoothing": 0.2},
        {"weight": torch.linspace(0.5, 2.0, 11), "bias": True},
        {"out_features": (2, 3), "bias": True},
        {"dtype": torch.float64},
    ],
)
def test_linear_cross_entropy_loss(device: str, options: dict[str, Any]) -> None:
    ours, theirs = (m.to(device) for m in twins("LinearCrossEntropyLoss", E, 11, **options))
    positions = options.get("out_features", ())
    for rows in ((9,), ()) if not positions else ((9,),):
        input = torch.randn(*rows, E, dtype=options.get("dtype"), device=device)
        compare(ours, theirs, [input, torch.randint(11, (*rows, *positions), device=device)])
        if "ignore_index" not in options:
            probabilities = torch.rand(*rows, 11, *positions, dtype=options.get("dtype"), device=device)
            compare(ours, theirs, [input, probabilities / probabilities.sum(len(rows), keepdim=True)])
    assert repr(ours) == repr(theirs)


@needs_torchs_loss
def test_linear_cross_entropy_loss_leaves_its_linear_uncalled() -> None:
    loss, calls = nn.LinearCrossEntropyLoss(E, 11), []
    loss.linear.register_forward_hook(lambda *_: calls.append(1))
    loss(torch.randn(3, E), torch.tensor([0, 5, 10])).backward()
    assert not calls and loss.linear.weight.grad.any()


# --- copies

BUILT = [
    ("LayerNorm", (E,), 1),
    ("RMSNorm", (E,), 1),
    ("Softmax", (-1,), 1),
    ("MultiheadAttention", (E, H), 3),
    ("TransformerEncoderLayer", (E, H, 24), 1),
    ("TransformerDecoderLayer", (E, H, 24), 2),
    ("Transformer", (E, H, 1, 1, 24), 2),
    ("FeedForward", (E, 24), 1),
]


@pytest.mark.parametrize(("name", "args", "inputs"), BUILT)
def test_deepcopy_pickle_and_meta(name: str, args: tuple[Any, ...], inputs: int) -> None:
    module = getattr(nn, name)(*args).eval()
    x = [torch.randn(B, L, E)] * inputs
    expected = module(*x)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [type(part) for part in copied.modules()] == [type(part) for part in module.modules()]
        assert repr(copied) == repr(module)
        torch.testing.assert_close(copied(*x), expected)
    if name == "Softmax":
        return
    meta = getattr(nn, name)(*args, device="meta", dtype=torch.float32).eval()
    assert all(parameter.is_meta for parameter in meta.parameters())
    meta.to_empty(device="cpu").load_state_dict(module.state_dict(), strict=True)
    torch.testing.assert_close(meta(*x), expected)


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
def test_stacks_on_meta(name: str) -> None:
    """A stack is built of a layer, which may be on the meta device."""
    layer = getattr(nn, f"{name}Layer")(E, H, 24, device="meta")
    stack = pickle.loads(pickle.dumps(copy.deepcopy(getattr(nn, name)(layer, 2))))
    assert type(stack) is getattr(nn, name) and [type(each) for each in stack.layers] == [type(layer)] * 2


# --- feed-forward


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
