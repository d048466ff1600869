"""The decoding kernels in every row of their table, plain, over pages, and with every feature at once."""

from __future__ import annotations

from fastformer.triton_kernels import attention_combine as combine
from fastformer.triton_kernels import attention_decode as decode

from . import Case
from .feed_forward import signature

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MASKS = {"none": "constexpr", "bool": "*u8", "additive": "*fp32"}
FEATURES = {
    "alibi_slopes": "*fp32",
    "sinks": "*fp32",
    "dropout_state": "*i64",
    "threshold": "i32",
    "kept_scale": "fp32",
    "softcap": "fp32",
    "window_left": "i32",
    "window_right": "i32",
}
PACKED = {"cu_seqlens_q": "*i32", "cu_seqlens_k": "*i32", "seqused_k": "*i32"}
PAGED = {"cu_seqlens_q": "*i32", "seqused_k": "*i32", "block_table": "*i32"}
PARTIAL = {"partial_output": "*fp32", "partial_peak": "*fp32", "partial_total": "*fp32"}
OPTIONAL = FEATURES | PACKED | PAGED | PARTIAL
COUNTS = ("batches", "heads", "kv_heads", "query_rows", "seqlen_q", "seqlen_k", "row_tiles", "parts", "results")


def _case(
    name: str,
    architecture: str,
    dtype: str,
    width: int,
    tile: decode.DecodeTile,
    given: dict[str, str],
    mask: str = "none",
) -> Case:
    types = {x: f"*{dtype}" for x in ("query", "key", "value", "output")} | dict.fromkeys(COUNTS, "i32")
    types |= {"mask": MASKS[mask], "lse": "*fp32", "scale": "fp32"} | given
    masked = mask != "none"
    if masked:
        tile = decode.beside_mask(tile)
    options = decode.launch_options(architecture, tile, "block_table" in given, masked, masked or "softcap" in given)
    constants = {
        "HEAD_DIM": width,
        "VALUE_DIM": width,
        "BLOCK_D": width,
        "BLOCK_DV": width,
        "BLOCK_R": options.pop("BLOCK_R"),
        "BLOCK_K": options.pop("BLOCK_K"),
        "PAGE_SIZE": 16 if "block_table" in given else 0,
        "MASK": mask,
        "BOTTOM_RIGHT": True,
    }
    constants |= dict.fromkeys(OPTIONAL.keys() - given)
    constants |= {"mask": None} if mask == "none" else {"mask_stride_k": 1}
    kernel = decode.attention_decode_kernel
    # What has less is much like something with more.
    thorough = name in ("plain", "packed") or width == 64 or (dtype == "fp32" and width == 128)
    types = signature(kernel, types, constants)
    return Case(f"{name} {dtype} {width} rows {tile.block_r}", kernel, types, constants, options, thorough=thorough)


def cases(target) -> list[Case]:
    architecture = target.arch if target.backend == "hip" else f"sm_{target.arch}"
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for width in (64, 128, 256):
            for tile in decode.DECODE_TILES[width, BYTES[dtype]]:
                kind = (architecture, dtype, width, tile)
                found.append(_case("paged", *kind, PAGED | PARTIAL))
                if dtype == "fp16":
                    continue
                found += [
                    _case("plain", *kind, PARTIAL),
                    _case("packed", *kind, PACKED | FEATURES),
                    _case("paged everything", *kind, PAGED | FEATURES),
                    _case("bool mask", *kind, FEATURES | PARTIAL, "bool"),
                    _case("additive mask", *kind, FEATURES | PARTIAL, "additive"),
                ]
    kernel = combine.attention_combine_kernel
    types = {
        "output": "*bf16",
        "lse": "*fp32",
        "sinks": "*fp32",
        "cu_seqlens_q": "*i32",
        "kept_scale": "fp32",
    } | PARTIAL
    constants = {"VALUE_DIM": 256, "BLOCK_DV": 256, "BLOCK_PARTS": combine.PARTS_AT_ONCE}
    types |= {"heads": "i32"}
    return [*found, Case("combine bf16 256", kernel, signature(kernel, types, constants), constants)]
