import pytest
import torch

import fastformer
import fastformer.functional as F
from fastformer import backends


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
    for request, device, reason in (
        ("cpu", "cpu", "built without a C\\+\\+ compiler"),
        ("cpu", "cuda", "no kernels for cuda"),
        ("triton", "cpu", "Triton"),
        ("cuda", "cuda", "no CUDA C\\+\\+ kernels"),
    ):
        with pytest.raises(ValueError, match=reason):
            backends.decide("softmax", device, torch.float32, request)
    with pytest.raises(ValueError, match="can't run softmax: a kernel for torch"), fastformer.backend("triton"):
        monkeypatch.setattr(backends, "TRITON", True)
        monkeypatch.setattr(backends, "TRITON_INTERPRETED", True)
        F.softmax(torch.ones(3, dtype=torch.double), -1)


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
