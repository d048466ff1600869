"""The transformer family of fastformer.nn against torch.nn's: layers, encoder, decoder and the whole."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from module_support import (
    B,
    E,
    H,
    L,
    S,
    added,
    build_twins,
    causal_mask,
    close,
    compare,
    judge,
    on_devices,
    padding_mask,
    run,
    twins,
)
from torch import Tensor

from fastformer import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]

WIDTH = 24  # of the hidden layer


def layer(library: ModuleType, kind: str, **options: Any) -> torch.nn.Module:
    return getattr(library, f"Transformer{kind}Layer")(E, H, WIDTH, **{"dropout": 0.0, **options})


def build(library: ModuleType, name: str, **options: Any) -> torch.nn.Module:
    """The small module of that class."""
    if name == "Transformer":
        return library.Transformer(E, H, 2, 1, WIDTH, **{"dropout": 0.0, **options})
    kind = "Encoder" if "Encoder" in name else "Decoder"
    if name.endswith("Layer"):
        return layer(library, kind, **options)
    norm = library.LayerNorm(E, bias=options.get("bias", True)) if options.get("norm_first") else None
    return getattr(library, name)(layer(library, kind, **options), 2, norm)


# --- every option, mask and mode

NAMES = [
    "TransformerEncoderLayer",
    "TransformerEncoder",
    "TransformerDecoderLayer",
    "TransformerDecoder",
    "Transformer",
]

OPTIONS = [
    {"batch_first": True},
    {"bias": False, "layer_norm_eps": 1e-3},
    {"batch_first": True, "activation": "gelu"},
    {"batch_first": True, "activation": torch.nn.functional.gelu, "bias": False},
    {"activation": torch.nn.functional.silu},
    {"batch_first": True, "activation": torch.relu},
    {"batch_first": True, "activation": torch.nn.GELU(approximate="tanh")},
    {"batch_first": True, "activation": torch.nn.SiLU()},
    {"batch_first": True, "activation": torch.tanh},
]


def self_masks(length: int, batch: int) -> list[tuple[Tensor | None, Tensor | None, bool]]:
    """(mask, key padding mask, whether the mask is the causal one), unbatched with a batch of 0."""
    causal = causal_mask(length)
    padding = padding_mask(length, *[length, length - 2][: max(batch, 1)])
    padding = padding if batch else padding_mask(length, length - 2)[0]
    for_each_head = torch.randn(max(batch, 1) * H, length, length, requires_grad=True)
    return [
        (None, None, False),
        (causal, None, True),
        (causal < 0, padding, True),
        (None, padding, False),
        (torch.randn(length, length, requires_grad=True), added(padding), False),
        (for_each_head, None, False),
    ]


def mask_options(name: str, batch: int) -> Iterator[dict[str, Any]]:
    """Keyword arguments of the forward of module ``name``: every mask it takes, with and without the causal hint."""
    encoder_masks = self_masks(S if name == "Transformer" else L, batch)
    if "Encoder" in name:
        mask_name = "src_mask" if name.endswith("Layer") else "mask"
        for mask, padding, causal in encoder_masks:
            yield {mask_name: mask, "src_key_padding_mask": padding}
            if causal:
                yield {mask_name: mask, "src_key_padding_mask": padding, "is_causal": True}
        return
    memory = [(mask, padding) for mask, padding, _ in self_masks(S, batch)]
    for (mask, padding, causal), (_, memory_padding) in zip(self_masks(L, batch), reversed(memory)):
        memory_mask = None if padding is None else torch.randn(L, S, requires_grad=True)
        given = {"tgt_mask": mask, "tgt_key_padding_mask": padding}
        given |= {"memory_mask": memory_mask, "memory_key_padding_mask": memory_padding}
        if name == "Transformer":
            src_mask, src_padding, _ = encoder_masks.pop()
            given |= {"src_mask": src_mask, "src_key_padding_mask": src_padding}
        yield given
        if causal:
            yield {**given, "tgt_is_causal": True}
    upper_left = torch.ones(L, S, dtype=torch.bool).triu(1)
    yield {"memory_mask": upper_left, "memory_is_causal": True}


@on_devices
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_matches_torch(device: str, name: str, options: dict[str, Any], norm_first: bool) -> None:
    """In training and in eval mode, with gradients and without, batched and unbatched."""
    ours, theirs = build_twins(lambda library: build(library, name, norm_first=norm_first, **options))
    ours, theirs = ours.to(device), theirs.to(device)
    batch_first = options.get("batch_first", False)
    for batch in (B, 0):
        lengths = {"Encoder": (L,), "Decoder": (L, S)}.get(
            name.removeprefix("Transformer").removesuffix("Layer"), (S, L)
        )
        shapes = [(n, E) if not batch else (batch, n, E) if batch_first else (n, batch, E) for n in lengths]
        inputs = [torch.randn(shape, device=device) for shape in shapes]
        for masks in mask_options(name, batch):
            masks = {key: mask.to(device) if isinstance(mask, Tensor) else mask for key, mask in masks.items()}
            compare(ours.train(), theirs.train(), inputs, **masks)
        compare(ours.eval(), theirs.eval(), inputs, **masks)
        expected = theirs(*inputs, **masks)  # with gradients: torch's own fast path takes any GELU for the erf form
        with torch.inference_mode():
            close(ours(*inputs, **masks), expected)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name: str) -> None:
    def wide(library: ModuleType) -> torch.nn.Module:
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "dtype": torch.bfloat16}
        if name == "Transformer":
            return library.Transformer(64, 4, 1, 1, 128, **options)
        kind = "Encoder" if "Encoder" in name else "Decoder"
        one = getattr(library, f"Transformer{kind}Layer")(64, 4, 128, norm_first=True, **options)
        return one if name.endswith("Layer") else getattr(library, name)(one, 2)

    ours, theirs = build_twins(wide)
    inputs = [torch.randn(4, length, 64).bfloat16() for length in ((16,) if "Encoder" in name else (16, 24))]
    mask_name = {"TransformerEncoderLayer": "src_mask", "TransformerEncoder": "mask"}.get(name, "tgt_mask")
    length = 24 if name == "Transformer" else 16
    judge(ours, theirs, inputs, **{mask_name: causal_mask(length).bfloat16()})


# --- dropout


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_dropout(name: str, norm_first: bool) -> None:
    """Without attention dropout, whose draws are the kernel's, our layer draws what torch's draws."""
    ours, theirs = twins(name, E, H, WIDTH, dropout=0.5, norm_first=norm_first)
    for each in (ours, theirs):
        for module in each.modules():
            if isinstance(module, torch.nn.MultiheadAttention):
                module.dropout = 0.0
    inputs = [torch.randn(B, L, E)] * (1 if "Encoder" in name else 2)
    results = []
    for each in (ours, theirs):
        torch.manual_seed(1)
        results.append(each(*inputs))
    close(*results)
    assert not torch.equal(ours(*inputs), ours(*inputs))
    compare(ours.eval(), theirs.eval(), inputs)


# --- causal masks


@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
def test_causal_masks_are_detected(name: str, boolean: bool) -> None:
    """Given no hint; and a mask that is not quite causal, or wants a gradient, is applied."""
    stack = build(nn, name, batch_first=True)
    causal = causal_mask(L) < 0 if boolean else causal_mask(L)
    other = causal.clone()
    other[0, -1] = 0
    inputs = [torch.randn(B, L, E)] * (1 if "Encoder" in name else 2)
    hints = []
    for each in stack.layers:
        each.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: hints.append(kwargs["is_causal"]), with_kwargs=True
        )
    for mask, hint, expected in (
        (causal, None, True),
        (other, None, False),
        (causal, False, False),
        (None, None, False),
        (causal.expand(B * H, L, L), None, False),
    ):
        options = {"mask": mask, "is_causal": hint}
        if name == "TransformerDecoder":
            options = {"tgt_mask": mask, "tgt_is_causal": hint}
        stack(*inputs, **options)
        assert hints == [expected] * 2
        hints.clear()


def test_memory_hint_is_passed_on() -> None:
    decoder, hints = build(nn, "TransformerDecoder", batch_first=True), []
    for each in decoder.layers:
        each.multihead_attn.register_forward_pre_hook(
            lambda _, args, kwargs: hints.append(kwargs["is_causal"]), with_kwargs=True
        )
    x = torch.randn(B, L, E)
    for hint in (True, False):
        decoder(x, x, memory_mask=causal_mask(L), memory_is_causal=hint)
    assert hints == [True, True, False, False]


def test_causal_mask_with_a_gradient_gets_it() -> None:
    encoder = build(nn, "TransformerEncoder", batch_first=True)
    mask = torch.zeros(2, 2).masked_fill(torch.tensor([[False, True], [False, False]]), -torch.inf).requires_grad_()
    _, gradients = run(encoder, [torch.randn(B, 2, E)], {"mask": mask})
    assert gradients[-1] is not None and gradients[-1].any()


# --- padding and nested tensors


@on_devices
@pytest.mark.parametrize("library", ["torch.nn's encoder", "fastformer.nn's encoder"])
@pytest.mark.parametrize("enable_nested_tensor", [True, False])
@pytest.mark.parametrize(
    "masks", ["none", "padding", "added padding", "padding in front", "all padding", "causal", "both"]
)
def test_encoder_without_gradients(device: str, library: str, enable_nested_tensor: bool, masks: str) -> None:
    """torch's takes nested tensors where it can, which leaves zeros where there was padding."""
    pair = twins("TransformerEncoderLayer", E, H, WIDTH, batch_first=True)
    encoders = (nn if library.startswith("fast") else torch.nn).TransformerEncoder, torch.nn.TransformerEncoder
    ours, theirs = (
        encoder(each, 2, torch.nn.LayerNorm(E), enable_nested_tensor=enable_nested_tensor).to(device).eval()
        for encoder, each in zip(encoders, pair)
    )
    src = torch.randn(B, L, E, device=device)
    padding = padding_mask(L, L, 0 if masks == "all padding" else 2).to(device)
    options = {}
    if masks == "both" or "padding" in masks:
        options["src_key_padding_mask"] = padding.flip(1) if masks == "padding in front" else padding
    if masks == "added padding":
        options["src_key_padding_mask"] = added(padding)
    if masks in ("causal", "both"):
        options["mask"] = causal_mask(L).to(device) if masks == "causal" else causal_mask(L).to(device) < 0
    calls = []
    for each in ours.layers:
        each.self_attn.out_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        mine, reference = ours(src, **options), theirs(src, **options)
        if masks == "all padding" and not enable_nested_tensor:  # where torch's gives NaN
            mine, reference = mine[0], reference[0]
        close(mine, reference)
    assert len(calls) == 2
    if masks != "all padding":
        close(ours(src, **options), theirs(src, **options))  # with gradients nothing is nested


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerEncoder"])
def test_nested_tensors(name: str) -> None:
    ours, theirs = build_twins(lambda library: build(library, name, batch_first=True))
    sequences = [torch.randn(3, E), torch.randn(5, E)]
    src, jagged = (torch.nested.nested_tensor(sequences, layout=layout) for layout in (torch.strided, torch.jagged))
    with torch.no_grad():
        expected = theirs.eval()(src).unbind()
        for given in (src, jagged):  # which torch's doesn't take
            output = ours.eval()(given)
            assert output.layout == given.layout
            for mine, reference in zip(output.unbind(), expected, strict=True):
                close(mine, reference)
    with pytest.raises(
        ValueError, match=r"src_key_padding_mask has shape \(2, 5\), must be None since src is a nested"
    ):
        ours(src, src_key_padding_mask=padding_mask(5, 3, 5))


# --- the whole


class Seq2Seq(torch.nn.Module):
    """An encoder-decoder with its loss, out of the classes of one library."""

    def __init__(self, library: ModuleType, norm_first: bool) -> None:
        super().__init__()
        self.embedding = library.Embedding(30, E)
        options = {"dropout": 0.0, "activation": "gelu", "norm_first": norm_first, "batch_first": True}
        self.transformer = library.Transformer(E, H, 2, 2, WIDTH, **options)
        self.norm = library.LayerNorm(E)
        self.head = library.Linear(E, 30)
        self.softmax = library.Softmax(-1)

    def forward(self, src: Tensor, tgt: Tensor) -> tuple[Tensor, Tensor]:
        """(loss of predicting the next target token, probabilities), where 0 is padding."""
        padding = {"src_key_padding_mask": src == 0, "memory_key_padding_mask": src == 0}
        masks = {**padding, "tgt_mask": causal_mask(tgt.shape[1])}
        hidden = self.norm(self.transformer(self.embedding(src), self.embedding(tgt), **masks))
        logits = self.head(hidden)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=0)
        return loss, self.softmax(logits)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_decoder_with_its_library_swapped(norm_first: bool) -> None:
    ours, theirs = build_twins(lambda library: Seq2Seq(library, norm_first))
    src, tgt = torch.randint(1, 30, (B, S)), torch.randint(1, 30, (B, L))
    src[1, 5:] = tgt[1, 4:] = 0
    compare(ours, theirs, [src, tgt])
    ours.eval(), theirs.eval()
    with torch.no_grad():
        for mine, reference in zip(ours(src, tgt), theirs(src, tgt), strict=True):
            close(mine, reference)


def test_custom_encoder_and_decoder_are_left_alone() -> None:
    class Memory(torch.nn.Module):
        def forward(self, src: Tensor, **masks: Any) -> Tensor:
            return 2 * src

    decoder = build(torch.nn, "TransformerDecoder")
    ours = nn.Transformer(E, H, num_decoder_layers=1, dim_feedforward=WIDTH, custom_encoder=Memory())
    assert type(ours.encoder) is Memory and type(ours.decoder) is nn.TransformerDecoder
    ours = nn.Transformer(E, H, 1, 1, WIDTH, 0.0, "relu", None, decoder)
    assert ours.decoder is decoder and type(decoder) is torch.nn.TransformerDecoder
    assert type(ours.encoder) is nn.TransformerEncoder and type(ours.encoder.norm) is nn.LayerNorm
    theirs = torch.nn.Transformer(E, H, 1, 1, WIDTH, 0.0, custom_decoder=decoder)
    theirs.load_state_dict(ours.state_dict())
    compare(ours, theirs, [torch.randn(S, B, E), torch.randn(L, B, E)])
