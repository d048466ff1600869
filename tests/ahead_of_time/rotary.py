"""The rotary kernel, in every configuration of its table."""

from __future__ import annotations

from fastformer.triton_kernels import rotary as kernels

from . import Case
from .softmax import row_case

WIDE = 2 * kernels.CONFIGS[-1][0]  # angles, beyond the table


def _case(angles: int, dtype: str, table_dtype: str, interleaved: bool, rest: int) -> Case:
    rows, block, warps = kernels.configuration(angles)
    types = {name: f"*{dtype}" for name in ("query", "key", "query_out", "key_out")}
    types |= {"cos": f"*{table_dtype}", "sin": f"*{table_dtype}", "head_dim": "i32:16", "angles": "i32:16"}
    types |= {name: "i32:16" for name in kernels._rotate.arg_names if name.startswith("stride")}
    constexprs = {"INTERLEAVED": interleaved, "INVERSE": False, "ROWS": rows, "BLOCK": block, "REST": rest}
    form = f"{' interleaved' if interleaved else ''}{' and rest' if rest else ''}"
    return row_case(f"{angles} angles {dtype}{form}", kernels._rotate, types, constexprs, warps)


def cases(target) -> list[Case]:
    """Each number of angles in float32, both pairings where heads usually are; there in 16 bits too."""
    found = [_case(angles, "fp32", "fp32", False, 0) for angles, _, _ in kernels.CONFIGS]
    found.append(_case(WIDE, "fp32", "fp32", False, 0))
    found.append(_case(WIDE, "fp32", "fp32", True, 0))
    for angles in (32, 64, 128):
        found.append(_case(angles, "fp32", "fp32", True, 0))
        found.append(_case(angles, "bf16", "fp32", False, 0))
    found.append(_case(32, "bf16", "bf16", False, 64))
    found.append(_case(32, "fp16", "fp16", True, 64))
    return found
