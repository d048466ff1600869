"""Tensors whose elements lie more than 2^31 apart, over a sparse file: only the pages that are touched exist."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import KERNEL_TARGETS, Target, tensor
from torch import Tensor

import fastformer
import fastformer.functional as F

Spread = Callable[..., Tensor]

#: On a GPU such a storage would be real memory.
ON_CPU = [target for target in KERNEL_TARGETS if target.device == "cpu"]
BATCH, HEADS, SEQLEN, HEAD_DIM = 2, 2, 70, 8
SEQLEN_INTERPRETED = 16  # a multiple of 16, or masks would be copied


@pytest.fixture
def spread(tmp_path: Path) -> Iterator[Spread]:
    """``spread(x, dim)``: the values of ``x`` with a stride of ``dim`` that takes its last element past 2^31."""
    files = []

    def far(x: Tensor, dim: int) -> Tensor:
        strides = list(x.contiguous().stride())
        strides[dim] = (2**31 // (x.shape[dim] - 1) // 16 + 4) * 16
        elements = sum(stride * (size - 1) for stride, size in zip(strides, x.shape)) + 1
        path = tmp_path / f"storage{len(files)}"
        files.append(path)
        storage = torch.from_file(str(path), shared=True, size=elements, dtype=x.dtype)
        return storage.as_strided(x.shape, strides).copy_(x)

    yield far
    for path in files:
        path.unlink()


TENSORS = ("query", "key", "value", "attn_mask", "grad_output")
#: Triton's interpreter has them all far at once.
EACH = [
    pytest.param(target, name, id=f"{name}-{target}")
    for target in ON_CPU
    if not (target.slow and target.dtype == torch.float16)
    for name in ("bool mask", *(("everything",) if target.slow else TENSORS))
]


@pytest.mark.parametrize(("target", "name"), EACH)
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_offsets_beyond_32_bits(target: Target, name: str, dim: int, spread: Spread) -> None:
    seqlen = SEQLEN_INTERPRETED if target.slow else SEQLEN
    shape = (BATCH, HEADS, seqlen, HEAD_DIM)
    near = {name: tensor(target, *shape) for name in ("query", "key", "value", "grad_output")}
    near["attn_mask"] = tensor(target, BATCH, HEADS, seqlen, seqlen)
    if name == "bool mask":
        name, near["attn_mask"] = "attn_mask", near["attn_mask"] > -1
    names = near if name == "everything" else [name]
    far = near | {name: spread(near[name], dim) for name in names}
    assert all(far[name].stride(dim) * (far[name].shape[dim] - 1) >= 2**31 for name in names)
    for mine, plain in zip(results(target, far), results(target, near)):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("target", [target for target in ON_CPU if target.dtype == torch.float32], ids=str)
@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "additive"])
def test_rows_of_a_mask_beyond_32_bits(target: Target, boolean: bool, spread: Spread) -> None:
    """One value for all keys of a query, the queries' far apart."""
    near = {name: tensor(target, 1, 1, SEQLEN, HEAD_DIM) for name in ("query", "key", "value", "grad_output")}
    mask = tensor(target, 1, 1, SEQLEN, 1)
    near["attn_mask"] = mask > 0 if boolean else mask
    far = near | {"attn_mask": spread(near["attn_mask"], 2)}
    for mine, plain in zip(results(target, far), results(target, near)):
        assert torch.equal(mine, plain)


def results(target: Target, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Output, lse and all gradients."""
    leaves = {name: x.detach() for name, x in tensors.items() if name != "grad_output"}
    wanted = [x.requires_grad_() for x in leaves.values() if x.is_floating_point()]
    with fastformer.backend(target.backend):
        output, lse = F.scaled_dot_product_attention(**leaves, is_causal=True, return_lse=True)
        return [output, lse, *torch.autograd.grad(output, wanted, tensors["grad_output"])]
