"""What models and generation check of their arguments: each error names the argument, what it was, what it must be.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32)  # what tokens, segments and lengths may be


def check_tensor(
    name: str,
    value: object,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> None:
    """TypeError unless it is a Tensor of one of the dtypes; ValueError unless it has the shape and is on the device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, must be a Tensor")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {value.dtype}, must be {wanted}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, must be {tuple(shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, must be on {device}")


def check_tokens(name: str, tokens: object, room: int | None = None) -> None:
    """TypeError or ValueError unless tokens are integers [B, S], one at least, and S at most ``room``, if given."""
    check_tensor(name, tokens, INTEGERS)
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"{name} has shape {tuple(tokens.shape)}, must be [B, S] with at least one token")
    if room is not None and tokens.shape[1] > room:
        raise ValueError(f"{name} end at position {tokens.shape[1]}, must be at most context_length, {room}")


def check_sequences(name: str, sequences: object) -> None:
    """TypeError or ValueError unless they are integers [B, S], or a list of B tensors of them, [S], on one device."""
    if isinstance(sequences, Tensor):
        check_tokens(name, sequences)
        return
    if not isinstance(sequences, Sequence):
        raise TypeError(f"{name} is a {type(sequences).__name__}, must be a Tensor or a list of them")
    if not sequences:
        raise ValueError(f"{name} is {sequences!r}, must have at least one sequence")
    for i, x in enumerate(sequences):
        check_tensor(f"{name}[{i}]", x, INTEGERS)
        if x.dim() != 1 or not len(x):
            raise ValueError(f"{name}[{i}] has shape {tuple(x.shape)}, must be [S] with at least one token")
        if x.device != sequences[0].device:
            raise ValueError(f"{name}[{i}] is on {x.device}, must be on {sequences[0].device} like {name}[0]")


def check_count(name: str, count: object, *, least: int, most: int | None = None) -> None:
    """TypeError or ValueError unless ``count`` is an integer in range."""
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{name} is a {type(count).__name__}, must be an int")
    if count < least:
        raise ValueError(f"{name} is {count}, must be at least {least}")
    if most is not None and count > most:
        raise ValueError(f"{name} is {count}, must be at most {most}")


def check_number(name: str, number: object) -> None:
    """TypeError unless ``number`` is one."""
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"{name} is a {type(number).__name__}, must be a number")
