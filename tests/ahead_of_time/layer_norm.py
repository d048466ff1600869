"""The layer_norm kernels, in every configuration of their tables."""

from __future__ import annotations

from fastformer.triton_kernels import layer_norm as kernels

from . import Case
from .softmax import row_case

ABSENT = {"weight", "bias", "residual", "summed", "grad_summed", "weight_sums", "bias_sums", "grad_weight", "grad_bias"}


def _case(
    name: str, kernel, dtype: str, tile: dict[str, int], warps: int, *, rms: bool = False, plain: bool = False
) -> Case:
    """plain: without weight, bias, residual, and whatever else may be None. Parameters and statistics are float32."""
    in_dtype = {"input", "residual", "output", "grad_output", "grad_summed", "grad_input"}
    if kernel not in (kernels._forward, kernels._forward_looped) or not plain:
        in_dtype.add("summed")
    types = {argument: "*fp32" for argument in ABSENT | {"mean", "rstd"}}
    types |= {argument: f"*{dtype}" for argument in in_dtype}
    types |= {argument: "i32:16" for argument in kernel.arg_names if argument.startswith("stride")}
    types["eps"] = "fp32"
    values = dict(tile)
    if "RMS" in kernel.arg_names:
        values["RMS"] = rms
    absent = {"mean", "bias", "bias_sums"} if rms else set()
    if plain:
        absent |= ABSENT - in_dtype | {"residual", "grad_summed"}
    values |= {argument: None for argument in absent if argument in kernel.arg_names}
    label = f"{name} {dtype}{' rms' if rms else ''}{' plain' if plain else ''}"
    return row_case(label, kernel, types, values, warps)


def cases(target) -> list[Case]:
    """Each width in float32 with every optional argument, which needs the most registers; the widest in 16 bits too."""
    found = []
    for widest, rows, warps in kernels.FORWARD_CONFIGS:
        tile = {"ROWS": rows, "BLOCK": widest}
        found.append(_case(f"forward {widest}", kernels._forward, "fp32", tile, warps))
    found.append(_case(f"forward {widest}", kernels._forward, "bf16", tile, warps, rms=True))
    found.append(_case(f"forward {widest}", kernels._forward, "fp16", tile, warps, plain=True))
    for widest, rows, warps, _ in kernels.BACKWARD_CONFIGS:
        tile = {"ROWS": rows, "BLOCK": widest}
        found.append(_case(f"backward {widest}", kernels._backward, "fp32", tile, warps))
    found.append(_case(f"backward {widest}", kernels._backward, "bf16", tile, warps, rms=True))
    found.append(_case(f"backward {widest}", kernels._backward, "fp16", tile, warps, plain=True))

    looped = {"BLOCK": kernels.LOOPED_BLOCK}
    columns = {"ROWS": kernels.COLUMN_ROWS, "BLOCK": kernels.COLUMN_BLOCK}
    for dtype, rms, plain in (("fp32", False, False), ("bf16", True, False), ("fp16", False, True)):
        options = {"rms": rms, "plain": plain}
        for name, kernel in (("forward", kernels._forward_looped), ("backward", kernels._backward_looped)):
            found.append(_case(f"{name} looped", kernel, dtype, looped, kernels.LOOPED_WARPS, **options))
        if not plain:
            found.append(_case("column sums", kernels._column_sums, dtype, columns, kernels.COLUMN_WARPS, **options))
    for rows, block in (kernels.PARTIALS, kernels.LOOPED_PARTIALS):
        tile = {"ROWS": rows, "BLOCK": block}
        found.append(_case(f"finish sums {block}", kernels._finish_sums, "fp32", tile, kernels.PARTIAL_WARPS))
    return found
