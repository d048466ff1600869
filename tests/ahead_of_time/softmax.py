"""The softmax kernels, in every configuration of their table."""

from __future__ import annotations

from fastformer.triton_kernels import softmax as kernels

from . import Case

MASKS = {" bool mask": "*i8", " additive mask": "*fp32"}


def row_case(name: str, kernel, types: dict[str, str], constexprs: dict[str, object], warps: int) -> Case:
    """A case whose arguments without a type or a value are 32-bit integers."""
    signature = {k: "constexpr" if k in constexprs else types.get(k, "i32") for k in kernel.arg_names}
    return Case(name, kernel, signature, constexprs, {"num_warps": warps})


def _forward(label: str, kernel, dtype: str, mask: str, causal: bool, tile: dict[str, int], warps: int) -> Case:
    types = {"input": f"*{dtype}", "output": f"*{dtype}", "stride_input": "i32:16", "scale": "fp32"}
    constexprs = {"IS_CAUSAL": causal, "stride_mask_column": 1, **tile}
    if not causal:
        constexprs["causal_rows"] = 1
    if mask:
        types["mask"] = MASKS[mask]
    else:
        constexprs |= {"mask": None, "heads": 1, "seqlen": 1}
    return row_case(f"forward {label} {dtype}{mask}{' causal' if causal else ''}", kernel, types, constexprs, warps)


def _backward(label: str, kernel, dtype: str, tile: dict[str, int], warps: int) -> Case:
    types = {name: f"*{dtype}" for name in ("grad_output", "output", "grad_input")} | {"scale": "fp32"}
    types |= {"stride_grad_output": "i32:16", "stride_output": "i32:16"}
    return row_case(f"backward {label} {dtype}", kernel, types, tile, warps)


def cases(target) -> list[Case]:
    """Each width in float32, which needs the most registers; the widest in 16 bits and with masks too."""
    found = []
    for widest, rows, warps in kernels.CONFIGS:
        tile = {"ROWS": rows, "BLOCK": widest}
        found.append(_forward(str(widest), kernels._forward, "fp32", " additive mask", True, tile, warps))
        found.append(_backward(str(widest), kernels._backward, "fp32", tile, warps))
    for mask in ("", *MASKS):
        found.append(_forward(str(widest), kernels._forward, "bf16", mask, False, tile, warps))
    found.append(_backward(str(widest), kernels._backward, "fp16", tile, warps))
    looped = {"BLOCK": kernels.LOOPED_BLOCK}
    for dtype, mask, causal in (("fp32", " additive mask", True), ("bf16", " bool mask", False), ("fp16", "", False)):
        found.append(_forward("looped", kernels._forward_looped, dtype, mask, causal, looped, kernels.LOOPED_WARPS))
        found.append(_backward("looped", kernels._backward_looped, dtype, looped, kernels.LOOPED_WARPS))
    return found
