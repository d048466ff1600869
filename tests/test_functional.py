import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as torch_functional
from torch.nn.attention import varlen

import fastformer
import fastformer.functional as F
from fastformer import nn

SDPA = "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False"


@pytest.mark.parametrize("name", ["softmax", "layer_norm", "rms_norm", "linear_cross_entropy", "varlen_attn"])
def test_signatures_are_torchs_with_keywords_behind(name: str) -> None:
    room = varlen if name == "varlen_attn" else torch_functional
    if not hasattr(room, name):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    theirs = list(inspect.signature(getattr(room, name)).parameters.values())
    ours = list(inspect.signature(getattr(F, name)).parameters.values())
    for mine, torchs in zip(ours, theirs):
        assert (mine.name, mine.kind, mine.default) == (torchs.name, torchs.kind, torchs.default)
    assert all(extra.kind is inspect.Parameter.KEYWORD_ONLY for extra in ours[len(theirs) :])


def test_attentions_signature() -> None:
    """torch's is a builtin without a signature; its documentation has it."""
    assert SDPA.replace(" ", "") in torch_functional.scaled_dot_product_attention.__doc__.replace(" ", "").replace(
        "\n", ""
    )
    parameters = list(inspect.signature(F.scaled_dot_product_attention).parameters.values())
    torchs = ", ".join(
        p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default}"
        for p in parameters
        if p.kind is not inspect.Parameter.KEYWORD_ONLY
    )
    assert torchs == SDPA


def test_linears_signature() -> None:
    """Likewise."""
    assert "linear(input, weight, bias=None)" in torch_functional.linear.__doc__
    parameters = inspect.signature(F.linear).parameters.values()
    assert [(p.name, p.default) for p in parameters][2:] == [("bias", None)] and len(parameters) == 3


def test_other_names_are_torchs_own() -> None:
    assert F.relu is torch_functional.relu
    assert nn.Embedding is torch.nn.Embedding
    assert nn.functional is F
    assert {"relu", "softmax", "add_layer_norm"} <= set(dir(F))
    with pytest.raises(AttributeError):
        F.no_such_function  # noqa: B018


def test_importing_changes_nothing_in_torch_and_is_quick() -> None:
    code = """
import time, torch, torch.nn.functional
classes = [x for x in vars(torch.nn).values() if isinstance(x, type)]
rooms = [torch, torch.nn, torch.nn.functional, torch.Tensor, *classes]
before, start = [dict(vars(room)) for room in rooms], time.process_time()
import fastformer
seconds = time.process_time() - start
for room, names in zip(rooms, before):
    for name, value in names.items():
        assert vars(room)[name] is value, (room, name)
print(seconds)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1.0


def test_ordinary_calls_take_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose checks are the kernels' own; anything unusual is checked the careful way, as the tests of errors show."""
    from fastformer import backends
    from fastformer.ops import feed_forward, layer_norm, linear, rotary, scaled_dot_product_attention, softmax

    def careful(*args: object) -> None:
        raise AssertionError("checked the careful way")

    for operation in (feed_forward, layer_norm, linear, rotary, scaled_dot_product_attention, softmax):
        monkeypatch.setattr(operation, "_check", careful)
    x, row, head = torch.randn(2, 3, 4, 8), torch.ones(8), torch.randn(4, 4)
    matrix = torch.randn(8, 8)
    calls = [
        lambda: F.softmax(x, -1),
        lambda: F.layer_norm(x, (8,), row, row),
        lambda: F.rms_norm(x, (8,), row),
        lambda: F.linear(x, matrix, row),
        lambda: F.add_layer_norm(x, x, (8,), row, row),
        lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda: F.scaled_dot_product_attention(x, x[:, :1], x[:, :1], torch.ones(4, 4).bool(), enable_gqa=True),
        lambda: F.feed_forward(x, matrix, row, matrix, None, weight_gate=matrix),
        lambda: F.rotary(x, x, head, head),
    ]
    for backend in ("cpu",) if backends.CPU_LIBRARY else ():
        for call in calls:
            with fastformer.backend(backend):
                call()
    for call in calls[:6]:
        with fastformer.backend("torch"):
            call()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with fastformer.backend("torch"), autocast, pytest.raises(AssertionError):
        calls[0]()
