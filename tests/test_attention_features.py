"""What scaled_dot_product_attention has beyond torch's: windows, softcap and sinks, by the reference's formulas."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import KERNEL_TARGETS, Target, check, on_kernels, on_targets, tensor
from torch import Tensor

import fastformer
import fastformer.functional as F
from fastformer import reference

B, H, G, D = 2, 4, 2, 8


def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, **options: Any) -> Any:
    return F.scaled_dot_product_attention(
        query, key, value, mask, sinks=sinks, enable_gqa=True, return_lse=True, **options
    )


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, **options: Any) -> Any:
    options["bottom_right"] = options.pop("causal_alignment", "top_left") == "bottom_right"
    if (window := options.pop("window", None)) is not None:
        visible = reference.window_mask(
            query.shape[2], key.shape[2], *window, bottom_right=options["bottom_right"], device=query.device
        )
        added = torch.zeros(visible.shape, dtype=torch.float64, device=query.device)
        added = added.masked_fill(~visible, -math.inf)
        if mask is not None:
            added = added.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else added + mask
        mask = added
    return reference.attention(query, key, value, mask, sinks=sinks, **options)


@on_targets
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize(
    ("lengths", "mask", "options"),
    [
        ((9, 9), None, {"is_causal": True, "window": (3, 0)}),
        ((5, 11), None, {"is_causal": True, "window": (3, None), "causal_alignment": "bottom_right"}),
        ((11, 7), None, {"window": (2, 1)}),  # the last queries see nothing
        ((6, 9), "bool", {"window": (None, 2)}),
        ((6, 9), "added", {"window": (4, 4), "scale": 0.7}),
        ((7, 7), None, {}),
        ((7, 9), "padding", {"is_causal": True}),
    ],
)
def test_windows_and_sinks(
    target: Target, lengths: tuple[int, int], mask: str | None, options: dict[str, Any], with_sinks: bool
) -> None:
    check_features(target, lengths, mask, options, with_sinks, 1.0)


CAUSAL_AT_THE_END = {"is_causal": True, "causal_alignment": "bottom_right"}


def check_features(
    target: Target, lengths: tuple[int, int], mask: str | None, options: dict[str, Any], with_sinks: bool, scale: float
) -> None:
    """Scores of a spread of about ``scale`` squared."""
    seqlen_q, seqlen_k = lengths
    masks = {
        None: None,
        "bool": torch.rand(B, 1, seqlen_q, seqlen_k, device=target.device) > 0.2,
        "added": tensor(target, H, seqlen_q, seqlen_k),
        "padding": (torch.arange(seqlen_k) < torch.tensor([[[[5]]], [[[9]]]])).to(target.device),
    }
    query = tensor(target, B, H, seqlen_q, D, scale=scale)
    key, value = (tensor(target, B, G, seqlen_k, D, scale=factor) for factor in (scale, 1.0))
    functions: list[Callable[..., Any]] = [
        lambda *tensors, function=function: function(*tensors, **options) for function in (run, run, exact)
    ]
    check(target, *functions, (query, key, value, masks[mask], tensor(target, H) if with_sinks else None))


@on_targets
@pytest.mark.parametrize(
    "case",
    [
        ((6, 9), None, {"softcap": 2.0, **CAUSAL_AT_THE_END, "window": (5, None)}, True, 3.0),
        ((7, 7), "bool", {"softcap": 50.0, "is_causal": True}, False, 1.0),
        ((2, 20), "added", {"softcap": 5.0, "scale": -0.7}, False, 2.0),
    ],
)
def test_softcap(target: Target, case: tuple[Any, ...]) -> None:
    check_features(target, *case)


@pytest.mark.parametrize("target", [target for target in KERNEL_TARGETS if not target.slow], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        ((150, 300), None, {"softcap": 3.0, **CAUSAL_AT_THE_END}, True, 2.0),
        ((200, 200), "added", {"softcap": 3.0}, False, 1.5),
        ((200, 170), "bool", {"softcap": 0.5}, False, 1.0),
        ((4, 1000), "bool", {"softcap": 2.0}, True, 1.0),
        ((3, 600), None, {"softcap": 2.0, **CAUSAL_AT_THE_END}, False, 1.0),
    ],
)
def test_softcap_over_several_blocks(target: Target, case: tuple[Any, ...]) -> None:
    check_features(target, *case)


@on_kernels
def test_softcap_from_none_at_all_to_nothing_left(target: Target) -> None:
    """A large one leaves the scores as they are, a small one makes them all alike."""
    query, key, value = (tensor(target, 1, 2, 9, 16) for _ in range(3))
    with fastformer.backend(target.backend):
        plain = F.scaled_dot_product_attention(query, key, value)
        large, huge = (F.scaled_dot_product_attention(query, key, value, softcap=cap) for cap in (1e9, 1e38))
        small, tiny = (F.scaled_dot_product_attention(query, key, value, softcap=cap) for cap in (1e-9, 1e-60))
    bound = {"rtol": 0, "atol": 4 * torch.finfo(target.dtype).eps}
    torch.testing.assert_close(large, plain, **bound)
    torch.testing.assert_close(huge, plain, **bound)
    mean = value.double().mean(2, keepdim=True).expand_as(value)
    torch.testing.assert_close(small.double(), mean, **bound)
    torch.testing.assert_close(tiny.double(), mean, **bound)


def test_dropout_beside_a_sink_drops_keys_only() -> None:
    """With one key the output is 0 or twice the value's share, which the sink halves when the scores are equal."""
    zeros = torch.zeros(1, 1, 1000, D)
    value = torch.ones(1, 1, 1, D)
    out = F.scaled_dot_product_attention(zeros, zeros[:, :, :1], value, dropout_p=0.5, sinks=torch.zeros(1))
    assert set(out.unique().tolist()) == {0.0, 1.0}


def test_a_row_without_keys_and_without_a_sink_gives_zeros() -> None:
    x, mask = torch.randn(1, 2, 3, 4, requires_grad=True), torch.ones(3, 3, dtype=torch.bool)
    mask[0] = False
    sinks = torch.tensor([-math.inf, 0.0], requires_grad=True)
    out, lse = F.scaled_dot_product_attention(x, x, x, mask, sinks=sinks, return_lse=True)
    assert not out[:, :, 0].any() and lse[0, :, 0].tolist() == [-math.inf, 0.0]
    grads = torch.autograd.grad(out.sum(), (x, sinks))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"window": (True, None)}, ValueError, r"window is \(True, None\)"),
        ({"window": 3}, ValueError, "window is 3, must be"),
        ({"window": (1, -2)}, ValueError, r"window is \(1, -2\)"),
        ({"window": (1.5, None)}, ValueError, r"window is \(1.5, None\)"),
        ({"softcap": "2"}, TypeError, "softcap is a str, must be a number"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0, must be positive"),
        ({"softcap": math.nan}, ValueError, "softcap is nan"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks has shape \(3,\), must be \(2,\)"),
        ({"sinks": 1.0}, TypeError, "sinks is a float"),
        ({"sinks": torch.zeros(2, dtype=torch.int64)}, TypeError, "sinks has dtype torch.int64"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], words: str) -> None:
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(error, match=words):
        F.scaled_dot_product_attention(x, x, x, **options)
