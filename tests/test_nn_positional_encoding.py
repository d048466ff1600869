"""nn.PositionalEncoding against its formulas."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fastformer import functional as F
from fastformer import nn

KINDS = ["sinusoidal", "learned", "rotary"]


def encode(module: nn.PositionalEncoding, x: Tensor, **options: Any) -> Tensor:
    """Of x [B, S, C], as a head [B, 1, S, C] where the encoding is rotary."""
    return module(x[:, None], x[:, None], **options)[1][:, 0] if module.kind == "rotary" else module(x, **options)


def batch_first(kind: str) -> dict[str, bool]:
    return {} if kind == "rotary" else {"batch_first": True}


@pytest.mark.parametrize(("width", "base"), [(6, 10000.0), (7, 500.0)])
def test_sinusoidal_values(width: int, base: float) -> None:
    module = nn.PositionalEncoding(width, 100_001, base=base)
    for position in (0, 1, 12_345, 100_000):
        angles = [position / base ** (2 * (i // 2) / width) for i in range(width)]
        expected = [math.cos(angle) if i % 2 else math.sin(angle) for i, angle in enumerate(angles)]
        encoding = module(torch.zeros(1, width), offset=position)
        torch.testing.assert_close(encoding, torch.tensor([expected]), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_values(interleaved: bool) -> None:
    module = nn.PositionalEncoding(4, 100_001, kind="rotary", base=100.0, interleaved=interleaved)
    head = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])  # whose last feature is not turned
    pairs = ((0, 1), (2, 3)) if interleaved else ((0, 2), (1, 3))
    for position in (0, 1, 99_999):
        expected = head.clone()
        for i, (a, b) in enumerate(pairs):
            turn = complex(head[a], head[b]) * complex(math.cos(position / 10**i), math.sin(position / 10**i))
            expected[a], expected[b] = turn.real, turn.imag
        for turned in module(head.expand(1, 1, 2, 5), -head.expand(1, 3, 2, 5), offset=position):
            assert torch.allclose(turned[..., 0, :].abs(), expected.abs(), rtol=1e-6, atol=1e-6)


def test_rotary_scores_depend_on_distance() -> None:
    module = nn.PositionalEncoding(8, 300, kind="rotary")
    query, key = (torch.randn(1, 1, 1, 8).expand(1, 1, 300, 8) for _ in range(2))
    query, key = module(query, key)
    scores = (query @ key.mT)[0, 0]
    for distance in (-200, -1, 0, 57):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)


def test_learned() -> None:
    module = nn.PositionalEncoding(64, 200, kind="learned", batch_first=True)
    assert list(module.state_dict()) == ["weight"] and module.weight.shape == (200, 64)
    assert abs(module.weight.mean()) < 1e-3 and abs(module.weight.std() - 0.02) < 1e-3
    x = torch.randn(2, 3, 64)
    output = module(x, offset=5)
    torch.testing.assert_close(output, x + module.weight[5:8])
    output.sum().backward()
    expected = torch.zeros(200, 64)
    expected[5:8] = 2.0
    assert torch.equal(module.weight.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_offset_continues_the_sequence(kind: str) -> None:
    module = nn.PositionalEncoding(8, 12, kind=kind, **batch_first(kind))
    x = torch.randn(2, 12, 8)
    whole = encode(module, x)
    parts = [encode(module, x[:, :5])] + [encode(module, x[:, i : i + 1], offset=i) for i in range(5, 12)]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_layouts(kind: str) -> None:
    batched = nn.PositionalEncoding(8, 12, kind=kind, batch_first=True)
    transposed = nn.PositionalEncoding(8, 12, kind=kind)
    transposed.load_state_dict(batched.state_dict())
    x = torch.randn(2, 5, 8)
    expected = batched(x)
    assert torch.equal(transposed(x.transpose(0, 1)), expected.transpose(0, 1))
    for module in (batched, transposed):
        assert torch.equal(module(x[0]), expected[0])
    assert not torch.equal(expected[:, 0] - x[:, 0], expected[:, 1] - x[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_casts_keep_the_fixed_tables_exact(kind: str) -> None:
    module = nn.PositionalEncoding(8, 1000, kind=kind, **batch_first(kind))
    tables = dict(module.named_buffers())
    assert set(tables) == {"sinusoidal": {"table"}, "learned": set(), "rotary": {"cos", "sin"}}[kind]
    assert kind == "learned" or not module.state_dict()
    for cast in (copy.deepcopy(module).bfloat16(), copy.deepcopy(module).half().float()):
        for name, table in cast.named_buffers():
            assert torch.equal(table, tables[name]) and table.dtype == torch.float32
    for name, table in copy.deepcopy(module).half().double().named_buffers():
        assert table.dtype == torch.float64
        assert torch.equal(table.float(), tables[name]) and not torch.equal(table, tables[name].double())
    x = torch.randn(2, 3, 8).bfloat16()
    assert encode(module.bfloat16(), x).dtype == torch.bfloat16
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_meta(kind: str) -> None:
    module = nn.PositionalEncoding(8, 12, kind=kind, **batch_first(kind))
    x = torch.randn(2, 5, 8)
    expected = encode(module, x)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(copied) == repr(module)
        assert torch.equal(encode(copied, x), expected)
    meta = nn.PositionalEncoding(8, 12, kind=kind, device="meta", **batch_first(kind))
    assert all(table.is_meta for table in (*meta.parameters(), *meta.buffers()))
    meta.to_empty(device="cpu").load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(encode(meta, x), expected)


def test_dropout_only_while_training() -> None:
    module = nn.PositionalEncoding(8, 12, dropout=0.5)
    x = torch.randn(5, 2, 8)
    torch.manual_seed(1)
    dropped = module(x)
    torch.manual_seed(1)
    kept = module.eval()(x)
    torch.testing.assert_close(dropped, F.dropout(kept, 0.5))
    assert torch.equal(module(x), kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "relative"}, "kind is 'relative', must be one of sinusoidal, learned, rotary"),
        ({"d_model": 0}, "d_model is 0"),
        ({"kind": "rotary", "d_model": 7}, "d_model is 7, must be positive, and even"),
        ({"max_length": 0}, "max_length is 0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"base": 0.0}, "base is 0.0"),
        ({"kind": "rotary", "dropout": 0.1}, "dropout is 0.1, must be left at its default for kind 'rotary'"),
        ({"kind": "rotary", "batch_first": True}, "batch_first is True, must be left"),
        ({"interleaved": True}, "interleaved is True, must be False for kind 'sinusoidal'"),
        ({"kind": "learned", "base": 2.0}, "base is 2.0, must be left"),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nn.PositionalEncoding(**{"d_model": 8, "max_length": 12, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_inputs(kind: str) -> None:
    module = nn.PositionalEncoding(8, 12, kind=kind, **batch_first(kind))
    for length, offset, message in ((13, 0, "0 to 12"), (5, 8, "8 to 12"), (5, -1, "-1 to 3")):
        with pytest.raises(ValueError, match=rf"positions {message}, must be in \[0, 12\)"):
            encode(module, torch.randn(2, length, 8), offset=offset)
    x = torch.randn(2, 1, 5, 8)
    if kind == "rotary":
        with pytest.raises(TypeError, match="key is None, must be a Tensor"):
            module(x)
        return
    with pytest.raises(TypeError, match="key is given, must be None"):
        module(x[0], x[0])
    with pytest.raises(ValueError, match=r"input has shape \(2, 1, 5, 8\)"):
        module(x)
    with pytest.raises(ValueError, match=r"input has shape \(2, 5, 9\), .*end in 8"):
        module(torch.randn(2, 5, 9))
