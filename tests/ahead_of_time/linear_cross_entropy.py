"""The kernels of the fused unembedding and loss, in every tile of their tables."""

from __future__ import annotations

from fastformer.triton_kernels import linear_cross_entropy as kernels

from . import Case
from .feed_forward import BYTES, case, device_class, operand, signature


def _partial_loss(target, dtype: str, descriptors: bool, smoothing: bool) -> Case:
    tile = kernels.LOSS_TILES[device_class(target), BYTES[dtype]]
    types = {
        "input": operand(dtype, tile.block_m, tile.block_k, descriptors),
        "weight": operand(dtype, tile.block_n, tile.block_k, descriptors),
        "bias": f"*{dtype}",
        "target": "*i64",
        "partials": "*fp32",
        "V": "i32",
        "tiles_a_split": "i32",
    }
    constants = {"stride_input_c": 1, "stride_weight_c": 1, "SMOOTHING": smoothing, "DESCRIPTORS": descriptors}
    name = f"partial loss {dtype}{' descriptors' if descriptors else ''}{' smoothed' if smoothing else ''}"
    return case(name, kernels._partial_loss, types, constants, tile)


def _join_loss() -> Case:
    types = {"partials": "*fp32", "target": "*i64", "loss": "*fp32", "lse": "*fp32", "smoothing": "fp32"}
    constants = {"SMOOTHING": True, "ROWS": kernels.JOIN_ROWS}
    types |= {"V": "i32", "ignore_index": "i32"}
    kernel = kernels._join_loss
    return Case("join loss", kernel, signature(kernel, types, constants), constants, {"num_warps": kernels.JOIN_WARPS})


def _logits_to_gradient(dtype: str, loss: bool) -> Case:
    types = {
        "logits": f"*{dtype}",
        "target": "*i64",
        "row_grad": "*fp32",
        "loss": "*fp32",
        "lse": "*fp32",
        "smoothing": "fp32",
        "V": "i32",
        "ignore_index": "i32",
    }
    constants = {"SMOOTHING": True, "BLOCK": kernels.ROW_BLOCK} | ({} if loss else {"loss": None})
    kernel = kernels._logits_to_gradient
    if not loss:
        del types["loss"]
    name = f"logits to gradient {dtype}{' and loss' if loss else ''}"
    return Case(name, kernel, signature(kernel, types, constants), constants, {"num_warps": kernels.ROW_WARPS})


def cases(target) -> list[Case]:
    """Every tile, with and without label smoothing."""
    found = [_join_loss()]
    for dtype, size in BYTES.items():
        for descriptors in (True, False) if (device_class(target), size) == ("sm_90", 2) else (False,):
            found += [_partial_loss(target, dtype, descriptors, smoothing) for smoothing in (False, True)]
        found += [_logits_to_gradient(dtype, loss) for loss in (False, True)]
    return found
