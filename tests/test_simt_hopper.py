"""The emulator's Hopper: mbarriers, TMA and wgmma. Right kernels run as they should, each planted bug is found, and
where things lie is judged by `tensor_layouts`.

The kernels are those of tests/simt/kernels; "kernel: bug" is the kernel with that bug.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import pytest
import simt
import torch
from tensor_layouts import Layout, Swizzle, atoms_nv
from test_simt import Planted, expect_report, expect_silence, run

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="needs a C++ compiler")

SWIZZLE = Swizzle(3, 4, 3)  # of 128 bytes, on addresses of bytes
STEPS, DEPTH = 4, 16  # of wgmma.cu


# --- where matrices lie


def image_of(matrix: torch.Tensor, transposed: bool) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Shared memory, as 16-bit elements, with `matrix` [outer, depth] as a wgmma wants it; and its leading and stride
    bytes, and those from 16 steps of the depth to the next.

    The layouts are CUTLASS's canonical ones of the 128-byte swizzle (cute/arch/mma_sm90_desc.hpp), by elements.
    """
    outer, depth = matrix.shape
    stride = 8 * 64
    leading, step = (64 * depth, 2 * stride) if transposed else (0, 16)
    image = torch.zeros(outer * depth, dtype=matrix.dtype)
    image[places_in_image(outer, depth, transposed, leading, stride)] = matrix
    return image, (2 * leading, 2 * stride, 2 * step)


@functools.cache
def places_in_image(outer: int, depth: int, transposed: bool, leading: int, stride: int) -> torch.Tensor:
    """Of each element of a matrix."""
    if transposed:
        layout = Layout(((8, 8, outer // 64), (8, depth // 8)), ((1, 8, leading), (64, stride)))
    else:
        layout = Layout(((8, outer // 8), (8, depth // 8)), ((64, stride), (1, 8)))
    return torch.tensor([[SWIZZLE(2 * layout(i, k)) // 2 for k in range(depth)] for i in range(outer)])


@functools.cache
def places_in(layout: Layout, threads: int, values: int) -> torch.Tensor:
    """Of each thread's values."""
    return torch.tensor([[layout(thread, value) for value in range(values)] for thread in range(threads)])


def fragments_of(a: torch.Tensor) -> torch.Tensor:
    """[step, thread, element]: the registers that hold `a` [64, depth], whose warps have 16 rows each."""
    layout = atoms_nv.SM80_16x8x16_F32BF16BF16F32_TN.a_layout
    result = torch.zeros(a.shape[1] // DEPTH, 128, 8, dtype=a.dtype)
    for step in range(result.shape[0]):
        for warp in range(4):
            part = a[warp * 16 : warp * 16 + 16, step * DEPTH : step * DEPTH + DEPTH].T.reshape(-1)
            result[step, warp * 32 : warp * 32 + 32] = part[places_in(layout, 32, 8)]
    return result


def run_wgmma(hopper: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as every thread has them: [thread, value]."""
    options = name.partition(":")[0].split() + name.split()
    columns = next((int(word) for word in options if word.isdigit()), 64)
    dtype = torch.float16 if "halves" in options else torch.bfloat16
    transposed = options[options.index("transposed") + 1 :] if "transposed" in options else []
    a, b = torch.randn(64, STEPS * DEPTH).to(dtype), torch.randn(columns, STEPS * DEPTH).to(dtype)
    image_a, lies_a = image_of(a, "a" in transposed)
    image_b, lies_b = image_of(b, "b" in transposed)
    image = torch.cat([image_a, image_b])
    d = torch.zeros(128, columns // 2)
    numbers = (2 * image.numel(), 0, *lies_a, 2 * image_a.numel(), *lies_b)
    run(hopper, name, [image, fragments_of(a)], [d], *numbers)
    by_columns = (a.double() @ b.double().T).float().T.reshape(-1)
    return d, by_columns[places_in(atoms_nv.gmma_c_layout(columns), 128, columns // 2)]


WGMMAS = [
    "wgmma 64",
    "wgmma 64 transposed b",
    "wgmma 64 transposed a b",
    "wgmma 128",
    "wgmma 128 transposed a",
    "wgmma 128 transposed b",
    "wgmma 192",
    "wgmma 192 transposed b",
    "wgmma 256",
    "wgmma 256 transposed a b",
    "wgmma 64 halves transposed b",
    "wgmma 64 registers",
    "wgmma 64 registers transposed b",
    "wgmma 128 registers halves transposed b",
]


@pytest.mark.parametrize("name", WGMMAS)
def test_wgmma_has_the_layouts_of_tensor_layouts(hopper: ModuleType, name: str) -> None:
    for seed in (None, 1):
        hopper.set_seed(seed)
        output, expected = run_wgmma(hopper, name)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)


def test_wgmma_takes_every_half(hopper: ModuleType) -> None:
    special = torch.tensor([0.0, -0.0, 65504.0, -6.2e-5, 6.0e-8, -6.0e-8, 1.0, float("inf"), float("nan")]).half()
    a, b = torch.zeros(2, 64, STEPS * DEPTH, dtype=torch.float16)
    for i, value in enumerate(special):  # one in each column of b
        a[:, i] = 1.0
        b[i, i] = value
    image, lies = image_of(b, True)
    d = torch.zeros(128, 32)
    run(hopper, "wgmma 64 registers halves transposed b", [image, fragments_of(a)], [d], 8192, *(0,) * 4, 0, *lies)
    expected = b.float().sum(1)[places_in(atoms_nv.gmma_c_layout(64), 128, 32) // 64]
    torch.testing.assert_close(d, expected, rtol=0, atol=0, equal_nan=True)


# --- copies


@pytest.mark.parametrize("swizzle, bits", [("", 0), (", 32 bytes", 1), (", 64 bytes", 2), (", 128 bytes", 3)])
def test_box_has_the_swizzle_of_tensor_layouts(hopper: ModuleType, swizzle: str, bits: int) -> None:
    rows, columns = 24, 8 << bits
    x = torch.randn(rows, columns).bfloat16()
    shared = torch.zeros_like(x)
    run(hopper, "load box" + swizzle, [x], [shared], rows, columns)
    layout = Swizzle(bits, 4, 3)
    places = torch.tensor([layout(2 * i) // 2 if bits else i for i in range(x.numel())])
    torch.testing.assert_close(shared.reshape(-1)[places].reshape(x.shape), x, rtol=0, atol=0)


def run_tma(hopper: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    sizes, boxes, before = {
        "tma of 2 dimensions": ((20, 17), (8, 5), (3, 2)),
        "tma of 3 dimensions": ((20, 17, 5), (8, 5, 2), (3, 2, 1)),
        "tma of 3 dimensions, wider": ((20, 17, 5), (16, 5, 2), (3, 2, 1)),
        "tma of 4 dimensions": ((72, 7, 5, 3), (32, 3, 2, 2), (3, 2, 1, 1)),
    }.get(name, ((72, 40), (32, 8), (4, 3)))
    shape = sizes[::-1]
    # With rows behind each that are nobody's.
    x, *both = (torch.zeros(shape[0] + 4, *shape[1:])[: shape[0]] for _ in range(3))
    x.normal_()
    numbers = [number for of_one in zip(sizes, boxes, before, strict=True) for number in of_one]
    if name == "tma: in written":
        run(hopper, name, [], [x, *both], *numbers)
    else:
        run(hopper, name, [x], both, *numbers)
    return torch.stack(both), torch.stack([2 * x, 2 * x])


def run_gemm(hopper: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    m, n, k = 200, 264, 328
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    c = torch.zeros(m, n).bfloat16()
    run(hopper, name, [a, b], [c], m, n, k, 2)
    return c, (a.double() @ b.double().T).bfloat16()


def run_sums(hopper: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, out, turns = torch.randn(3, 256), torch.zeros(256), torch.zeros(1, dtype=torch.int32)
    run(hopper, name, [x], [out, turns], 3)
    return out, x[0] + x[1] + x[2]


RUNS = {"tma": run_tma, "wgmma": run_wgmma, "hopper_gemm": run_gemm, "bulk_sums": run_sums}
RIGHT = ["tma", *(f"tma of {of}" for of in ("2 dimensions", "3 dimensions", "3 dimensions, wider", "4 dimensions"))]
RIGHT += ["wgmma 64", "wgmma 128 registers halves transposed b", "hopper_gemm", "bulk_sums"]


def run_by_name(hopper: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return RUNS[name.partition(":")[0].split()[0]](hopper, name)


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernel_is_right_and_silent_on_every_schedule(hopper: ModuleType, name: str) -> None:
    expect_silence(hopper, lambda: run_by_name(hopper, name), rtol=1e-2 if "gemm" in name else 0, atol=1e-4)


# --- bugs

USE_INIT = "tma.cu: ? parity ^ 1 : parity);  // for the box"
BEGIN_LOAD = "tma.cu: ptx::tma_load(to, arguments.in"
READ_BOX = "tma.cu: // of the box"
WRITE_BOX = "tma.cu: // to the box that is stored"
EXPECT = "tma.cu: ptx::mbarrier_arrive_expect(&barriers.full[stage], bytes + "
STORE_BOX = "tma.cu: // to out"
MULTIPLY = "wgmma.cu: // with a from shared memory"
MULTIPLY_REGISTERS = "wgmma.cu: // with a from registers"
WAIT = "wgmma.cu: ptx::wgmma_wait<0>(sum);  // of the accumulator"
LOAD_A, LOAD_B = "hopper_gemm.cu: problem.a, &full", "hopper_gemm.cu: problem.b, &full"
STEP = "hopper_gemm.cu: ptx::wgmma<"
STORE = "hopper_gemm.cu: ptx::tma_store("
RESULT = "hopper_gemm.cu: // the result"

BUGS = [
    Planted("tma: no barrier after init", "race", 32, USE_INIT, 0, "tma.cu: // to be full"),
    Planted("tma: no init fence", "bad call", 0, BEGIN_LOAD),
    Planted("tma: no init", "bad call", 32, USE_INIT),
    Planted("tma: init twice", "bad call", 0, "tma.cu: // again"),
    Planted("tma: mbarrier written", "bad call", 40, "tma.cu: barriers.full[1].state = 0", address="shared + 9224 "),
    Planted("tma: expects too much", "deadlock", 0, "tma.cu: ptx::mbarrier_wait(&barriers.empty[stage], parity ^ 1)"),
    Planted("tma: expects too little", "bad call", 0, BEGIN_LOAD),
    Planted("tma: arrives twice", "bad call", 0, "tma.cu: ptx::mbarrier_arrive(&barriers.full[stage])"),
    Planted("tma: not awaited empty", "bad call", 0, EXPECT),
    Planted("tma: not awaited full", "copy under way", 32, READ_BOX, 0, BEGIN_LOAD, address="shared + 0 "),
    Planted("tma: wrong parity", "copy under way", 32, READ_BOX, 0, BEGIN_LOAD, address="shared + 0 "),
    Planted("tma: released early", "race", 32, READ_BOX, 0, BEGIN_LOAD, address="shared + 0 "),
    Planted("tma: never awaited", "copy under way", 0, "tma.cu: // of nobody"),
    Planted("tma: misaligned", "misaligned", 0, BEGIN_LOAD, address="shared + 16 "),
    Planted("tma: beyond shared", "out of bounds", 0, BEGIN_LOAD, address="shared + 16384 "),
    Planted("tma: tensor too large", "out of bounds", 0, BEGIN_LOAD),
    Planted("tma: no proxy fence", "proxy", 32, STORE_BOX, 32, WRITE_BOX, address="shared + 6144 "),
    Planted("tma: source overwritten", "copy under way", 32, WRITE_BOX, 32, STORE_BOX, address="shared + 6144 "),
    Planted("tma: store not awaited", "copy under way", 32, STORE_BOX),
    Planted("tma: stored twice", "race", 32, "tma.cu: // once more", 32, STORE_BOX),
    Planted("tma: in written", "proxy", 0, BEGIN_LOAD, 0, "tma.cu: // of in"),
    Planted("wgmma: no proxy fence", "proxy", 0, MULTIPLY, 0, "wgmma.cu: // the image"),
    Planted("wgmma: no fence", "bad call", 0, MULTIPLY),
    Planted("wgmma: no fence of registers", "bad call", 0, MULTIPLY_REGISTERS),
    Planted("wgmma: no fence after wait", "bad call", 0, MULTIPLY),
    Planted("wgmma: fenced early", "bad call", 97, MULTIPLY_REGISTERS),
    Planted("wgmma: not named", "bad call", 0, "wgmma.cu: // of nothing", 0, MULTIPLY),
    Planted("wgmma: registers not named", "bad call", 0, WAIT, 0, MULTIPLY_REGISTERS),
    Planted("wgmma: no commit", "bad call", 0, MULTIPLY),
    Planted("wgmma: no wait", "bad call", 0, MULTIPLY),
    Planted("wgmma: sum changed", "bad call", 33, WAIT, 33, MULTIPLY),
    Planted("wgmma: registers changed", "bad call", 33, "wgmma.cu: // of both", 33, MULTIPLY_REGISTERS),
    Planted("wgmma: overwritten", "race", 7, "wgmma.cu: shared[b.begin + 16] = 0", 0, MULTIPLY),
    Planted("wgmma: missing warp", "divergence", 0, MULTIPLY),
    Planted("wgmma: missing lane", "divergence", 70, "wgmma.cu: if constexpr (kBug != Bug::no_commit)", 64, MULTIPLY),
    Planted("wgmma: other matrix", "divergence", 64, MULTIPLY, 0, MULTIPLY),
    Planted("wgmma: lanes differ", "bad call", 40, MULTIPLY),
    Planted("wgmma: within pattern", "bad call", 0, MULTIPLY),
    Planted("wgmma: beyond shared", "out of bounds", 0, MULTIPLY),
    Planted("wgmma: registers", "divergence", 32, WAIT),
    Planted("hopper_gemm: released before wait", "race", 0, LOAD_A, 128, STEP, address="shared + 0 "),
    Planted("hopper_gemm: no proxy fence", "proxy", 128, STORE, 128, RESULT),
    Planted("hopper_gemm: no store wait", "copy under way", 128, RESULT, 128, STORE),
    Planted("hopper_gemm: read early", "bad call", 128, "hopper_gemm.cu: ptx::wgmma_wait<0>(sum)", 128, STEP),
    Planted("hopper_gemm: wrong parity", "copy under way", 128, STEP, 0, LOAD_A),
    Planted("hopper_gemm: parity runs on", "copy under way", 128, STEP, 0, LOAD_A, address="shared + 32768 "),
    Planted("hopper_gemm: one warp releases", "race", 0, LOAD_A, 160, STEP, address="shared + 2048 "),
    Planted("hopper_gemm: not all expected", "bad call", 0, LOAD_B),
    Planted(
        "hopper_gemm: too many registers",
        "bad call",
        383,
        "hopper_gemm.cu: // written",
    ),
    Planted("bulk_sums: not awaited", "copy under way", 0, "bulk_sums.cu: count_up", 0, "bulk_sums.cu: bulk_add"),
    Planted("bulk_sums: no turn", "race", 0, "bulk_sums.cu: bulk_add", 0, "bulk_sums.cu: bulk_add", block=1),
    Planted("bulk_sums: wrong turn", "deadlock", 63, "bulk_sums.cu: // after its turn"),
    Planted("bulk_sums: read again", "race", 5, "bulk_sums.cu: // of what was added", 0, "bulk_sums.cu: bulk_add"),
]


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bug_is_found_on_the_ordered_schedule(hopper: ModuleType, bug: Planted) -> None:
    expect_report(hopper, bug, run_by_name)


def test_accumulators_are_nan_until_they_are_awaited(hopper: ModuleType) -> None:
    output, expected = run_wgmma(hopper, "wgmma: read early")
    assert output[:, 0].isnan().all()
    torch.testing.assert_close(output[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-4)


def test_a_wrong_swizzle_gives_a_wrong_product(hopper: ModuleType) -> None:
    output, expected = run_gemm(hopper, "hopper_gemm: other swizzle")
    assert (output - expected).abs().max() > 1


def test_deadlock_says_what_an_mbarrier_lacks(hopper: ModuleType) -> None:
    with pytest.raises(RuntimeError) as error:
        run_tma(hopper, "tma: expects too much")
    message = str(error.value)
    assert "threads 32-95 wait in mbarrier_wait of shared + 9216 (of 9248 bytes): its phase of parity 0" in message
    assert "lacks 0 of 1 arrivals and expects 1040 bytes, with 1024 under way" in message


TENSOR: dict[str, Any] = {"data": 16, "sizes": [64, 8], "strides": [1, 64], "box": [16, 8], "swizzle": 0}


@pytest.mark.parametrize(
    "change, refused",
    [
        ({}, ""),
        ({"box": [64, 8], "swizzle": 3}, ""),
        ({"data": 0}, "a null address"),
        ({"data": 24}, "an address that is no multiple of 16"),
        ({"sizes": [64, 0]}, "a size of dimension 1 that is not 1 to 2^32"),
        ({"sizes": [64, 2**32 + 1]}, "a size of dimension 1"),
        ({"strides": [1, 60]}, "a stride of dimension 1 that is no multiple of 16 bytes"),
        ({"strides": [1, 0]}, "a stride of dimension 1 that is not"),
        ({"strides": [1, 2**39]}, "a stride of dimension 1 that is not"),
        ({"strides": [2, 64]}, "an innermost stride that is not 1"),
        ({"box": [16, 257]}, "a box of dimension 1 that is not 1 to 256"),
        ({"box": [16, 0]}, "a box of dimension 1"),
        ({"box": [12, 8]}, "boxes whose rows are no multiple of 16 bytes"),
        ({"swizzle": 2}, "boxes whose rows are not as wide as the swizzle"),
    ],
)
def test_tensor_maps_are_checked(hopper: ModuleType, change: dict[str, Any], refused: str) -> None:
    of = TENSOR | change
    numbers = [of["data"], *of["sizes"], *of["strides"], *of["box"], of["swizzle"]]
    if refused:
        with pytest.raises(RuntimeError, match=refused.replace("^", r"\^")):
            run(hopper, "tensor map", [], [], *numbers)
    else:
        run(hopper, "tensor map", [], [], *numbers)
