"""The cases of the benchmarks: sizes, counts of bytes and FLOPs, and peers that compute the same thing."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import peers_support
import pytest
import torch
import torch.nn.functional as torch_functional
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastformer import reference
from fastformer.benchmarks import peers
from fastformer.benchmarks.checking import as_tuple
from fastformer.benchmarks.harness import (
    BACKWARD,
    FORWARD,
    MODES,
    TRAINING,
    Case,
    CpuTimer,
    Limits,
    Pace,
    Row,
    run_case,
)
from fastformer.benchmarks.suite import TORCHS

MODULES = {
    name: import_module(f"fastformer.benchmarks.bench_{name}")
    for name in (
        "softmax",
        "layer_norm",
        "attention",
        "attention_window",
        "varlen_attn",
        "linear",
        "feed_forward",
        "linear_cross_entropy",
        "rotary",
    )
}
SUITES = {"cpu": ("quick", "cpu", "full"), "cuda": ("quick", "gpu", "full")}
DTYPES = (torch.float32, torch.bfloat16)
PACKAGES = {  # that have each operation
    "softmax": {"liger", "quack"},
    "layer_norm": {"liger", "quack"},
    "rms_norm": {"liger", "quack"},
    "add_layer_norm": set(),
    "add_rms_norm": {"liger", "quack"},
    "attention": {"flash-attn"},
    "attention_window": {"flash-attn"},
    "varlen_attn": {"flash-attn"},
    "linear": set(),
    "feed_forward": {"liger"},
    "linear_cross_entropy": {"liger", "quack"},
    "rotary": {"liger", "quack"},
}
# Tables of sizes that a CPU does in no time.
SMALL = {
    "softmax": {"ROWS": [(4, 16)], "CAUSAL": [(2, 8)], "MORE_ROWS": [], "MORE_CAUSAL": []},
    "layer_norm": {},  # in `small`: its tables have another level
    "attention": {
        "TRAINING_SHAPES": [((1, 4, 2, 32, 16), True), ((1, 2, 2, 32, 16), False)],
        "DECODING_SHAPES": [(2, 4, 2, 32, 16)],
        "MORE_TRAINING_SHAPES": [],
        "MORE_DECODING_SHAPES": [],
    },
    "attention_window": {"SHAPES": (1, 2, 2, 64, 16), "MORE": [((1, 4, 2, 64, 16), 8)]},
    "varlen_attn": {
        "PACKED": ((4, 2, 16), (5, 17, 1), True),
        "MORE_PACKED": ((2, 2, 16), (5, 9), False),
        "PAGED": ((4, 2, 16), 16, (33, 16)),
        "MORE_PAGED": ((4, 2, 16), 256, (300, 16)),
    },
    "linear": {"SHAPES": [(2, 16, 24), (40, 16, 24)], "MORE_SHAPES": []},
    "feed_forward": {
        "SHAPES": [(4, 16, 32, "gelu", False), (4, 16, 32, "gelu_tanh", True), (4, 16, 32, "silu", True)],
        "MORE_SHAPES": [],
    },
    "linear_cross_entropy": {"SHAPES": [(8, 16, 24), (8, 16, 25)], "MORE_SHAPES": []},
    "rotary": {"SHAPES": [(2, 4, 2, 8, 16)], "MORE_SHAPES": []},
}


@pytest.fixture
def fake_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    peers_support.plant(monkeypatch)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, tables in SMALL.items():
        for table, shapes in tables.items():
            monkeypatch.setattr(MODULES[name], table, {"cpu": shapes})
    layer_norm = MODULES["layer_norm"]
    monkeypatch.setattr(layer_norm, "SHAPES", {name: {"cpu": [(6, 16)]} for name in layer_norm.MORE_SHAPES})
    monkeypatch.setattr(layer_norm, "MORE_SHAPES", {})
    monkeypatch.setattr(MODULES["attention_window"], "WINDOWS", (None, 16))


def cases_of(name: str, device: str, suite: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Case]:
    return [case for dtype in dtypes for case in MODULES[name].cases(torch.device(device), dtype, suite)]


@pytest.mark.parametrize(
    "name, device", [(name, device) for device in SUITES for name in MODULES if name not in TORCHS[device]]
)
def test_every_case_is_whole(name: str, device: str) -> None:
    with FakeTensorMode():  # a device that may not be there
        by_suite = {suite: cases_of(name, device, suite, (torch.bfloat16,)) for suite in SUITES[device]}
        labels = {suite: [(case.operation, case.shape) for case in cases] for suite, cases in by_suite.items()}
        for suite in SUITES[device]:
            assert labels[suite][: len(labels["quick"])] == labels["quick"]
            assert max(Counter(labels[suite]).values()) == 1
        assert len(labels["full"]) > len(labels["quick"])
        assert [case.dtype for case in cases_of(name, device, "full")] == sorted(
            len(labels["full"]) * DTYPES, key=DTYPES.index
        )
        for case in by_suite["full"]:
            assert case.sizes and all(type(size) is int and size > 0 for size in case.sizes.values())
            assert callable(case.peers[case.judged_by])
            assert case.compiled is None or callable(case.peers[case.compiled])
            assert all(peer and (callable(peer) or isinstance(peer, str)) for peer in case.peers.values())
            inputs = case.inputs()
            assert all(x.device.type == device for x in inputs.values())
            assert all(x.dtype in (case.dtype, torch.int64) for x in inputs.values())
            assert any(x.requires_grad for x in inputs.values()) == (TRAINING in case.work)
            assert min(work.bytes for work in case.work.values()) > 0 < min(work.flops for work in case.work.values())


@pytest.mark.parametrize("name", MODULES)
def test_work_of_both_passes_is_that_of_each(name: str) -> None:
    with FakeTensorMode():
        cases = cases_of(name, "cpu" if name in TORCHS["cuda"] else "cuda", "full")
    for case in cases:
        if TRAINING not in case.work:
            assert set(case.work) == {FORWARD} and case.work[FORWARD].reads
        elif name == "linear_cross_entropy":  # what the passes share can't be told apart
            assert set(case.work) == {FORWARD, TRAINING}
        else:
            forward, backward, both = (case.work[mode] for mode in MODES)
            assert both.flops == forward.flops + backward.flops
            extra = both.bytes - forward.bytes - backward.bytes
            assert extra == (saved_hidden(case) if name == "feed_forward" else 0)


def saved_hidden(case: Case) -> int:
    """Bytes that feed_forward's forward pass leaves to the backward pass."""
    kept = 2 if case.shape.endswith("glu") else 1
    return kept * case.sizes["rows"] * case.sizes["hidden"] * case.dtype.itemsize


@pytest.mark.parametrize("name", ["linear", "feed_forward", "linear_cross_entropy"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    with FakeTensorMode():
        for case in cases_of(name, "cpu", "full", (torch.float32,)):
            forward, training = counted_flops(case)
            assert case.work[FORWARD].flops == forward
            assert TRAINING not in case.work or case.work[TRAINING].flops == training


def test_flops_of_attention_are_those_of_visible_pairs() -> None:
    with FakeTensorMode():
        cases = cases_of("attention", "cpu", "full", (torch.float32,))
        counted = [counted_flops(case) for case in cases]
    for case, (forward, training) in zip(cases, counted):
        length = case.sizes.get("length", 1)
        share = reference.causal_mask(length, length).double().mean().item() if "causal" in case.shape else 1.0
        assert case.work[FORWARD].flops == forward * share
        if TRAINING in case.work:  # eager keeps the weights; here the scores are computed again: a fifth product
            assert case.work[BACKWARD].flops == (training - forward) * share * 5 / 4


def counted_flops(case: Case) -> tuple[int, int]:
    """torch's count for the eager function: forward; forward and backward."""
    inputs = case.inputs()
    with FlopCounterMode(display=False) as counter:
        output = case.peers["eager"](**inputs)
    forward = counter.get_total_flops()
    if output.requires_grad:
        with counter:
            output.sum().backward()
    return forward, forward + counter.get_total_flops() if output.requires_grad else forward


# What the backward pass reads beyond the gradients of the outputs.
READ_AGAIN = {
    "softmax": ["output"],
    "layer_norm": ["input"],
    "rms_norm": ["input"],
    "add_layer_norm": ["output 1"],
    "add_rms_norm": ["output 1"],
    "attention": ["query", "key", "value", "output"],
    "attention_window": ["query", "key", "value", "output"],
    "varlen_attn": ["query", "key", "value", "output"],
    "linear": ["input", "weight"],
    "feed_forward": ["input", "weight1", "weight2", "weight_gate"],
    "rotary": [],
}


@pytest.mark.parametrize("name", MODULES)
def test_bytes_are_those_of_the_tensors(name: str) -> None:
    for case in cases_of(name, "cpu", "quick", (torch.bfloat16,)):
        if "softmax" in case.operation and "causal" in case.shape:
            continue  # see the next test
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs = case.inputs()
            outputs = as_tuple(case.peers[case.judged_by](**inputs))
        tensors = {f"output {i}" if i else "output": x for i, x in enumerate(outputs)} | inputs
        sizes = {key: x.numel() * x.itemsize for key, x in tensors.items()}
        if name == "varlen_attn" and "pages" in case.shape:  # of the cache, what is used
            row = case.sizes["kv_heads"] * inputs["key"].shape[-1] * case.dtype.itemsize
            sizes["key"] = sizes["value"] = case.sizes["keys"] * row
        forward = sum(sizes.values())
        # What a row of many shares is not counted: 3%
        assert case.work[FORWARD].bytes == pytest.approx(forward, rel=0.03)
        gradients = sum(sizes[key] for key, x in inputs.items() if x.requires_grad)
        if name == "linear_cross_entropy":
            assert case.work[TRAINING].bytes == pytest.approx(forward + gradients, rel=0.03)
        elif BACKWARD in case.work:
            if case.operation.startswith("add_"):
                gradients -= sizes["residual"]  # the same tensor
            grad_outputs = sum(size for key, size in sizes.items() if key.startswith("output"))
            read = sum(sizes.get(key, 0) for key in READ_AGAIN[case.operation])
            hidden = saved_hidden(case) if name == "feed_forward" else 0
            expected = grad_outputs + read + hidden + gradients
            assert case.work[BACKWARD].bytes == pytest.approx(expected, rel=0.03)


def test_causal_softmax_reads_what_is_visible(small: None) -> None:
    (case,) = (case for case in cases_of("softmax", "cpu", "quick", (torch.float32,)) if "causal" in case.shape)
    elements, visible = 2 * 8 * 8, 2 * int(reference.causal_mask(8, 8).sum())
    assert case.work[FORWARD].bytes == 4 * (visible + elements)
    assert case.work[BACKWARD].bytes == 4 * (2 * visible + elements)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", MODULES)
def test_small_cases_end_to_end(name: str, small: None, fake_packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is right, and each peer computes the same: outputs and gradients, with stand-ins for the packages."""
    monkeypatch.setattr(peers, "DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # of FlexAttention, which runs eagerly too
    for case in cases_of(name, "cpu", "full", (torch.bfloat16 if "att" in name else torch.float32,)):
        inputs = case.inputs()
        assert all(x.any() for x in inputs.values())
        for row in rows_of(case):
            assert row.problem == "" and row.ours is not None and row.sizes == case.sizes
            untimed = {peer: reason for peer, reason in row.peers.items() if isinstance(reason, str)}
            assert untimed == expected_reasons(case, row.mode)
            assert row.peers.keys() == case.peers.keys()
        packages = set() if case.operation == "softmax" and "causal" in case.shape else PACKAGES[case.operation]
        assert peers.PACKAGES.keys() & case.peers.keys() == packages


def rows_of(case: Case) -> list[Row]:
    limits = Limits({1024: 1e9}, {1024: 1e9}, dict.fromkeys(DTYPES, 1e9))
    pace = Pace(row_seconds=0.0, min_rounds=1, modes=MODES, skip=("compile",))
    return list(run_case(case, "cpu", CpuTimer(), limits, pace, random.Random(0)))


def expected_reasons(case: Case, mode: str) -> dict[str, str]:
    """Of the small cases: which peers can't run."""
    reasons = {name: peer for name, peer in case.peers.items() if isinstance(peer, str)}
    if mode != FORWARD:
        if "flex" in case.peers:
            reasons["flex"] = "NotImplementedError: FlexAttention has no backward pass on CPUs"
        if case.operation == "layer_norm":
            reasons["quack"] = "NotImplementedError: quack's layernorm has no backward pass for autograd"
    return reasons


def test_reasons_of_small_cases(small: None, fake_packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "DEVICES", ("cpu",))
    found = {
        (case.shape, name): peer
        for module in MODULES
        for case in cases_of(module, "cpu", "full", (torch.bfloat16,))
        for name, peer in case.peers.items()
        if isinstance(peer, str)
    }
    windows = ("1x2x64x16 causal", "1x2x64x16 window 16", "1x4/2x64x16 window 8")
    assert found == {
        ("4x16x32 gelu", "liger"): "has swiglu and geglu alone",
        ("2 x 1, pages of 16", "flash-attn"): "its pages hold a multiple of 256 keys",
        **{(shape, "eager"): "would hold the scores of all pairs" for shape in windows},
    }


class Imports:
    """What they raise, where a package of the benchmarks is looked for."""

    names = ("liger_kernel", "quack", "flash_attn")

    def __init__(self, error: Callable[[str], Exception]) -> None:
        self.error = error

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in self.names:
            raise self.error(name)

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in self.names:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "meta_path", [self, *sys.meta_path])


@pytest.mark.parametrize("error", [OSError, RuntimeError, AttributeError, TypeError])
def test_packages_that_are_broken(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as built for another torch: their imports raise anything."""
    Imports(lambda name: error("undefined\nsymbol")).plant(monkeypatch)
    reasons = peers.optional("rms_norm", torch.device("cuda"), torch.float16, eps=1e-5)
    assert reasons == {
        name: f"{module} can't be imported: {error.__name__}: undefined symbol"
        for name, module in (("liger", "liger_kernel"), ("quack", "quack"))
    }


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, half = torch.device("cuda"), torch.float16
    Imports(lambda name: ModuleNotFoundError(f"No module named {name!r}", name=name)).plant(monkeypatch)
    assert peers.optional("rms_norm", gpu, half, eps=1e-5) == {
        "liger": "not installed: pip install liger-kernel",
        "quack": "not installed: pip install quack-kernels",
    }
    missing = {"flash-attn": "not installed: pip install flash-attn"}
    assert peers.optional("attention", gpu, half, is_causal=True) == missing
    assert peers.optional("attention", gpu, torch.float32, is_causal=True) == {"flash-attn": "does not take float32"}
    assert peers.optional("attention", torch.device("cpu"), half, is_causal=True) == {"flash-attn": "needs a GPU"}
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))  # another release's
    reason = peers.optional("decoding", gpu, half)["flash-attn"]
    assert reason.startswith("flash_attn can't be imported: ") and "flash_attn_with_kvcache" in reason


def test_sdpa_kernels_by_name() -> None:
    query = torch.randn(1, 2, 8, 16, requires_grad=True)
    attend = torch_functional.scaled_dot_product_attention
    names = peers.sdpa(torch.device("cpu"), attend)
    assert list(names) == ["sdpa", "sdpa: math", "sdpa: flash"]
    assert list(peers.sdpa(torch.device("cuda"), attend))[1:] == [f"sdpa: {name}" for name in peers.SDPA_KERNELS]
    made = {name: function(query=query, key=query, value=query).grad_fn.name() for name, function in names.items()}
    assert "Flash" in made["sdpa: flash"] and "Flash" not in made["sdpa: math"]
