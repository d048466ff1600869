"""How a call's time grows with the length of a sequence and the width of a row: on one thread and all, or on a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import accuracy, functional, reference

from .harness import FORWARD, OURS, Pace, Row, Timer, measure, short_name

HEADS, HEAD_DIM = 12, 64
LENGTHS = {"cpu": (128, 256, 512, 1024, 2048, 4096), "cuda": (512, 1024, 2048, 4096, 8192, 16384)}
ELEMENTS = {"cpu": 3 * 2**20, "cuda": 2**26}  # in the rows of each width together
WIDTHS = {
    "cpu": (64, 128, 256, 512, 1024, 2048, 4096, 16384),
    "cuda": (256, 512, 1024, 2048, 4096, 8192, 16384, 65536),
}
CHECKED_QUERIES = 128  # of attention, the first ones and the last ones of each head


@dataclass(frozen=True)
class Point:
    """Seconds of one forward call at one size, ours and torch's."""

    operation: str
    dtype: str
    axis: str  # "length" or "width"
    size: int
    threads: int  # 0 on a GPU
    ours: float
    torch: float


@dataclass(frozen=True)
class Sizing:
    """One size of one operation: the two calls, and the part of an answer to compare with the right one."""

    operation: str
    axis: str
    size: int
    ours: Callable[[], Tensor]
    torch: Callable[[], Tensor]
    exact: Callable[[], Tensor]  # float64
    part: Callable[[Tensor], Tensor]


def count(device: torch.device, dtypes: Sequence[torch.dtype]) -> int:
    """How many points there are of one number of threads."""
    return len(dtypes) * (len(LENGTHS[device.type]) + 2 * len(WIDTHS[device.type]))


def points(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    threads: int,
    backend: str,
    timer: Timer,
    pace: Pace,
    rng: random.Random,
) -> Iterator[Point | Row]:
    """Attention over LENGTHS, softmax and layer_norm over WIDTHS, under the backend that is set.

    A wrong answer gives a row with the problem in place of the point. ``threads`` is 0 on a GPU.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        for dtype in dtypes:
            for sizing in _sizings(device, dtype):
                with torch.no_grad():
                    yield _point(sizing, dtype, threads, backend, timer, pace, rng)
    finally:
        torch.set_num_threads(before)


def _point(
    sizing: Sizing, dtype: torch.dtype, threads: int, backend: str, timer: Timer, pace: Pace, rng: random.Random
) -> Point | Row:
    verdict = accuracy.judge(sizing.part(sizing.ours()), sizing.part(sizing.torch()), sizing.exact())
    row = Row(sizing.operation, f"{sizing.axis} {sizing.size}", short_name(dtype), FORWARD, backend)
    if not verdict.ok:
        row.problem, row.error_share = f"wrong output: {verdict.share:.3g}x the allowed error", verdict.share
        return row
    timings = measure({OURS: sizing.ours, "torch": sizing.torch}, timer, pace, rng)
    failures = [f"{name}: {timing}" for name, timing in timings.items() if isinstance(timing, str)]
    if failures:
        row.problem = "; ".join(failures)
        return row
    seconds = {name: timing.median for name, timing in timings.items()}
    return Point(sizing.operation, short_name(dtype), sizing.axis, sizing.size, threads, **seconds)


def _sizings(device: torch.device, dtype: torch.dtype) -> Iterator[Sizing]:
    for length in LENGTHS[device.type]:
        inputs = torch.randn(3, 1, HEADS, length, HEAD_DIM, device=device, dtype=dtype).unbind()
        functions = (functional.scaled_dot_product_attention, torch_functional.scaled_dot_product_attention)
        calls = (partial(f, *inputs, is_causal=True) for f in functions)
        yield Sizing("attention", "length", length, *calls, partial(_ends_of_attention, *inputs), _ends)
    for width in WIDTHS[device.type]:
        make = partial(torch.randn, device=device, dtype=dtype)
        rows, (weight, bias) = make(ELEMENTS[device.type] // width, width), make(2, width)
        calls = (partial(m.softmax, rows, -1) for m in (functional, torch_functional))
        yield Sizing("softmax", "width", width, *calls, partial(reference.softmax, rows), lambda x: x)
        calls = (partial(m.layer_norm, rows, (width,), weight, bias) for m in (functional, torch_functional))
        exact = partial(lambda *inputs: reference.layer_norm(*inputs)[0], rows, None, weight, bias)
        yield Sizing("layer_norm", "width", width, *calls, exact, lambda x: x)


def _ends(output: Tensor) -> Tensor:
    """[B, H, S, D] -> the first and the last queries: all of them would take the reference S x S numbers a head."""
    return torch.cat((output[..., :CHECKED_QUERIES, :], output[..., -CHECKED_QUERIES:, :]), dim=-2)


def _ends_of_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    first = (x[..., :CHECKED_QUERIES, :] for x in (query, key, value))
    last = query[..., -CHECKED_QUERIES:, :]
    return torch.cat(
        (
            reference.attention(*first, is_causal=True)[0],
            reference.attention(last, key, value, is_causal=True, bottom_right=True)[0],
        ),
        dim=-2,
    )


def as_rows(found: Sequence[Point]) -> list[dict]:
    """The points as JSON holds them."""
    return [asdict(point) for point in found]
