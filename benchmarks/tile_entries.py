"""The tiles in the Triton kernels' tables that a GPU's 16-bit operations use, and which others are worth a try.

A neighbour has block sizes half or twice as large, other warps or a stage more or less, within the tables' budget: the
shared memory and the registers of its sums, by formulas that count what is largest. What they overlook, the compiler
says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer.triton_kernels import attention_tiles, feed_forward, gemm, linear_cross_entropy

from . import gpu_calls
from .gpu_calls import Draw
from .timing import Call, Staged

DTYPE = torch.bfloat16
BYTES = 2  # an element
#: Bytes of shared memory that each device of a table's class has.
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
#: Float32 registers of a thread for sums; or as many as the table's own tile takes, where it takes more.
SUMS = 128
WARP = 32  # threads
MOST = 10  # neighbours of a tile that are tried

AnyTile = attention_tiles.Tile | gemm.Tile


class Use(NamedTuple):
    """What one program of a kernel holds."""

    sums: int  # float32
    shared: int  # bytes


class Blocks(NamedTuple):
    """The smallest and the largest block size that a kernel takes."""

    least: int
    most: int


ATTENTION_BLOCKS = Blocks(16, 128)  # see attention_tiles.FAR
PRODUCT_BLOCKS = Blocks(32, 256)  # more than 256 rows is no tensor descriptor's


class Sizes(NamedTuple):
    """Of the operations that are timed: large enough for the kernels' time to hide the host's."""

    batch: int = 4
    heads: int = 16
    tokens: int = 4096
    rows: int = 8192
    columns: int = 2048
    hidden: int = 8192
    words: int = 32768


@dataclass(frozen=True)
class Entry:
    """A tile in a table, and the operation that is timed with it."""

    name: str
    table_name: str  # with its module in triton_kernels
    table: dict[Any, Any]
    key: tuple[str | int, ...]  # of the row; the architecture comes first
    part: str  # of the row's Tiles; empty if the row is a tile
    blocks: Blocks
    use: Callable[[Any], Use]  # of a tile
    make: Callable[[], Call]  # draws the inputs of the operation

    @property
    def own(self) -> AnyTile:
        """What stands in the table."""
        row = self.table[self.key]
        return getattr(row, self.part) if self.part else row

    def row(self, tile: AnyTile) -> Any:
        """The table's row with this tile in the place of its own."""
        return self.table[self.key]._replace(**{self.part: tile}) if self.part else tile

    @contextmanager
    def using(self, tile: AnyTile) -> Iterator[None]:
        """This tile in the table, and then again what stood there."""
        kept = self.table[self.key]
        self.table[self.key] = self.row(tile)
        try:
            yield
        finally:
            self.table[self.key] = kept

    def candidates(self) -> list[AnyTile]:
        """The first neighbours of its own tile that are within the budget, at most MOST."""
        return [tile for tile in neighbours(self.own) if self.fits(tile)][:MOST]

    def fits(self, tile: AnyTile) -> bool:
        """Whether a tile is within the budget."""
        use = self.use(tile)
        return (
            tile.num_stages >= 1
            and all(self.blocks.least <= size <= self.blocks.most for size in block_sizes(tile).values())
            and use.shared <= SHARED[self.key[0]]
            and self._sums(tile) <= max(SUMS, self._sums(self.own))
        )

    def _sums(self, tile: AnyTile) -> float:
        return self.use(tile).sums / (WARP * tile.num_warps)


def fields_of(tile: AnyTile) -> dict[str, int]:
    """Its numbers by name."""
    return dataclasses.asdict(tile) if dataclasses.is_dataclass(tile) else tile._asdict()


def block_sizes(tile: AnyTile) -> dict[str, int]:
    """Those of its numbers that say what a program computes, and in which steps."""
    return {name: size for name, size in fields_of(tile).items() if name.startswith("block")}


def label(tile: AnyTile) -> str:
    """Short: "128x64x64 w8 s3"."""
    return f"{'x'.join(map(str, block_sizes(tile).values()))} w{tile.num_warps} s{tile.num_stages}"


def source(row: AnyTile | attention_tiles.Tiles) -> str:
    """A row as it stands in its table."""
    if isinstance(row, attention_tiles.Tiles):
        return f"Tiles({', '.join(map(source, row))})"
    if isinstance(row, attention_tiles.Tile):
        return f"Tile({', '.join(map(str, row))})"
    blocks = ", ".join(map(str, block_sizes(row).values()))
    return f"Tile({blocks}, num_warps={row.num_warps}, num_stages={row.num_stages})"


def neighbours(tile: AnyTile) -> list[AnyTile]:
    """Whatever their use; those with one number changed come first."""
    warps = {"num_warps": 4 if tile.num_warps == 8 else 8}
    stages = [{"num_stages": tile.num_stages + step} for step in (1, -1)]
    halved = [{name: size // 2} for name, size in block_sizes(tile).items()]
    doubled = [{name: 2 * size} for name, size in block_sizes(tile).items()]
    changes = [
        *stages,
        *halved,
        *doubled,
        warps,
        *(change | warps for change in (*halved, *doubled)),  # as many sums a thread as before
        *(more | less for more, less in product(doubled, halved) if more.keys() != less.keys()),
    ]
    return [type(tile)(**fields_of(tile) | change) for change in changes]


def entries(device: torch.device, dtype: torch.dtype = DTYPE, sizes: Sizes | None = None) -> list[Entry]:
    """Those of a device's rows, most important first; without rows that the tables don't have."""
    sizes = sizes or Sizes()

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, device=device, dtype=dtype)

    def attention(part: str, head_dim: int) -> Entry:
        key = (attention_tiles.architecture(device), head_dim, BYTES, 0)
        make = gpu_calls.attention if part == "forward" else partial(gpu_calls.backward, gpu_calls.attention)
        shape = (sizes.batch, sizes.heads, sizes.tokens, head_dim)
        return Entry(
            f"attention {part} d{head_dim}", "attention_tiles.TILES", attention_tiles.TILES, key, part,
            ATTENTION_BLOCKS, partial(ATTENTION_USES[part], head_dim), partial(make, *shape, draw),
        )  # fmt: skip

    def products(name: str, module: Any, table: str, make: Callable[[Draw], Call], weights: int = 1) -> Entry:
        key = (gemm.device_class(torch.empty(0, device=device)), BYTES)
        table_name = f"{module.__name__.rpartition('.')[2]}.{table}"
        use = partial(_product_use, weights)
        return Entry(name, table_name, getattr(module, table), key, "", PRODUCT_BLOCKS, use, partial(make, draw))

    layer = partial(gpu_calls.feed_forward, sizes.rows, sizes.columns, sizes.hidden)

    found = [
        attention("forward", 128),
        attention("forward", 64),
        products("feed-forward", feed_forward, "FORWARD_TILES", layer),
        *(attention(part, head_dim) for head_dim in (128, 64) for part in ("dkdv", "dq")),
        products("feed-forward, gated", feed_forward, "GATED_TILES", partial(layer, gated=True), weights=2),
        products("feed-forward backward", feed_forward, "BACKWARD_TILES", partial(gpu_calls.backward, layer)),
        products("linear_cross_entropy", linear_cross_entropy, "LOSS_TILES", partial(_linear_cross_entropy, sizes)),
        products("accumulate", gemm, "ACCUMULATE_TILES", partial(_accumulate, sizes)),
    ]
    return [entry for entry in found if entry.key in entry.table]


def _forward_use(width: int, tile: attention_tiles.Tile) -> Use:
    """Sums of output and scores; query in shared memory, and key and value in each stage."""
    queries, keys = tile.block_q, tile.block_k
    return Use(queries * (width + keys), BYTES * width * (queries + tile.num_stages * 2 * keys))


def _dkdv_use(width: int, tile: attention_tiles.Tile) -> Use:
    """Sums of both gradients, the scores and theirs; key and value, and in each stage query and grad_output."""
    queries, keys = tile.block_q, tile.block_k
    return Use(2 * keys * (width + queries), BYTES * width * (2 * keys + tile.num_stages * 2 * queries))


def _dq_use(width: int, tile: attention_tiles.Tile) -> Use:
    """Sums of the gradient, the scores and theirs; query and grad_output, and in each stage key and value."""
    queries, keys = tile.block_q, tile.block_k
    return Use(queries * (width + 2 * keys), BYTES * width * (2 * queries + tile.num_stages * 2 * keys))


ATTENTION_USES = {"forward": _forward_use, "dkdv": _dkdv_use, "dq": _dq_use}


def _product_use(weights: int, tile: gemm.Tile) -> Use:
    """Of one operand's products with so many others."""
    stage = (tile.block_m + weights * tile.block_n) * tile.block_k
    return Use(weights * tile.block_m * tile.block_n, BYTES * tile.num_stages * stage)


def _linear_cross_entropy(sizes: Sizes, draw: Draw) -> Call:
    weight = draw(sizes.words, sizes.columns, scale=sizes.columns**-0.5)
    target = torch.randint(sizes.words, (sizes.rows,), device=weight.device)
    return partial(F.linear_cross_entropy, draw(sizes.rows, sizes.columns), weight, target, reduction="none")


def _accumulate(sizes: Sizes, draw: Draw) -> Call:
    """As linear_cross_entropy sums up the gradient of its weight, a chunk of rows at a time."""
    rows = linear_cross_entropy.chunk_rows(sizes.rows, sizes.columns, sizes.words)
    gradient, inputs = draw(rows, sizes.words), draw(rows, sizes.columns)

    def add(total: Tensor) -> Tensor:
        gemm.add_product(total, gradient, inputs)
        return total

    shape = (sizes.words, sizes.columns)
    return Staged(partial(torch.zeros, shape, device=gradient.device), add)
