"""The feed-forward layer's products on Hopper, by wgmma and TMA (csrc/cuda/gemm_hopper.cuh).

In the emulator, which a test tells that it is a Hopper of a few multiprocessors, or on a GPU.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import Target, awkward, tensor
from test_feed_forward import ACTIVATIONS, FUSED_TARGETS, arguments, check_feed_forward, layer
from torch import Tensor

import fastformer

pytestmark = pytest.mark.skipif(not FUSED_TARGETS, reason="without the CUDA C++ kernels")
on_kernels = pytest.mark.parametrize("target", FUSED_TARGETS, ids=str)
on_emulator = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is as large as it is")
on_gated = pytest.mark.parametrize("gated", [False, True])
SetDevice = Callable[..., None]
Sizes = tuple[int, int, int, int]  # rows, input's width, hidden width, output's width
KERNEL = "gemm_hopper_kernel"


@contextlib.contextmanager
def device_of(multiprocessors: int, compute_capability: int = 90, kilobytes: int = 227) -> Iterator[None]:
    """Tells the emulator what device it is; nothing on a GPU."""
    if torch.cuda.is_available():
        yield
        return
    import simt

    emulator = simt.load()
    emulator.set_device(
        shared_bytes=kilobytes * 1024, multiprocessors=multiprocessors, compute_capability=compute_capability
    )
    try:
        yield
    finally:
        emulator.set_device()


@pytest.fixture
def set_device() -> Iterator[SetDevice]:
    """``device_of`` for the rest of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(device_of(*args, **kwargs))


def first_kernel(run: Callable[[], object]) -> str:
    """The name of the first kernel that is launched: the emulator loses its patience with it at once."""
    import simt

    emulator = simt.load()
    emulator.set_patience(accesses=1)
    try:
        with pytest.raises(RuntimeError):
            run()
    finally:
        emulator.set_patience()
    return emulator.findings()[0].kernel


def launches(run: Callable[[], object]) -> int:
    """How many kernels of ours it takes."""
    import simt

    emulator = simt.load()
    before = emulator.counters()["launches"]
    run()
    return emulator.counters()["launches"] - before


SMALL = [
    ((65, 136, 136, 136), "silu", 1),  # one block for all tiles, of which little more than half is filled
    ((128, 192, 192, 192), "gelu_tanh", 2),  # whole tiles and steps
    ((130, 200, 264, 136), "gelu", 3),  # tiles are no multiple of the blocks
    ((300, 136, 200, 264), "relu", 4),
]
#: With tiles for 132 multiprocessors in each product.
LARGE = [((1000, 1032, 2056, 1032), "silu", 132), ((4104, 520, 1544, 2064), "gelu", 132)]


@on_kernels
@on_gated
@pytest.mark.parametrize(
    ("sizes", "activation", "multiprocessors"), LARGE if torch.cuda.is_available() else SMALL, ids=str
)
def test_edges_of_tiles(
    target: Target, sizes: Sizes, activation: str, multiprocessors: int, gated: bool, set_device: SetDevice
) -> None:
    set_device(multiprocessors)
    check_feed_forward(target, arguments(target, sizes[:1], *sizes[1:], gated=gated), activation)


@on_kernels
@pytest.mark.parametrize(
    ("sizes", "gated", "multiprocessors", "splits"),  # splits: products whose depth is in parts
    [
        ((70, 2056, 136, 136), False, 2, 1),  # the first
        ((70, 2056, 104, 136), True, 4, 1),
        ((70, 136, 136, 2056), False, 2, 1),  # the gradient by the activated values, with sums over its columns
        ((70, 136, 136, 2056), True, 2, 1),
        ((260, 136, 136, 2056), False, 8, 1),  # the same by clusters
        ((70, 136, 1544, 136), True, 3, 1),  # input's gradient: the second of three parts is of both weights
        ((70, 136, 2056, 136), True, 4, 2),  # the same of four parts, and the second
        ((70, 136, 2048, 136), True, 4, 2),  # the second part ends where the first weight does
        ((2056, 136, 136, 136), False, 4, 2),  # the weights' gradients
        ((2056, 136, 136, 136), True, 6, 2),
    ],
    ids=str,
)
def test_split_depths(
    target: Target, sizes: Sizes, gated: bool, multiprocessors: int, splits: int, set_device: SetDevice
) -> None:
    set_device(multiprocessors)
    inputs = arguments(target, sizes[:1], *sizes[1:], gated=gated)
    check_feed_forward(target, inputs, "gelu")
    if target.slow:
        leaves = [x if x is None else x.requires_grad_() for x in inputs]
        with fastformer.backend(target.backend):
            assert launches(lambda: layer("gelu")(*leaves).sum().backward()) == 6 + splits


@on_kernels
@given(
    rows=st.integers(1, 300),
    widths=st.tuples(*[st.integers(1, 36)] * 3),
    activation=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    bias=st.booleans(),
    multiprocessors=st.integers(1, 3),
)
def test_any_shape_of_tiles(
    target: Target,
    rows: int,
    widths: tuple[int, int, int],
    activation: str,
    gated: bool,
    bias: bool,
    multiprocessors: int,
) -> None:
    with device_of(multiprocessors):
        C, hidden, C2 = (8 * width for width in widths)
        check_feed_forward(target, arguments(target, (rows,), C, hidden, C2, gated=gated, bias=bias), activation)


@on_kernels
@on_gated
def test_layouts(target: Target, gated: bool, set_device: SetDevice) -> None:
    set_device(2)
    C, hidden, C2 = 136, 264, 144
    inputs = arguments(target, (70,), C, hidden, C2)
    inputs[0] = awkward(target, 2, 35, C).transpose(0, 1)
    inputs[1] = tensor(target, hidden, 2 * C, scale=C**-0.5)[:, :C]  # rows further apart than they are long
    inputs[3] = tensor(target, hidden, C2, scale=hidden**-0.5).t()
    inputs[2], inputs[4] = tensor(target, 1).expand(hidden), tensor(target, C2 + 1)[1:]
    if gated:
        inputs[5] = tensor(target, hidden, 3 * C, scale=C**-0.5)[:, C : 2 * C]
    check_feed_forward(target, inputs, "gelu")


@on_kernels
@on_gated
def test_only_what_needs_a_gradient_gets_one(target: Target, gated: bool, set_device: SetDevice) -> None:
    set_device(2)
    inputs = [x for x in arguments(target, (70,), 136, 264, 144, gated=gated) if x is not None]

    def gradients(*needed: int) -> list[Tensor | None]:
        leaves = [x.detach().requires_grad_(i in needed) for i, x in enumerate(inputs)]
        with fastformer.backend(target.backend):
            layer("silu")(*leaves).sum().backward()
        return [x.grad for x in leaves]

    everything = gradients(*range(len(inputs)))
    for needed in ((0,), (1,), (2, 4)):
        some = gradients(*needed)
        assert all((x is not None) == (i in needed) for i, x in enumerate(some))
        assert all(x is None or torch.equal(x, everything[i]) for i, x in enumerate(some))


@on_emulator
@on_kernels
def test_all_products_of_both_passes_are_hoppers(target: Target, set_device: SetDevice) -> None:
    import simt

    def run(gated: bool) -> None:
        inputs = arguments(target, (70,), 136, 264, 144, gated=gated)
        leaves = [x if x is None else x.requires_grad_() for x in inputs]
        y = layer("gelu")(*leaves)
        assert KERNEL in first_kernel(lambda: layer("gelu")(*leaves))
        assert KERNEL in first_kernel(lambda: torch.autograd.grad(y.sum(), leaves[0], retain_graph=True))
        y.sum().backward()

    set_device(2)
    with fastformer.backend(target.backend):
        run(gated=False)
        run(gated=True)
    emulator = simt.load()
    element = "BFloat16" if target.dtype == torch.bfloat16 else "Half"
    named = {address: name for address, name in emulator.kernels().items() if f"{KERNEL}<fastformer::{element}" in name}
    assert len(named) == 7
    assert named.keys() <= set(emulator.launched())


@on_emulator
@on_kernels
@pytest.mark.parametrize(
    ("sizes", "options", "is_hoppers"),
    [
        ((70, 136, 136, 8), {}, True),
        ((70, 136, 136, 8), {"compute_capability": 80}, False),
        ((70, 136, 136, 8), {"compute_capability": 100}, False),
        ((70, 136, 136, 8), {"kilobytes": 163}, False),
        ((64, 136, 136, 8), {}, False),  # half of a tile's rows
        ((70, 136, 96, 8), {}, False),  # half of its columns
        ((70, 136, 96, 8), {"gated": True}, True),  # of each of two products
        ((70, 136, 48, 8), {"gated": True}, False),
        ((70, 136, 136, 8), {"multiprocessors": 2}, True),
        ((70, 136, 136, 8), {"multiprocessors": 3}, False),  # more than twice the tiles
        ((70, 2048, 136, 8), {"multiprocessors": 3}, True),  # two parts
        ((70, 2048, 136, 8), {"multiprocessors": 5}, False),
        ((1024, 2048, 1024, 8), {"multiprocessors": 132}, True),  # two parts, though one is as good: that is few blocks
        ((70, 136, 136, 8), {"overlapping": True}, False),
    ],
    ids=str,
)
def test_which_products_are_hoppers(
    target: Target, sizes: Sizes, options: dict, is_hoppers: bool, set_device: SetDevice
) -> None:
    options = {"multiprocessors": 1} | options
    inputs = arguments(target, sizes[:1], *sizes[1:], gated=options.pop("gated", False))
    if options.pop("overlapping", False):
        inputs[1] = tensor(target, 1, sizes[1]).expand(sizes[2], sizes[1])
    set_device(**options)
    with fastformer.backend(target.backend):
        assert (KERNEL in first_kernel(lambda: layer("gelu")(*inputs))) == is_hoppers


@on_emulator
@on_kernels
@pytest.mark.parametrize(
    ("rows", "multiprocessors", "blocks", "cluster"),
    [
        (256, 2, 2, 2),
        (128, 2, 1, 1),  # nothing below the tile
        (256, 1, 1, 1),
        (384, 3, 3, 1),  # pairs would take two turns
        (384, 4, 4, 2),  # the last one's second block has no rows
    ],
)
def test_which_products_are_made_by_clusters(
    target: Target, rows: int, multiprocessors: int, blocks: int, cluster: int, set_device: SetDevice
) -> None:
    import simt

    inputs = arguments(target, (rows,), 72, 72, 136, gated=False)
    set_device(multiprocessors)
    with fastformer.backend(target.backend):
        layer("relu")(*inputs)
    assert simt.load().last_launch() == {"blocks": blocks, "cluster": cluster}


@on_emulator
@on_kernels
@pytest.mark.parametrize(
    ("rows", "hidden", "multiprocessors", "launched"),
    [
        (70, 2056, 2, 3),  # the second product in two parts
        (70, 1928, 2, 2),  # which would be of less than 1024
        (384, 2056, 2, 3),  # three turns of half, not two of all
        (256, 2056, 2, 2),  # one turn already
    ],
)
def test_which_depths_are_in_parts(
    target: Target, rows: int, hidden: int, multiprocessors: int, launched: int, set_device: SetDevice
) -> None:
    inputs = arguments(target, (rows,), 72, hidden, 136, gated=False)
    set_device(multiprocessors)
    with fastformer.backend(target.backend):
        assert launches(lambda: layer("relu")(*inputs)) == launched
