"""Gradients of attention by finite differences, and gradients of its gradients."""

from typing import Any

import pytest
import torch
from attention_support import drawing
from support import TARGETS, Target, needs_library
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastformer
import fastformer.functional as F

Arguments = dict[str, Any]

FEATURES: dict[str, Arguments] = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal at the end": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (2, 1)},
    "causal window": {"window": (1, None), "is_causal": True, "causal_alignment": "bottom_right"},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": -0.7},
    "bool mask": {"attn_mask": torch.arange(30).view(5, 6) % 4 != 0},
    "a row that sees nothing": {"attn_mask": (torch.arange(5) != 2).unsqueeze(1).expand(5, 6)},
    "added mask": {"attn_mask": torch.linspace(-1, 1, 12).view(2, 1, 6)},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1])},
    "alibi of each sequence": {"alibi_slopes": torch.tensor([[0.5, 0.1], [0.3, 0.7]])},
    "sinks": {"sinks": torch.tensor([0.2, -0.3])},
    "sinks, softcap and a window": {"sinks": torch.tensor([0.2, -0.3]), "softcap": 1.0, "window": (1, 0)},
}


def leaves_of(arguments: Arguments, dtype: torch.dtype) -> dict[str, Tensor]:
    """Query, key and value of five queries and six keys in groups of two heads, and the tensors of ``arguments``."""
    shapes = {"query": (2, 2, 5, 4), "key": (2, 1, 6, 4), "value": (2, 1, 6, 3)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}


def attend(arguments: Arguments) -> tuple[Tensor, Tensor]:
    output, lse = F.scaled_dot_product_attention(**arguments, enable_gqa=True, return_lse=True)
    return output, lse.masked_fill(lse.isinf(), 0.0)


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_and_theirs_by_finite_differences(feature: str) -> None:
    leaves = leaves_of(FEATURES[feature], torch.double)

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return attend(FEATURES[feature] | dict(zip(leaves, tensors)))

    assert torch.autograd.gradcheck(both, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(both, tuple(leaves.values()), fast_mode=True)


#: torch's own dropout draws other weights.
ON_TARGETS = [
    pytest.param(feature, target, id=f"{feature}-{target}")
    for target in TARGETS
    for feature in (*FEATURES, *(() if target.backend == "torch" else ("dropout",)))
    if target.dtype == torch.float32
]


@pytest.mark.parametrize(("feature", "target"), ON_TARGETS)
def test_double_backward_of_the_kernels(feature: str, target: Target) -> None:
    """Of the output's square, whose slope depends on what the kernel gave; float64 is the measure."""
    arguments = FEATURES.get(feature, {"dropout_p": 0.4})
    arguments = {name: x.to(target.device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    state = torch.tensor([3, 4])
    leaves = leaves_of(arguments, torch.float32)

    def penalty(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        tensors = {name: x.detach().to(target.device, dtype).requires_grad_() for name, x in leaves.items()}
        with fastformer.backend(backend), drawing(state):
            output, lse = attend(arguments | tensors)
            loss = output.square().sum() + lse.square().sum()
            grads = torch.autograd.grad(loss, tensors.values(), create_graph=True)
            return torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors.values())

    for mine, exact in zip(penalty(target.backend, torch.float32), penalty("reference", torch.double)):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)


@needs_library
def test_a_training_step_with_a_gradient_penalty() -> None:
    """A critic's loss with the penalty of its slope by its input (arXiv 1704.00028): every weight moves as by torch."""

    def trained(backend: str) -> list[Tensor]:
        torch.manual_seed(3)
        weights = [torch.randn(16, 16).div(4).requires_grad_() for _ in range(4)]
        optimizer = torch.optim.SGD(weights, lr=0.01)
        x = torch.randn(4, 12, 16, requires_grad=True)
        for _ in range(3):
            query, key, value = ((x @ weight).unflatten(-1, (2, 8)).transpose(1, 2) for weight in weights[:3])
            with (
                fastformer.backend(backend),
                sdpa_kernel(SDPBackend.MATH),
            ):  # the one of torch's that has such gradients
                attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
                score = (attended.transpose(1, 2).flatten(-2) @ weights[3]).tanh().sum() / 20
                (slope,) = torch.autograd.grad(score, x, create_graph=True)
                optimizer.zero_grad()
                (score + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()).backward()
            optimizer.step()
        return weights

    for mine, theirs in zip(trained("cpu"), trained("torch")):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_torchs_own_function_has_gradients_of_gradients_too(masked: bool) -> None:
    """In float64, which our kernels don't have, and torch's kernel for CPUs alone has none."""
    tensors = [torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    tensors += [torch.randn(4, 4, dtype=torch.float64, requires_grad=True)] if masked else []
    assert torch.autograd.gradcheck(F.scaled_dot_product_attention, tensors)
    assert torch.autograd.gradgradcheck(F.scaled_dot_product_attention, tensors)
    (mine,) = torch.autograd.grad(F.scaled_dot_product_attention(*tensors).square().sum(), tensors[0])
    theirs = torch.nn.functional.scaled_dot_product_attention(*tensors)
    assert torch.equal(mine, torch.autograd.grad(theirs.square().sum(), tensors[0])[0])
    changed = F.scaled_dot_product_attention(*tensors)
    with torch.no_grad():
        tensors[1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.sum().backward()
