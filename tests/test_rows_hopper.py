"""Softmax and layer norm of rows that the blocks of a cluster share (csrc/cuda/rows_hopper.cuh).

In the emulator, which is told that it is a Hopper with just so much shared memory, or on a GPU, with rows as wide as it
takes.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from cuda_support import CUDA_TARGETS
from support import Target, awkward, tensor
from test_feed_forward_hopper import device_of, first_kernel
from test_layer_norm import check_norm
from test_softmax import check_softmax
from torch import Tensor

import fastformer
import fastformer.functional as F

pytestmark = pytest.mark.skipif(not CUDA_TARGETS, reason="without the CUDA C++ kernels")
on_kernels = pytest.mark.parametrize("target", CUDA_TARGETS, ids=str)
on_accesses = pytest.mark.parametrize("widest", [True, False], ids=["widest accesses", "single elements"])
on_emulator = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU is as large as it is, and doesn't say what ran"
)

#: Bytes of shared memory that a block of a cluster has beside its part of a row, for sums.
SUMS = 320
#: Columns are shared out in multiples of this.
MULTIPLE = 64
#: A cluster's blocks, and a number that no cluster has. Of one width, a forward pass has half as many as a backward
#: pass, which keeps two rows.
BLOCKS = [2, 4, 8, 16]


def set_shared(shared_bytes: int, compute_capability: int = 90) -> None:
    import simt

    simt.load().set_device(shared_bytes=shared_bytes, multiprocessors=3, compute_capability=compute_capability)


def bytes_of(cols: int, column_bytes: int, blocks: int) -> int:
    """The shared memory that each of so many blocks wants for its part."""
    return SUMS + -(-cols // (MULTIPLE * blocks)) * MULTIPLE * column_bytes


def narrowest(target: Target, widest: bool) -> int:
    """Columns that registers don't hold, neither forward nor backward."""
    size = target.dtype.itemsize
    return 4 * 8192 // size + 16 // size if widest else 8201


Columns = Callable[[Target, bool, int, int], int]


@pytest.fixture
def columns() -> Iterator[Columns]:
    """The columns of rows that just fit in so many blocks, which have to keep so many tensors of them."""

    def choose(target: Target, widest: bool, blocks: int, kept: int) -> int:
        column_bytes = kept * target.dtype.itemsize
        if torch.cuda.is_available():
            each = (227 * 1024 - SUMS) // (column_bytes * MULTIPLE) * MULTIPLE
            return blocks * each - (not widest)
        cols = narrowest(target, widest)
        set_shared(bytes_of(cols, column_bytes, blocks))
        return cols

    with device_of(3):  # and then again what it was
        yield choose


@on_kernels
@on_accesses
@pytest.mark.parametrize("blocks", BLOCKS)
def test_softmax(target: Target, widest: bool, blocks: int, columns: Columns) -> None:
    cols = columns(target, widest, blocks, 2)
    check_softmax(target, tensor(target, 2, cols, scale=3.0))


MASKS: dict[str, Callable[[Target, int], Tensor]] = {
    "boolean": lambda target, cols: torch.rand(2, cols, device=target.device) > 0.5,
    "for one block": lambda target, cols: torch.arange(cols, device=target.device) > cols - 200,
    "of the row": lambda target, cols: torch.tensor([[True], [False]], device=target.device),
    "added": lambda target, cols: tensor(target, 2, cols),
    "float32": lambda target, cols: tensor(target, 2, cols).float(),
    "strided": lambda target, cols: awkward(target, 2, cols),
}


@on_kernels
@on_accesses
@pytest.mark.parametrize("mask", [*MASKS, "causal"])
def test_masks(target: Target, widest: bool, mask: str, columns: Columns) -> None:
    cols = columns(target, widest, 4, 1)
    values = MASKS[mask](target, cols) if mask in MASKS else None
    check_softmax(target, tensor(target, 2, cols), values, is_causal=values is None, scale=0.5)


@on_kernels
@on_accesses
@pytest.mark.parametrize("blocks", BLOCKS)
def test_layer_norm(target: Target, widest: bool, blocks: int, columns: Columns) -> None:
    cols = columns(target, widest, blocks, 2)
    x, residual = tensor(target, 2, cols), tensor(target, 2, cols)
    if blocks > 4:  # the gradient of weight takes more shared memory than this device has
        check_norm(target, x + 0.5, residual=residual)
        check_norm(target, x, rms=True)
        return
    weight, bias = tensor(target, cols), tensor(target, cols)
    check_norm(target, x + 0.5, residual=residual, weight=weight, bias=bias)
    check_norm(target, x, weight=weight.float(), rms=True)


@on_kernels
@on_accesses
def test_rows_that_are_parts_of_others(target: Target, widest: bool, columns: Columns) -> None:
    cols = columns(target, widest, 4, 2)
    x, residual = tensor(target, 3, 2 * cols)[:, :cols], tensor(target, 3, cols + 8)[:, 8:]
    check_softmax(target, x)
    check_norm(target, x, residual=residual)
    check_norm(target, awkward(target, 3, cols), residual=tensor(target, 1, cols).expand(3, cols))


@on_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_with_one_bad_value(target: Target, value: float, columns: Columns) -> None:
    """Which one block has: all of them learn it, and only those of its row."""
    x = tensor(target, 3, columns(target, True, 4, 1))
    x[1, -5] = value
    with fastformer.backend(target.backend):
        for y in (F.softmax(x, -1), F.layer_norm(x, x.shape[1:])):
            assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


def softmax(x: Tensor) -> Tensor:
    return F.softmax(x, -1)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


@on_emulator
@on_kernels
@on_accesses
@pytest.mark.parametrize("function", [softmax, norm])
@pytest.mark.usefixtures("columns")
def test_which_rows_a_cluster_shares(target: Target, widest: bool, function: Callable[[Tensor], Tensor]) -> None:
    """Those that don't fit in a block, up to those that don't fit in eight."""
    size = target.dtype.itemsize
    x = tensor(target, 1, narrowest(target, widest)).requires_grad_()

    def is_shared(column_bytes: int, shared_bytes: int, compute_capability: int = 90) -> bool:
        set_shared(shared_bytes, compute_capability)
        with fastformer.backend(target.backend):
            if column_bytes == size:
                name = first_kernel(lambda: function(x.detach()))
            else:
                y = function(x)
                name = first_kernel(lambda: torch.autograd.grad(y.sum(), x))
        assert "_looped<" in name
        return ", -1>" in name

    for column_bytes in (size, 2 * size):
        one_block = x.shape[1] * column_bytes + 256
        eight_blocks = bytes_of(x.shape[1], column_bytes, 8)
        assert not is_shared(column_bytes, one_block)
        assert is_shared(column_bytes, one_block - 1)
        assert is_shared(column_bytes, eight_blocks)
        assert not is_shared(column_bytes, eight_blocks - 1)
        for compute_capability in (80, 100):
            assert not is_shared(column_bytes, eight_blocks, compute_capability)


@on_emulator
@on_kernels
def test_as_few_blocks_share_a_row_as_hold_it(target: Target, columns: Columns) -> None:
    import simt

    counters = simt.load().counters
    switches = []  # from thread to thread: of the same row as many for each block
    for blocks in (2, 4, 8):
        x = tensor(target, 1, columns(target, True, blocks, 1))
        before = counters()["switches"]
        with fastformer.backend(target.backend):
            softmax(x)
        switches.append(counters()["switches"] - before)
    assert switches[2] / switches[1] == pytest.approx(2, rel=0.1)
    assert switches[1] / switches[0] == pytest.approx(2, rel=0.1)


@on_kernels
def test_the_same_bits_each_time(target: Target, columns: Columns) -> None:
    cols = columns(target, True, 4, 2)
    x, grad = tensor(target, 2, cols), tensor(target, 2, cols)

    def results(seed: int | None) -> list[Tensor]:
        if not torch.cuda.is_available():
            import simt

            simt.load().set_seed(seed)
        found = []
        with fastformer.backend(target.backend):
            for function in (softmax, norm):
                leaf = x.detach().requires_grad_()
                y = function(leaf)
                found += [y, *torch.autograd.grad(y, leaf, grad)]
        return found

    first = results(None)
    for seed in (1, 2, 3, None):
        assert all(torch.equal(a, b) for a, b in zip(first, results(seed), strict=True))
