"""accelerate on Hugging Face's causal language models: unembedding and loss in one, and logits when they are read."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers_support import Head, assert_close, assert_same_step, causal_pair

from fastformer.benchmarks.bench_hugging_face import draw_inputs

LABELS = draw_inputs("llama", labels=True)["labels"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": int(LABELS[0, 3])},
        {"shift_labels": LABELS.flip(0)},
        {"output_hidden_states": True, "use_cache": True},
        {"return_dict": True, "logits_to_keep": 0},
    ],
)
def test_fused_loss(name: str, extra: dict[str, Any], backend: str) -> None:
    model, original = causal_pair(name)
    inputs = draw_inputs(name, labels=True) | extra
    output = assert_same_step(model, original, **inputs)
    expected = original(**inputs)
    assert isinstance(output, type(expected)) and type(output).__name__ == type(expected).__name__
    assert [*output] == [key for key in expected if key != "logits"]
    copied = pickle.loads(pickle.dumps(output.__reduce__()[1][1]))
    for logits in (output.logits, output["logits"], output[1], output.to_tuple()[1], copied):
        assert_close(logits, expected.logits)
    assert len(output.to_tuple()) == len(expected.to_tuple())
    if "output_hidden_states" in extra:
        assert_close(output.hidden_states[-1], expected.hidden_states[-1])
    assert inspect.signature(model.forward) == inspect.signature(original.forward)


def test_late_logits() -> None:
    """They have gradients, are of the forward pass's autocast and weights, and aren't computed if they aren't read."""
    model, original = (copy.deepcopy(each) for each in causal_pair("llama"))
    inputs = draw_inputs("llama", labels=True)
    outputs = [each(**inputs) for each in (model, original)]
    grads = [
        torch.autograd.grad(y.logits.square().mean() + y.loss, each.lm_head.weight)[0]
        for y, each in zip(outputs, (model, original))
    ]
    assert_close(*grads)
    assert outputs[0].logits is outputs[0].logits
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [each(**inputs) for each in (model, original)]
    assert outputs[0].logits.dtype == outputs[1].logits.dtype == torch.bfloat16

    calls, output = [], model(**inputs)
    head = type(model.lm_head).forward
    model.lm_head.forward = lambda x: calls.append(1) or head(model.lm_head, x)
    output.loss.backward()
    assert dict(output).keys() == {"loss", "past_key_values"} and not calls
    assert output.logits is not None and calls == [1]
    del model.lm_head.forward

    output = model(**inputs)
    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(RuntimeError, match="lm_head has changed since the forward pass"):
        _ = output.logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fused_loss_in_low_precision(name: str) -> None:
    inputs = draw_inputs(name, labels=True)
    model, original = (copy.deepcopy(each).bfloat16() for each in causal_pair(name))
    loss, expected = model(**inputs).loss, original(**inputs).loss
    exact = causal_pair(name)[1](**inputs).loss
    assert loss.dtype == expected.dtype == torch.float32
    assert (loss - exact).abs() <= 2 * (expected - exact).abs() + 2e-3
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = (each(**inputs).loss for each in causal_pair(name))
    assert loss.dtype == expected.dtype == torch.float32
    assert (loss - exact).abs() <= 2 * (expected - exact).abs() + 2e-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("change", "extra"),
    [
        (lambda model: model.eval(), {}),
        (lambda model: model.requires_grad_(False) and torch.set_grad_enabled(False), {}),
        (lambda model: None, {"labels": None}),
        (lambda model: None, {"return_dict": False}),
        (lambda model: None, {"logits_to_keep": 3, "labels": LABELS[:, -3:]}),
        (lambda model: model.lm_head.register_forward_hook(lambda *_: None), {}),
        (lambda model: setattr(model.lm_head, "__class__", Head), {}),
        (lambda model: setattr(model, "loss_function", lambda logits, labels, **_: logits.sum()), {}),
    ],
)
def test_original_loss(name: str, change: Callable[[torch.nn.Module], Any], extra: dict[str, Any]) -> None:
    """Where the loss alone would not do, or not be the same, the original's forward runs."""
    pair = [copy.deepcopy(each) for each in causal_pair(name)]
    inputs = draw_inputs(name, labels=True) | extra
    try:
        for model in pair:
            change(model)
        ours, theirs = (model(**inputs) for model in pair)
    finally:
        torch.set_grad_enabled(True)
    assert len(ours) == len(theirs)
    if isinstance(theirs, tuple):
        ours, theirs = ours[1], theirs[1]
    else:
        ours, theirs = ours.logits, theirs.logits
    assert_close(ours, theirs)
