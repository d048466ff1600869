"""What can be said of the CUDA C++ kernels without running them."""

import os
import re
from collections import Counter
from pathlib import Path

import cuda_resources
import pytest

from fastformer import backends, library

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".cuh", ".h", ".cpp"))
TRANSLATED = [path for path in SOURCES if path.suffix == ".cu"]
OF_HOPPER = [path for path in TRANSLATED if path.stem.endswith("_hopper")]  # for sm_90a alone
# Registers of a multiprocessor; a thread gets a multiple of 8.
REGISTERS = 65536
# Bytes of each block's shared memory that the system keeps from sm_90 on, and counts as the kernel's.
RESERVED = 1024

needs_cuda_library = pytest.mark.skipif(not cuda_resources.LIBRARY.exists(), reason="built without nvcc")


def code_of(path: Path) -> str:
    """The file without its comments."""
    return re.sub(r"//[^\n]*", "", path.read_text())


def operators() -> set[str]:
    names = {schema.split("(")[0] for schema in library.schemas()}
    return {name for name in names if name.rpartition("_")[0] in backends.CUDA_OPERATIONS}


@needs_cuda_library
@pytest.mark.skipif("TORCH_CUDA_ARCH_LIST" in os.environ, reason="built for other architectures than the default")
def test_every_file_is_there_for_every_architecture() -> None:
    contents = cuda_resources.contents()
    for piece in (("elf", "sm_80"), ("ptx", "sm_80")):
        assert contents.count(piece) == len(TRANSLATED) - len(OF_HOPPER), piece
    assert contents.count(("elf", "sm_90a")) == len(TRANSLATED)
    assert len(contents) == 3 * len(TRANSLATED) - 2 * len(OF_HOPPER)


@needs_cuda_library
def test_no_kernel_spills_or_has_static_shared_memory_or_too_many_registers() -> None:
    kernels = cuda_resources.kernels()
    assert len(kernels) > len(TRANSLATED)
    assert [kernel for kernel in kernels if kernel.spilled] == []
    assert [kernel for kernel in kernels if kernel.shared > (0 if kernel.architecture < "sm_90" else RESERVED)] == []
    assert [kernel for kernel in kernels if -(-kernel.registers // 8) * 8 * kernel.threads > REGISTERS] == []


@needs_cuda_library
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("function", "least"), [("gemm_kernel", 40), ("linear_cross_entropy_statistics", 4)])
def test_a_step_of_a_matrix_product_has_the_tensor_core_instructions_counted_by_hand(
    function: str, least: int, architecture: str
) -> None:
    kernels = cuda_resources.instructions(function, architecture)
    assert len(kernels) >= least
    for name, code in kernels.items():
        size = re.search(r"GemmTile<(\d+), (\d+), (\d+), (\d+), (\d+), (\d+)>", name)
        assert size is not None
        warp_rows, warp_columns = int(size[3]), int(size[4])
        # 32 of the depth are two times 16; an instruction is for 16 rows and 8 columns, in one loop, not unrolled.
        expected = 2 * (warp_rows // 16) * (warp_columns // 8)
        if re.search(r"\(TileRows\)\d, true", name):  # which sums a besides, as if there were 8 columns more
            expected += 2 * (warp_rows // 16)
        assert sum("HMMA.16816.F32" in line for line in code) == expected, name
        # Each fragment of a is loaded once, each of b (16 columns) too; and once more before the loop the first ones.
        loads = 2 * (warp_rows // 16 + warp_columns // 16) + warp_rows // 16 + 1
        assert sum("LDSM" in line for line in code) == loads, name


@needs_cuda_library
def test_a_step_of_a_matrix_product_on_hopper_has_the_instructions_counted_by_hand() -> None:
    kernels = cuda_resources.instructions("gemm_hopper_kernel", "sm_90a")
    assert len(kernels) == 14
    for name, code in kernels.items():
        # 64 of the depth are four times 16; an instruction is for a warpgroup's 64 rows and 192 columns, in one loop.
        products = [i for i, line in enumerate(code) if "HGMMA.64x192x16.F32" in line]
        assert len(products) == sum("HGMMA" in line for line in code) == 4, name
        # Between them nothing else names the 96 registers of the sums.
        sums = re.search(r"\bR(\d+)", code[products[0]])
        assert sums is not None
        first = int(sums[1])
        between = [line for line in code[products[0] : products[-1]] if "HGMMA" not in line]
        named = {int(number) for line in between for number in re.findall(r"\bR(\d+)", line)}
        assert named.isdisjoint(range(first, first + 96)), name
        # Each warpgroup's rows of a are a box, each half of b is, or each panel of 64 of its columns: for the block,
        # or for both of a cluster.
        kind = re.search(r"<\w+, \(TileRows\)\d, \(TileRows\)(\d), (\w+)<", name)
        assert kind is not None
        boxes_of_b = 2 * (3 if kind[1] == "1" else 1)
        assert sum("UTMALDG.2D.MULTICAST" in line for line in code) == boxes_of_b, name
        assert sum("UTMALDG" in line for line in code) == 2 + 2 * boxes_of_b, name
        # What a thread stored is waited for where the cluster begins and ends, never where a stage is given back.
        assert sum("MEMBAR.ALL.GPU" in line for line in code) == 2, name
        # No waits but the source's. The tile before leaves between a step's products and the wait for the step before;
        # the last one after all.
        waits = [i for i, line in enumerate(code) if "WARPGROUP.DEPBAR" in line]
        assert len(waits) == 2, name
        # A stage is given back behind the wait for what reads it: of that the relaxed arrival is no order.
        gives = [i for i, line in enumerate(code) if "SYNCS.ARRIVE.TRANS64.RED" in line]
        assert len(gives) == 2 and waits[0] < gives[0] < waits[1] < gives[1], name
        stores = [i for i, line in enumerate(code) if "STG.E.128" in line]
        assert any(products[-1] < i < waits[0] for i in stores) and any(i > waits[1] for i in stores), name
        assert not any(waits[0] < i < waits[1] for i in stores), name
        # What the epilogue of the next pass reads is on its way while this one computes.
        if kind[2] != "Store":
            computes = next(i for i, line in enumerate(code) if i > products[-1] and "MUFU" in line)
            assert any("LDG" in line for line in code[products[-1] : computes]), name
        # Nothing is called for a division; results leave 16 bytes at a time, but for sums.
        assert sum("USETMAXREG" in line for line in code) == 2, name
        assert not any("CALL" in line for line in code), name
        narrow = [line for line in code if "STG.E" in line and "STG.E.128" not in line]
        assert len(narrow) == 2 * (kind[2] == "Derive"), name


@needs_cuda_library
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_a_tile_of_attention_has_the_tensor_core_instructions_counted_by_hand(architecture: str) -> None:
    # (queries of a warp, keys of a tile) by width and whether all options are compiled in: attention.cu's table.
    tiles = {
        (64, 0): (32, 64), (96, 0): (32, 64), (128, 0): (32, 32), (256, 0): (16, 64),
        (64, 1): (32, 64), (96, 1): (16, 64), (128, 1): (16, 64), (256, 1): (16, 64),
    }  # fmt: skip
    kernels = cuda_resources.instructions("attention_forward_kernel", architecture)
    assert len(kernels) == 2 * len(tiles)
    for name, code in kernels.items():
        kind = re.search(r"<\w+, (\d+), \(\w+\)(\d)", name)
        assert kind is not None
        width, queries, keys = int(kind[1]), *tiles[int(kind[1]), int(kind[2])]
        # An instruction is for 16 rows, 8 columns and 16 of the depth; scores and output are a product each.
        assert sum("HMMA.16816.F32" in line for line in code) == 2 * (queries // 16) * (keys // 8) * (width // 16), name


@needs_cuda_library
def test_two_blocks_of_attention_of_width_64_fit_on_a_multiprocessor_of_sm_80() -> None:
    registers, shared, threads = REGISTERS, 164 * 1024, 2048
    kernels = [k for k in cuda_resources.kernels() if re.match(r"attention_forward_kernel<\w+, 64,", k.name)]
    kernels = [kernel for kernel in kernels if kernel.architecture == "sm_80"]
    assert len(kernels) == 4
    for kernel in kernels:
        of_warps = -(-kernel.registers // 8) * 8 * kernel.threads
        of_block = (128 + 2 * 64) * 64 * 2 + RESERVED  # a tile of queries, one of keys and one of values
        assert min(registers // of_warps, shared // of_block, threads // kernel.threads) >= 2, kernel


@needs_cuda_library
@pytest.mark.parametrize(
    ("function", "products", "waits", "copies"),
    [
        # Scores and output of the first tile of keys, of the others, and of the last one's output, an instruction for
        # 16 of the depth; queries, keys and values twice, and the output, a copy for each 64 columns.
        ("attention_hopper_kernel<.*HopperTile<64>", {"64x128x16": 2 * 4, "64x64x16": 2 * 8}, 4, (4, 1, 0)),
        ("attention_hopper_kernel<.*HopperTile<128>", {"64x128x16": 2 * 8 + 2 * 8}, 4, (8, 2, 0)),
        ("attention_hopper_kernel<.*HopperTile<256>", {"64x64x16": 2 * 16, "64x256x16": 2 * 4}, 4, (16, 4, 0)),
        # S, dP, dV and dK (twice, of width 64) and dQ.
        ("attention_backward_hopper_kernel<.*Tile<64>", {"64x64x16": 2 * (4 + 4 + 4 + 4) + 8}, 6, (4, 2, 1)),
        ("attention_backward_hopper_kernel<.*Tile<128>", {"64x64x16": 8 + 8 + 8, "64x128x16": 4 + 4}, 4, (8, 4, 1)),
    ],
)
def test_attention_on_hopper_has_the_instructions_counted_by_hand(
    function: str, products: dict[str, int], waits: int, copies: tuple[int, int, int]
) -> None:
    kernels = cuda_resources.instructions(function.split("<")[0], "sm_90a")
    kernels = {name: code for name, code in kernels.items() if re.match(function, name)}
    assert len(kernels) == 2  # a kernel for each type
    for name, code in kernels.items():
        found = Counter(match[1] for line in code if (match := re.search(r"HGMMA\.(\w+)", line)))
        assert found == products, name
        # More waits than the source has are the compiler's: products then run one after the other.
        assert sum("WARPGROUP.DEPBAR" in line for line in code) == waits, name
        assert tuple(sum(kind in line for line in code) for kind in ("UTMALDG", "UTMASTG", "UBLKRED")) == copies, name
        assert sum("USETMAXREG" in line for line in code) == 2, name


@needs_cuda_library
def test_the_softmax_of_attention_on_hopper_overlaps_the_product_before_it() -> None:
    """ptxas moves waits for products up, if nothing keeps it from that: see ptx::stay_behind."""
    for name, code in cuda_resources.instructions("attention_hopper_kernel", "sm_90a").items():
        found = re.findall(r"DEPBAR\.LE gsb0, 0x(\d)|(MUFU\.EX2)", "\n".join(code))
        steps = "-".join("exp" if exponential else f"wait {groups}" for groups, exponential in found)
        # Of the first tile of keys, of the others, and the last product, without a softmax.
        assert re.fullmatch("wait 0(-exp)+-wait 1(-exp)+-wait 0-wait 0(-exp)*", steps), (name, steps)


@needs_cuda_library
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("function", "by_eight"),
    [
        ("softmax_forward_held", r"<(Half|BFloat16), 8,"),
        ("layer_norm_forward_held", r"<(Half|BFloat16), \w+, 8,"),
        ("layer_norm_backward_held", r"<(Half|BFloat16), \w+, 8,"),
        ("feed_forward_forward_kernel", r"<(Half|BFloat16), .*, 8>$"),
        ("rotate", r"<(Half|BFloat16), .*, 8>$"),
    ],
)
def test_eight_results_of_16_bits_leave_by_one_store(function: str, by_eight: str, architecture: str) -> None:
    """The compiler parts what was put together from halves: see store_global."""
    kernels = cuda_resources.instructions(function, architecture)
    kernels = {name: code for name, code in kernels.items() if re.search(by_eight, name)}
    assert kernels
    for name, code in kernels.items():
        assert any("STG.E.128" in line for line in code), name
        assert not any("STG.E.U16" in line for line in code), name


@needs_cuda_library
@pytest.mark.parametrize(
    ("function", "sums", "loads", "stores"),
    [
        # A thread has four packs of each tensor; summed and output of layer norm are two.
        ("softmax_forward_looped", 2, 4, 4),
        ("softmax_backward_looped", 2, 8, 4),
        ("layer_norm_forward_looped", 3, None, 8),  # loads: with those of a residual, or without
        ("layer_norm_backward_looped", 2, None, 4),
    ],
)
def test_a_cluster_s_kernels_have_the_instructions_counted_by_hand(
    function: str, sums: int, loads: int | None, stores: int
) -> None:
    kernels = cuda_resources.instructions(function, "sm_90a")
    kernels = {name: code for name, code in kernels.items() if name.endswith(", -1>")}
    assert len(kernels) == {"softmax_forward_looped": 12, "softmax_backward_looped": 6}.get(function, 10)
    for name, code in kernels.items():
        found = Counter(match[0] for line in code if (match := re.search(r"\b(UCGABAR_WAIT|(LD|ST)G?\.E[.\w]*)", line)))
        # A barrier before the first sum too. Each sum is stored in other blocks, and loaded in the block's own memory.
        assert found["UCGABAR_WAIT"] == 1 + sums, name
        assert {kind: count for kind, count in found.items() if kind[:3] in ("LD.", "ST.")} == {"ST.E": sums}, name
        if re.search(r"<\w+(, float)?, [48], ", name):
            assert found["STG.E.128"] == stores, name
            assert loads in (None, found["LDG.E.128"]) or ", true, " in name, name  # true: masked


def test_every_operator_is_registered_once() -> None:
    names = [name for path in TRANSLATED for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())]
    assert len(names) == len(set(names))
    assert set(names) == operators()


@pytest.mark.parametrize(
    ("pattern", "home"),
    [
        (r"\basm\b", "ptx.cuh ptx_hopper.cuh"),
        (r"\b__shared__\b", "device.cuh"),
        (r"<<<", None),
        (r"\bcudaLaunchKernel\w*", "launch.h"),
        (r"\bcuda(Device|Stream|Event)Synchronize\b|\bcudaMalloc\w*|\bcudaFree\w*|\bcudaMem(cpy|set)\w*", None),
        (r"\batomic(Add|Max|Min|Exch|CAS)\b", None),
    ],
)
def test_some_things_have_one_place_or_none(pattern: str, home: str | None) -> None:
    assert {path.name for path in SOURCES if re.search(pattern, code_of(path))} == set((home or "").split())
