import itertools
import sys
from types import SimpleNamespace

import cuda_support  # noqa: F401  which makes the emulated kernels known
import pytest
import torch
from support import needs_library

import fastformer
import fastformer.functional as F
from fastformer import backends
from fastformer.ops import _common


@pytest.fixture(autouse=True)
def _restore() -> None:
    before = backends.requested()
    yield
    backends.set_backend(before)


def test_requests_nest_and_are_undone() -> None:
    fastformer.set_backend("torch")
    with fastformer.backend("reference"):
        with fastformer.backend("auto"):
            assert backends.requested() == "auto"
        assert backends.requested() == "reference"
    assert backends.requested() == "torch"
    with pytest.raises(RuntimeError), fastformer.backend("auto"):
        raise RuntimeError
    assert backends.requested() == "torch"


def test_unknown_names() -> None:
    for ask in (fastformer.backend, fastformer.set_backend):
        with pytest.raises(ValueError, match="name is 'tpu', must be one of auto, triton, cuda, cpu, torch, reference"):
            ask("tpu")


def test_auto_takes_what_the_evidence_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "CPU_LIBRARY", True)
    measured = backends.Measurement("softmax", ("portable",), (torch.float32,), "2x", least=(10, 20))
    monkeypatch.setattr(backends, "FASTER", {("softmax", torch.float32): measured})
    monkeypatch.setattr(backends, "_decided", {})
    choice = backends.decide("softmax", "cpu", torch.float32, "auto")
    assert choice.kernel == "cpu" and "2x" in choice.reason
    assert "20 with gradients" in backends.decide("softmax", "cpu", torch.float32, "auto", small=True).reason
    for size, without, recorded in ((9, "torch", "torch"), (10, "cpu", "torch"), (20, "cpu", "cpu")):
        assert backends.choose("softmax", torch.ones(size)) == without
        assert backends.choose("softmax", torch.ones(size), record=True) == recorded
    assert backends.decide("softmax", "cpu", torch.bfloat16, "auto").kernel == "torch"
    assert backends.decide("layer_norm", "cpu", torch.float32, "auto").kernel == "torch"
    assert backends.decide("softmax", "mps", torch.float32, "auto").kernel == "torch"
    assert backends.decide("layer_norm", "cpu", torch.float32, "auto", torch_lacks="this").kernel == "cpu"
    choice = backends.decide("softmax", "cpu", torch.float32, "auto", unsupported="a kernel for float64")
    assert choice.kernel == "torch" and "float64" in choice.reason
    monkeypatch.setattr(backends, "CPU_LIBRARY", False)
    assert backends.decide("softmax", "cpu", torch.float32, "auto").kernel == "torch"


def test_evidence_holds_for_the_level_it_was_measured_at() -> None:
    assert backends.faster_at("avx2")["softmax", torch.float32].speedup == "1.2x to 1.3x"
    assert ("layer_norm", torch.bfloat16) in backends.faster_at("avx512_bf16")
    assert ("layer_norm", torch.bfloat16) not in backends.faster_at("avx2")
    assert ("linear", torch.bfloat16) not in backends.faster_at("avx512_bf16")
    assert backends.faster_at("portable") == backends.faster_at("") == {}


def test_a_request_that_cannot_be_met_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "CPU_LIBRARY", False)
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(backends, "CUDA_DEVICES", set())
    monkeypatch.setattr(backends, "CUDA_PROBLEM", "this installation was built without nvcc")
    for request, device, reason in (
        ("cpu", "cpu", "built without a C\\+\\+ compiler"),
        ("cpu", "cuda", "no kernels for cuda"),
        ("triton", "cpu", "Triton"),
        ("cuda", "cuda", "this installation was built without nvcc"),
        ("cuda", "cpu", "cuda has no kernels for cpu"),
    ):
        with pytest.raises(ValueError, match=reason):
            backends.decide("softmax", device, torch.float32, request)
    with pytest.raises(ValueError, match="can't run softmax: a kernel for torch"), fastformer.backend("triton"):
        monkeypatch.setattr(backends, "TRITON", True)
        monkeypatch.setattr(backends, "TRITON_INTERPRETED", True)
        F.softmax(torch.ones(3, dtype=torch.double), -1)


def test_cuda_kernels_are_there_for_some_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "CUDA_DEVICES", {"cuda"})
    for operation in ("softmax", "layer_norm", "add_layer_norm", "rms_norm", "rotary", "feed_forward_few_rows"):
        assert backends.decide(operation, "cuda", torch.float32, "cuda").kernel == "cuda"
    for operation in ("linear", "linear_few_rows"):
        with pytest.raises(ValueError, match=f"backend 'cuda' can't run {operation}: it has no CUDA C\\+\\+ kernels"):
            backends.decide(operation, "cuda", torch.float32, "cuda")
    for dtype in (torch.bfloat16, torch.float16):
        assert backends.decide("attention", "cuda", dtype, "cuda").kernel == "cuda"
    with pytest.raises(ValueError, match=r"can't run attention: its CUDA C\+\+ kernels have torch\.bfloat16 and"):
        backends.decide("attention", "cuda", torch.float32, "cuda")
    monkeypatch.setattr(backends, "TRITON", False)
    assert backends.decide("attention", "cuda", torch.bfloat16, "auto", torch_lacks="softcap").kernel == "cuda"
    assert backends.decide("attention", "cuda", torch.float32, "auto", torch_lacks="softcap").kernel == "torch"
    assert backends.decide("softmax", "cuda", torch.float32, "auto").kernel == "torch"


def test_raw_operators_prefer_cuda_for_long_rows_of_softmax_and_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    def preferred(operation: str, columns: int, dtype: torch.dtype) -> str:
        return backends.preferred(operation, torch.empty(2, columns, dtype=dtype, device="meta"))

    for operation in ("softmax", "layer_norm"):
        assert preferred(operation, 16384, torch.float32) == preferred(operation, 32768, torch.bfloat16) == "triton"
        assert preferred(operation, 16385, torch.float32) == preferred(operation, 32769, torch.bfloat16) == "cuda"
    assert preferred("rotary", 100_000, torch.float32) == "triton"
    assert all(row.reason for row in backends.PREFERENCES)

    on_gpu = SimpleNamespace(shape=torch.Size((2, 20_000)), element_size=lambda: 4, is_cuda=True, device="cuda:0")
    for capability, kernel in (((7, 5), "triton"), ((8, 0), "cuda"), ((12, 0), "cuda")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        assert backends.preferred("softmax", on_gpu) == kernel


@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_an_operator_with_several_kernels_runs_the_requested_one(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    registered = []
    compiled = SimpleNamespace(call_boxed=lambda keyset, *args: "compiled")
    monkeypatch.setattr(torch.library, "get_kernel", lambda *where: compiled)
    monkeypatch.setattr(_common, "_put", lambda name, key, run: registered.append(run))
    monkeypatch.setattr(_common, "_KERNELS", {})
    monkeypatch.setattr(backends, "CPU_LIBRARY", True)
    monkeypatch.setattr(backends, "CUDA_LIBRARY", True)
    _common.offer("softmax_forward", key, "triton", lambda *args: "triton")
    (run,) = registered
    short, long = torch.empty(2, 16384, device="meta"), torch.empty(2, 16385, device="meta")
    for request in backends.NAMES:
        with fastformer.backend(request):
            chosen = run(None, short), run(None, long)
        own = request == "cpu" if key == "CPU" else request == "cuda"
        if request == "triton":
            assert chosen == ("triton", "triton")
        elif own or key == "CPU":
            assert chosen == ("compiled", "compiled")
        else:
            assert chosen == ("triton", "compiled")


@pytest.mark.skipif("cpu" not in backends.CUDA_DEVICES, reason="without the emulator of the CUDA C++ kernels")
def test_cuda_kernels_run_in_the_emulator_forward_and_backward() -> None:
    emulator = sys.modules["fastformer_simt"]
    launches = [emulator.counters()["launches"]]
    x = torch.randn(3, 9, requires_grad=True)
    with fastformer.backend("cuda"):
        assert fastformer.explain(F.softmax, x, -1) == "softmax: cuda (requested)"
        y = F.softmax(x, -1)
    launches.append(emulator.counters()["launches"])
    y.square().sum().backward()
    launches.append(emulator.counters()["launches"])
    with fastformer.backend("cpu"):
        F.softmax(x, -1)
    launches.append(emulator.counters()["launches"])
    assert [after - before for before, after in itertools.pairwise(launches)] == [1, 1, 0]
    weight = torch.randn(4, 9)
    with fastformer.backend("cuda"):  # products are the library's, as under Triton
        assert torch.equal(F.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_explain_tells_without_running() -> None:
    x = torch.ones(2, 3)
    with fastformer.backend("reference"):
        assert fastformer.explain(F.softmax, x, -1) == "softmax: reference (requested)"
    assert fastformer.explain(F.softmax, x.double(), -1).startswith("softmax: torch (our kernels don't have")
    assert "leaves this function alone" in fastformer.explain(F.relu, x)
    with pytest.raises(TypeError, match="input is a list"):
        fastformer.explain(F.softmax, [1.0], -1)
    assert F.softmax(x, -1).shape == x.shape


def test_the_backward_runs_on_the_forwards_backend() -> None:
    """The request may have ended by the time of the backward pass."""
    x = torch.randn(3, 5, requires_grad=True)
    seen = []
    with fastformer.backend("cpu"):
        y = F.softmax(x, -1)
    x.register_hook(lambda grad: seen.append(grad))
    backends.set_backend("reference")
    y.sum().backward()
    assert len(seen) == 1 and backends.requested() == "reference"


@needs_library
def test_only_cpu_tensors_are_small() -> None:
    """Least sizes were measured on CPUs; a GPU's autocast changes dtypes, whatever the size."""
    x = torch.empty(4, 8)
    with fastformer.backend("auto"):
        assert backends.is_small("add_layer_norm", x) is (("add_layer_norm", torch.float32) in backends.FASTER)
        assert not backends.is_small("add_layer_norm", x.to("meta"))
