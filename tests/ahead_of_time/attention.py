"""The attention kernels in every row of their table of tiles, with each kind of mask, and with their features."""

from __future__ import annotations

from fastformer.triton_kernels import attention as forward
from fastformer.triton_kernels import attention_backward as backward
from fastformer.triton_kernels import attention_tiles as tiles
from fastformer.triton_kernels import attention_visible as visible

from . import Case
from .feed_forward import signature

KERNELS = {
    "forward": forward.attention_forward_kernel,
    "dkdv": backward.attention_dkdv_kernel,
    "dq": backward.attention_dq_kernel,
}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MASKS = {"bool": "*u8", "additive": "*fp32"}
#: The arguments that each feature has, and their types.
FEATURES = {
    "softcap": {"softcap": "fp32"},
    "window": {"window_left": "i32", "window_right": "i32"},
    "alibi": {"alibi_slopes": "*fp32"},
    "sinks": {"sinks": "*fp32"},
    "dropout": {"dropout_state": "*i64", "threshold": "i32", "kept_scale": "fp32"},
    "packed": {"cu_seqlens_q": "*i32", "cu_seqlens_k": "*i32"},
    "paged": {"seqused_k": "*i32", "block_table": "*i32"},
}
#: What is None unless a feature has it.
OPTIONAL = [name for arguments in FEATURES.values() for name in arguments] + ["mask", "tiles", "grad_mask", "seqused_k"]
#: Not always multiples of 16.
LENGTHS = ("seqlen_q", "seqlen_k", "query_rows")
PAGE_SIZE = 16


def _case(kind: str, architecture: str, width: int, dtype: str, mask: str = "none", *features: str) -> Case:
    """One kernel, for sequences of any length: what is known of lengths only spares it registers."""
    kernel = KERNELS[kind]
    given = {name for feature in features for name in FEATURES[feature]} | ({"mask"} if mask != "none" else set())
    tile = getattr(tiles.select_tiles(architecture, width, width, BYTES[dtype], given), kind)
    pointers = not given.isdisjoint(tiles.POINTERS)
    descriptors = architecture in ("sm_90", "sm_100") and BYTES[dtype] == 2 and not pointers
    rows = {"query": tile.block_q, "grad_output": tile.block_q, "key": tile.block_k, "value": tile.block_k}
    types = {name: f"*{dtype}" for name in ("query", "output", "grad_query", "grad_key", "grad_value")}
    types |= {
        name: f"tensordesc<{dtype}[1,1,{block},{width}]>" if descriptors else f"*{dtype}"
        for name, block in rows.items()
    }
    types |= {"lse": "*fp32", "delta": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("heads", "kv_heads", "window_right", "alibi_stride_b", *LENGTHS), "i32")
    for feature in features:
        types |= FEATURES[feature]
    if mask != "none":
        types["mask"] = MASKS[mask]
    if mask == "bool":
        types["tiles"] = "*i32"
    if mask == "additive":  # a boolean one has no gradient
        types["grad_mask"] = "*fp32"
    constants = {
        "HEAD_DIM": width,
        "VALUE_DIM": width,
        "BLOCK_D": width,
        "BLOCK_DV": width,
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "MASK": mask,
        "BOTTOM_RIGHT": True,
        "DESCRIPTORS": descriptors,
    }
    if kind == "forward":
        constants["PAGE_SIZE"] = PAGE_SIZE if "paged" in features else 0
    if mask != "none":
        constants["mask_stride_k"] = 1  # a dense mask's
    constants |= {name: None for name in OPTIONAL if name in kernel.arg_names and name not in types}
    options = tiles.launch_options(architecture, tile, BYTES[dtype], "softcap" in features, kind == "dq" and width > 64)
    options = {name: value for name, value in options.items() if name not in constants}
    label = " ".join(features).replace(" ".join(EVERYTHING[:-1]), "everything")
    name = f"{kind} {dtype} {width} mask {mask} {label}".rstrip()
    # Hopper's products of 64 rows and more; smaller ones use the tensor cores as Ampere does.
    rows = tile.block_k if kind == "dkdv" else tile.block_q
    uses = "wgmma" if architecture == "sm_90" and BYTES[dtype] == 2 and rows >= 64 else ""
    thorough = _thorough(width, dtype, mask, features)
    return Case(name, kernel, signature(kernel, types, constants), constants, options, uses, thorough=thorough)


def _thorough(width: int, dtype: str, mask: str, features: tuple[str, ...]) -> bool:
    if features in ((), ("softcap",)):
        # An additive mask takes more registers than a boolean one.
        return mask == "bool" or (dtype, width) == ("fp32", 128) or (bool(features) and width != 64)
    return (dtype, width) != ("bf16", 128) or features not in (PACKED, EVERYTHING)


PACKED = ("packed", "window")
EVERYTHING = ("window", "alibi", "sinks", "softcap", "dropout", "packed")
COMBINATIONS = [("window",), ("window", "alibi"), ("dropout",), PACKED, EVERYTHING]


def cases(target) -> list[Case]:
    architecture = target.arch if target.backend == "hip" else f"sm_{target.arch}"
    found = [
        _case(kind, architecture, width, dtype, mask, *features)
        for kind in KERNELS
        for width in (64, 128, 256)
        for dtype in ("bf16", "fp32")
        for mask in ("none", *MASKS)
        for features in ((), ("softcap",))
    ]
    found += [
        _case(kind, architecture, width, dtype, "none", *features)
        for kind in KERNELS
        for width in (64, 128, 256)
        for dtype in ("bf16", "fp32")
        for features in COMBINATIONS
        if width <= 128 or (kind, dtype) == ("forward", "bf16")  # beyond, some spill a little
    ]
    found += [
        _case(kind, architecture, width, "bf16", mask, *features)
        for kind in KERNELS
        for width in (64, 128)
        for mask in MASKS
        for features in (("window",), ("window", "alibi", "softcap"))
    ]
    paged = [("paged",), ("paged", *EVERYTHING[:-1])]
    found += [
        _case("forward", architecture, width, dtype, "none", *features)
        for width, dtype in ((64, "bf16"), (128, "bf16"), (256, "bf16"), (64, "fp32"), (128, "fp32"))
        for features in paged
    ]
    found += [_case(kind, architecture, 128, "fp16", "none") for kind in KERNELS]
    return [*found, _delta_case(), *(_list_case(architecture, kind) for kind in KERNELS)]


def _delta_case() -> Case:
    kernel = backward.attention_delta_kernel
    types = {"grad_output": "*bf16", "output": "*bf16", "grad_lse": "*fp32", "lse": "*fp32", "delta": "*fp32"}
    constants = {"VALUE_DIM": 256, "BLOCK_DV": 256, "BLOCK_Q": backward.DELTA_ROWS}
    return Case("delta bf16 256", kernel, signature(kernel, types | {"heads": "i32"}, constants), constants)


def _list_case(architecture: str, kind: str) -> Case:
    kernel = visible.list_tiles_kernel
    tile = getattr(tiles.select_tiles(architecture, 64, 64, 2, {"mask"}), kind)
    constants = {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "TRANSPOSED": kind == "dkdv", "mask_stride_k": 1}
    types = {"mask": "*u8", "tiles": "*i32", "heads": "i32", "offset": "i32"}
    types |= {"window_left": "i32", "window_right": "i32"}
    types = signature(kernel, types, constants)
    return Case(f"list tiles of {kind}", kernel, types, constants, {"num_warps": visible.LIST_WARPS}, thorough=True)
