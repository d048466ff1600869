"""The feed-forward kernels and the accumulating product, in every tile of their tables."""

from __future__ import annotations

from fastformer.triton_kernels import feed_forward as kernels
from fastformer.triton_kernels import gemm

from . import Case

# float16 compiles like bfloat16, with the other type in its instructions.
BYTES = {"bf16": 2, "fp32": 4}


def device_class(target) -> str:
    """The tables' key for a compilation target."""
    if target.backend == "hip":
        return "gfx942"
    return "sm_90" if target.arch // 10 in (9, 10, 11) else "sm_80"


def operand(dtype: str, rows: int, columns: int, descriptors: bool) -> str:
    """The type of a matrix argument that is read in tiles of that size."""
    return f"tensordesc<{dtype}[{rows}, {columns}]>" if descriptors else f"*{dtype}"


def signature(kernel, types: dict[str, str], constants: dict[str, object]) -> dict[str, str]:
    """Each argument's type: sizes and strides not named in ``types`` are multiples of 16, unless unspecialised."""
    unspecialised = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    default = {name: "i32" if name in unspecialised else "i32:16" for name in kernel.arg_names}
    return {**default, **types, **dict.fromkeys(constants, "constexpr")}


def case(name: str, kernel, types: dict[str, str], constexprs: dict[str, object], tile: gemm.Tile) -> Case:
    """A case with that tile, whose ``constexprs`` hold absent tensors and strides of 1 too, as Triton specialises."""
    constants = {**constexprs, **tile.constants(), "GROUP_M": gemm.GROUP_M}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    thorough = constants.get("ACTIVATION", "gelu") != "gelu"
    return Case(name, kernel, signature(kernel, types, constants), constants, tile.options(), thorough=thorough)


def _forward(name: str, dtype: str, tile: gemm.Tile, descriptors: bool, gated: bool, activation: str) -> Case:
    weight = operand(dtype, tile.block_n, tile.block_k, descriptors)
    types = {
        "input": operand(dtype, tile.block_m, tile.block_k, descriptors),
        "weight1": weight,
        "weight_gate": weight,
        **{name: f"*{dtype}" for name in ("bias1", "activated", "hidden")},
    }
    constants = {"stride_input_c": 1, "stride_weight1_c": 1, "stride_gate_c": 1}
    constants |= {"ACTIVATION": activation, "DESCRIPTORS": descriptors}
    if not gated:
        constants["weight_gate"] = None
    return case(f"forward {name}", kernels._forward, types, constants, tile)


def _backward(name: str, dtype: str, tile: gemm.Tile, descriptors: bool, gated: bool, activation: str) -> Case:
    types = {
        "grad_output": operand(dtype, tile.block_m, tile.block_k, descriptors),
        "weight2": operand(dtype, tile.block_k, tile.block_n, descriptors),
        **{name: f"*{dtype}" for name in ("hidden", "grad_hidden", "activated")},
        "bias_sums": "*fp32",
    }
    constants = {"stride_grad_c": 1, "stride_weight2_f": 1}
    constants |= {"ACTIVATION": activation, "GATED": gated, "DESCRIPTORS": descriptors}
    return case(f"backward {name}", kernels._backward, types, constants, tile)


def _accumulate(dtype: str, tile: gemm.Tile, descriptors: bool) -> Case:
    types = {
        "total": "*fp32",
        "a": operand(dtype, tile.block_k, tile.block_m, descriptors),
        "b": operand(dtype, tile.block_k, tile.block_n, descriptors),
    }
    constants = {"stride_am": 1, "stride_bn": 1, "DESCRIPTORS": descriptors}
    name = f"accumulate {dtype}{' descriptors' if descriptors else ''}"
    return case(name, gemm._accumulate, types, constants, tile)


def cases(target) -> list[Case]:
    """Every tile with the activations of both kinds of cost: gelu where it is plain, silu where it is gated."""
    chosen = device_class(target)
    found = []
    for dtype, size in BYTES.items():
        for descriptors in (True, False) if (chosen, size) == ("sm_90", 2) else (False,):
            label = f"{dtype}{' descriptors' if descriptors else ''}"
            for gated, activation in ((False, "gelu"), (False, "gelu_tanh"), (True, "gelu"), (True, "silu")):
                forward_tiles = kernels.GATED_TILES if gated else kernels.FORWARD_TILES
                name = f"{label}{' gated' if gated else ''} {activation}"
                tile, few = forward_tiles[chosen, size], kernels.FEW_ROWS_TILES[size]
                found.append(_forward(name, dtype, tile, descriptors, gated, activation))
                found.append(_forward(f"{name} few rows", dtype, few, descriptors, gated, activation))
                tile = kernels.BACKWARD_TILES[chosen, size]
                found.append(_backward(name, dtype, tile, descriptors, gated, activation))
                found.append(_backward(f"{name} few rows", dtype, few, descriptors, gated, activation))
            if size == 2:
                found.append(_accumulate(dtype, gemm.ACCUMULATE_TILES[chosen, size], descriptors))
    return found
