"""What scaled_dot_product_attention has beyond torch's: windows, softcap and sinks, by the reference's formulas."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Target, check, on_targets, tensor
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
    seqlen_q, seqlen_k = lengths
    masks = {
        None: None,
        "bool": torch.rand(B, 1, seqlen_q, seqlen_k, device=target.device) > 0.2,
        "added": tensor(target, H, seqlen_q, seqlen_k),
        "padding": (torch.arange(seqlen_k) < torch.tensor([[[[5]]], [[[9]]]])).to(target.device),
    }
    tensors = [tensor(target, B, H, seqlen_q, D), *(tensor(target, B, G, seqlen_k, D) for _ in range(2))]
    sinks = tensor(target, H) if with_sinks else None
    functions: list[Callable[..., Any]] = [
        lambda *tensors, function=function: function(*tensors, **options) for function in (run, run, exact)
    ]
    check(target, *functions, (*tensors, masks[mask], sinks))


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_softcap(backend: str, dtype: torch.dtype) -> None:
    target = Target(backend, "cpu", dtype)
    tensors = [tensor(target, B, H, 6, D, scale=3.0), *(tensor(target, B, G, 9, D, scale=3.0) for _ in range(2))]
    sinks = tensor(target, H)
    options = {"softcap": 2.0, "is_causal": True, "causal_alignment": "bottom_right", "window": (5, None)}
    functions: list[Callable[..., Any]] = [
        lambda *tensors, function=function: function(*tensors, **options) for function in (run, run, exact)
    ]
    check(target, *functions, (*tensors, None, sinks))
    uncapped = run(*tensors, None, sinks, **{**options, "softcap": None})[0]
    assert not torch.allclose(uncapped, run(*tensors, None, sinks, **options)[0], rtol=0.05)


def test_dropout_beside_a_sink_drops_keys_only() -> None:
    """With one key the output is 0 or twice the value's share, which the sink halves when the scores are equal."""
    zeros = torch.zeros(1, 1, 1000, D)
    value = torch.ones(1, 1, 1, D)
    out = F.scaled_dot_product_attention(zeros, zeros[:, :, :1], value, dropout_p=0.5, sinks=torch.zeros(1))
    assert set(out.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"window": 3}, ValueError, "window is 3, must be"),
        ({"window": (1, -2)}, ValueError, r"window is \(1, -2\)"),
        ({"window": (1.5, None)}, ValueError, r"window is \(1.5, None\)"),
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


def test_a_kernel_without_softcap_is_not_asked_silently() -> None:
    x = torch.randn(1, 2, 3, 4)
    with fastformer.backend("reference"):
        F.scaled_dot_product_attention(x, x, x, softcap=1.0)
    for name in ("cpu", "triton"):
        if fastformer.backends.available(name, "cpu"):
            with fastformer.backend(name), pytest.raises(ValueError, match="softcap"):
                F.scaled_dot_product_attention(x, x, x, softcap=1.0)
