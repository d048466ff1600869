"""The attention kernels in every row of their table of tiles, with each kind of mask and none, and with softcap."""

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


def _case(kind: str, architecture: str, width: int, dtype: str, mask: str, softcap: bool = False) -> Case:
    kernel = KERNELS[kind]
    tile = getattr(tiles.select_tiles(architecture, width, width, BYTES[dtype], mask != "none" or softcap), kind)
    descriptors = architecture in ("sm_90", "sm_100") and BYTES[dtype] == 2
    rows = {"query": tile.block_q, "grad_output": tile.block_q, "key": tile.block_k, "value": tile.block_k}
    types = {name: f"*{dtype}" for name in ("query", "output", "grad_query", "grad_key", "grad_value")}
    types |= {
        name: f"tensordesc<{dtype}[1,1,{block},{width}]>" if descriptors else f"*{dtype}"
        for name, block in rows.items()
    }
    types |= {"lse": "*fp32", "delta": "*fp32", "grad_mask": "*fp32", "mask": MASKS[mask]}
    types |= {"scale": "fp32", "softcap": "fp32"}
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
    if not softcap:
        constants["softcap"] = None
    signature = {name: types.get(name, "i32:16") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    options = tiles.launch_options(tile, softcap and (kind != "dq" or width <= 64))
    options = {name: value for name, value in options.items() if name not in constants}
    # An additive mask takes more registers than a boolean one.
    thorough = mask == "bool" or (dtype, width) == ("fp32", 128) or (softcap and width != 64)
    name = f"{kind} {dtype} {width} mask {mask}{' softcap' if softcap else ''}"
    return Case(name, kernel, signature, constants, options, thorough=thorough)


def cases(target) -> list[Case]:
    architecture = target.arch if target.backend == "hip" else f"sm_{target.arch}"
    found = [
        _case(kind, architecture, width, dtype, mask, softcap)
        for kind in KERNELS
        for width in (64, 128, 256)
        for dtype in ("bf16", "fp32")
        for mask in MASKS
        for softcap in (False, True)
    ]
    found += [_case(kind, architecture, 128, "fp16", "none") for kind in KERNELS]
    delta = backward.attention_delta_kernel
    types = {"grad_output": "*bf16", "output": "*bf16", "grad_lse": "*fp32", "lse": "*fp32", "delta": "*fp32"}
    constants = {"VALUE_DIM": 256, "BLOCK_DV": 256, "BLOCK_Q": backward.DELTA_ROWS}
    signature = {name: types.get(name, "i32:16") for name in delta.arg_names} | {"heads": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    return [*found, Case("delta bf16 256", delta, signature, constants)]
