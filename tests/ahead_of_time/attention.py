"""The attention kernels in every row of their table of tiles, without a mask and with each kind of mask."""

from __future__ import annotations

from fastformer.triton_kernels import attention as forward
from fastformer.triton_kernels import attention_backward as backward
from fastformer.triton_kernels import attention_tiles as tiles

from . import Case

KERNELS = {
    "forward": forward.attention_forward_kernel,
    "dkdv": backward.attention_dkdv_kernel,
    "dq": backward.attention_dq_kernel,
}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MASKS = {"none": "constexpr", "bool": "*u8", "additive": "*fp32"}


def _case(kind: str, architecture: str, width: int, dtype: str, mask: str) -> Case:
    kernel = KERNELS[kind]
    tile = getattr(tiles.select_tiles(architecture, width, width, BYTES[dtype], mask != "none"), kind)
    descriptors = architecture in ("sm_90", "sm_100") and BYTES[dtype] == 2
    rows = {"query": tile.block_q, "grad_output": tile.block_q, "key": tile.block_k, "value": tile.block_k}
    types = {name: f"*{dtype}" for name in ("query", "output", "grad_query", "grad_key", "grad_value")}
    types |= {
        name: f"tensordesc<{dtype}[1,1,{block},{width}]>" if descriptors else f"*{dtype}"
        for name, block in rows.items()
    }
    types |= {"lse": "*fp32", "delta": "*fp32", "grad_mask": "*fp32", "mask": MASKS[mask], "scale": "fp32"}
    types |= dict.fromkeys(("heads", "kv_heads", "causal_offset"), "i32")
    constants = {
        "HEAD_DIM": width,
        "VALUE_DIM": width,
        "BLOCK_D": width,
        "BLOCK_DV": width,
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "MASK": mask,
        "IS_CAUSAL": True,
        "DESCRIPTORS": descriptors,
    }
    # A dense mask steps by 1 along the keys; only an additive one has a gradient.
    constants |= {"mask": None} if mask == "none" else {"mask_stride_k": 1}
    if kind == "dq" and mask != "additive":
        constants["grad_mask"] = None
    signature = {name: types.get(name, "i32:16") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    thorough = mask == "bool" or (dtype, width) == ("fp32", 128)  # an additive mask takes more registers
    return Case(f"{kind} {dtype} {width} mask {mask}", kernel, signature, constants, options, thorough=thorough)


def cases(target) -> list[Case]:
    architecture = target.arch if target.backend == "hip" else f"sm_{target.arch}"
    found = [
        _case(kind, architecture, width, dtype, mask)
        for kind in KERNELS
        for width in (64, 128, 256)
        for dtype in ("bf16", "fp32")
        for mask in MASKS
    ]
    found += [_case(kind, architecture, 128, "fp16", "none") for kind in KERNELS]
    delta = backward.attention_delta_kernel
    types = {"grad_output": "*bf16", "output": "*bf16", "grad_lse": "*fp32", "lse": "*fp32", "delta": "*fp32"}
    constants = {"VALUE_DIM": 256, "BLOCK_DV": 256, "BLOCK_Q": backward.DELTA_ROWS}
    signature = {name: types.get(name, "i32:16") for name in delta.arg_names} | {"heads": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    return [*found, Case("delta bf16 256", delta, signature, constants)]
