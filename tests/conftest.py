"""Before fastformer is imported, no table of the user's is wanted, and without a GPU Triton's interpreter is."""

import os
import signal
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["FASTFORMER_TUNING"] = "off"  # the user's own tables choose kernels for their programs, not for tests

import pytest
import simt
from hypothesis import register_random, settings
from simt.every_kernel import pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown  # noqa: F401
from support import needs_library

import fastformer

# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start in order to interrupt them.
signal.signal(signal.SIGINT, signal.default_int_handler)


class TorchRandom:
    """torch's generator as hypothesis wants it: every example then starts from one seed, and can be repeated."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()
register_random(TORCH_RANDOM)

settings.register_profile("test", max_examples=20, deadline=None, derandomize=True)
settings.register_profile("fuzz", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("FASTFORMER_HYPOTHESIS_PROFILE", "test"))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names without addresses and in a fixed order: pytest-xdist wants the same in each of its processes."""
    nameable = isinstance(val, dict | set | frozenset | list | tuple | torch.Tensor) or callable(val)
    return _name(val) if nameable else None


def _name(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, dict):
        return ",".join(f"{key}={_name(item)}" for key, item in value.items()) or "default"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(_name(item) for item in value)) + "}"
    if isinstance(value, list | tuple):
        return "(" + ",".join(_name(item) for item in value) + ")"
    return getattr(value, "__name__", str(value)) if callable(value) else str(value)


@pytest.fixture(params=["auto", pytest.param("cpu", marks=needs_library)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Asked for during the test; auto leaves small tensors to torch."""
    with fastformer.backend(request.param):
        yield request.param


@pytest.fixture
def hopper() -> Iterator[ModuleType]:
    """The emulator as an H100."""
    module = simt.load()
    module.set_device(shared_bytes=227 * 1024, compute_capability=90)
    yield module
    module.set_seed(None)
    module.set_device()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """FASTFORMER_SIMT_SCHEDULES=20: each test of an operation with CUDA C++ kernels 20 times (`make simt`)."""
    schedules = int(os.environ.get("FASTFORMER_SIMT_SCHEDULES", "0"))
    if schedules and hasattr(metafunc.module, "on_kernels"):
        metafunc.parametrize("_schedule", range(schedules), indirect=True, ids="schedule{}".format)


@pytest.fixture(autouse=True)
def _schedule(request: pytest.FixtureRequest) -> Iterator[None]:
    """The emulator's threads run in an order drawn from a seed, or in their own without one."""
    emulator, seed = sys.modules.get("fastformer_simt"), getattr(request, "param", None)
    if emulator is None or seed is None:
        yield
        return
    emulator.set_seed(seed)
    yield
    emulator.set_seed(None)
