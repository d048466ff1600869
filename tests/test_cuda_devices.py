"""The CUDA C++ kernels on devices of several sizes, in the emulator: launchers go by what a device has."""

from collections.abc import Callable, Iterator

import pytest
import torch
from cuda_support import CUDA_TARGETS
from support import Target, tensor
from test_layer_norm import check_norm
from test_linear_cross_entropy import check_loss, layer, targets_of
from test_softmax import check_softmax

TARGET, *LOW_PRECISION = (Target("cuda", "cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
SetDevice = Callable[..., None]

pytestmark = pytest.mark.skipif(TARGET not in CUDA_TARGETS, reason="without the emulator of the CUDA C++ kernels")


@pytest.fixture
def set_device() -> Iterator[SetDevice]:
    import simt

    emulator = simt.load()
    yield emulator.set_device
    emulator.set_device()


# What fits in shared memory, with what the sums of a block need, just so or no more: two rows (softmax's and layer
# norm's gradients), or the sums of the gradients of weight and bias; one row.
WIDTHS = {
    "sums fit": lambda limit: limit // 8 // 2048 * 2048,
    "two rows fit": lambda limit: limit // 8 - 32,
    "two rows don't": lambda limit: limit // 8 + 8,
    "a row fits": lambda limit: limit // 4 - 64,
    "a row doesn't": lambda limit: limit // 4 + 8,
}


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
@pytest.mark.parametrize("width", WIDTHS)
def test_shared_memory(set_device: SetDevice, kilobytes: int, width: str) -> None:
    set_device(shared_bytes=kilobytes * 1024)
    cols = WIDTHS[width](kilobytes * 1024)
    weight, bias = tensor(TARGET, cols), tensor(TARGET, cols)
    check_softmax(TARGET, tensor(TARGET, 1, cols))
    check_norm(TARGET, tensor(TARGET, 1, cols), residual=tensor(TARGET, 1, cols), rms=True)
    if "a row" not in width:
        check_norm(TARGET, tensor(TARGET, 2, cols), weight=weight, bias=bias)


@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
def test_multiprocessors(set_device: SetDevice, multiprocessors: int) -> None:
    set_device(multiprocessors=multiprocessors)
    for rows, cols in ((70, 24), (20, 200), (5, 2000), (3, 9000)):
        weight, bias = tensor(TARGET, cols), tensor(TARGET, cols)
        check_norm(TARGET, tensor(TARGET, rows, cols), residual=tensor(TARGET, rows, cols), weight=weight, bias=bias)
        check_norm(TARGET, tensor(TARGET, rows, cols), weight=weight, rms=True)
    for low in LOW_PRECISION:  # the sums of weight's gradient are more than one multiprocessor has threads
        for V, C in ((420, 40), (301, 41)):
            check_loss(low, layer(low, 90, C, V), targets_of(low, 90, V), reduction="none")
