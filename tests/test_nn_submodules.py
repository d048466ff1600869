"""What users do to the parts of a layer, which fusing them must not hide: hooks, replacements, overridden blocks."""

from typing import Any

import pytest
import torch
from module_support import B, E, H, L, close, compare, padding_mask, twins
from torch import Tensor

from fastformer import nn

WIDTH = 24  # of the hidden layer
LAYERS = {  # and how many inputs they take
    "TransformerEncoderLayer": 1,
    "TransformerDecoderLayer": 2,
}
PARTS = ["self_attn", "self_attn.out_proj", "linear1", "linear2", "activation"]
PARTS += ["norm1", "norm2", "dropout", "dropout1", "dropout2"]
MORE_PARTS = ["multihead_attn", "multihead_attn.out_proj", "norm3", "dropout3"]


@pytest.mark.parametrize(
    ("name", "part"),
    [(name, part) for name in LAYERS for part in PARTS + (MORE_PARTS if "Decoder" in name else [])],
)
@pytest.mark.parametrize("norm_first", [False, True])
def test_hooks(name: str, part: str, norm_first: bool) -> None:
    options = {"dropout": 0.0, "activation": torch.nn.GELU(), "norm_first": norm_first, "batch_first": True}
    layer = getattr(nn, name)(E, H, WIDTH, **options)
    inputs = [torch.randn(B, L, E, requires_grad=True)] * LAYERS[name]
    before = layer(*inputs)
    module, fired = layer.get_submodule(part), []
    handles = [
        module.register_forward_pre_hook(lambda *_: fired.append("before")),
        module.register_forward_hook(lambda *_: fired.append("after")),
        module.register_full_backward_hook(lambda *_: fired.append("backward")),
    ]
    output = layer(*inputs)
    output.sum().backward()
    assert fired == ["before", "after", "backward"]
    close(output, before)
    for handle in handles:
        handle.remove()
    layer(*inputs)
    assert len(fired) == 3
    module.register_forward_hook(
        lambda _, args, output: 0 * output if isinstance(output, Tensor) else (0 * output[0], None)
    )
    assert not torch.allclose(layer(*inputs), before)


@pytest.mark.parametrize("name", LAYERS)
def test_global_hooks(name: str) -> None:
    layer, seen = getattr(nn, name)(E, H, WIDTH, dropout=0.0, batch_first=True), set()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        layer(*[torch.randn(B, L, E)] * LAYERS[name])
    finally:
        handle.remove()
    assert seen == set(layer.modules())


class Twice(torch.nn.Module):
    """Wraps a part, as adapters do, and gives the double of it."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.part(*args, **kwargs)
        return 2 * output if isinstance(output, Tensor) else (2 * output[0], None)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_replaced_parts_are_called(name: str, norm_first: bool) -> None:
    ours, theirs = twins(name, E, H, WIDTH, dropout=0.0, norm_first=norm_first, batch_first=True)
    inputs = [torch.randn(B, L, E) for _ in range(LAYERS[name])]
    for part in ("self_attn", "norm1", "linear1", "norm2", "multihead_attn", "dropout", "norm3"):
        if not hasattr(ours, part):
            continue
        for layer in (ours, theirs):
            setattr(layer, part, Twice(getattr(layer, part)))
        compare(ours, theirs, inputs)
    for layer in (ours, theirs):
        layer.linear2, layer.norm2 = torch.nn.Identity(), torch.nn.Identity()
        layer.linear1 = torch.nn.Sequential(torch.nn.Linear(E, E, bias=False), torch.nn.Tanh())
        torch.nn.init.eye_(layer.linear1[0].weight)
    compare(ours, theirs, inputs)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_parts_of_another_dtype(name: str, norm_first: bool) -> None:
    """A branch in bfloat16 is promoted by the residual addition, as it is in torch's."""

    class Rounded(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.bfloat16()

    pair = twins(name, E, H, WIDTH, dropout=0.0, norm_first=norm_first, batch_first=True)
    for layer in pair:
        layer.dropout1 = layer.dropout2 = Rounded()
    compare(*pair, [torch.randn(B, L, E) for _ in range(LAYERS[name])])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_overridden_blocks_are_called(name: str, norm_first: bool) -> None:
    """And with masks as torch's blocks get them."""

    def overriding(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
        class Overriding(base):
            def _sa_block(
                self, x: Tensor, attn_mask: Tensor, key_padding_mask: Tensor, is_causal: bool = False
            ) -> Tensor:
                heads = x.unsqueeze(1)
                weights = heads @ heads.mT + attn_mask
                return (weights.softmax(-1) @ heads).squeeze(1)

            def _mha_block(self, *args: Any) -> Tensor:
                return 3 * super()._mha_block(*args)

            def _ff_block(self, x: Tensor) -> Tensor:
                return 2 * super()._ff_block(x)

        return Overriding

    layers = []
    for library in (nn, torch.nn):
        torch.manual_seed(0)
        cls = overriding(getattr(library, name))
        layers.append(cls(E, H, WIDTH, dropout=0.0, norm_first=norm_first, batch_first=True))
    inputs = [torch.randn(B, L, E) for _ in range(LAYERS[name])]
    mask_name = "src" if name == "TransformerEncoderLayer" else "tgt"
    masks = {f"{mask_name}_mask": torch.eye(L, dtype=torch.bool)}
    compare(*layers, inputs, **masks, **{f"{mask_name}_key_padding_mask": padding_mask(L, L, L - 2)})
