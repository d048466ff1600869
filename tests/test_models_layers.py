"""What the models are built of: every option against a plain definition, or a value that it must give."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer.models import BERT, GPT, BERTConfig, GPTConfig, RotaryScaling, Seq2Seq, Seq2SeqConfig, shift_right
from fastformer.models.base import RotaryTable, Transformer, scaled_frequencies
from fastformer.models.config import ACTIVATIONS, TransformerConfig
from fastformer.models.layers import Stack

SIZES = {"vocab_size": 31, "context_length": 16, "num_layers": 2, "num_heads": 4, "d_model": 32}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# A decoder-only transformer, written out


def plain_norm(x: Tensor, norm: torch.nn.Module, config: TransformerConfig) -> Tensor:
    if config.norm == "rms_norm":
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * norm.weight
    x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * norm.weight
    return x if norm.bias is None else x + norm.bias


def plain_turned(x: Tensor, base: float) -> Tensor:
    """Rotary positions of [B, H, S, D], as complex numbers."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = torch.polar(torch.ones(x.shape[-2], half).double(), torch.arange(x.shape[-2])[:, None] * frequencies)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turns
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


def plain_attention(x: Tensor, attention: torch.nn.Module, config: TransformerConfig) -> Tensor:
    shared = config.num_heads // config.kv_heads
    keys = config.kv_heads * config.head_dim
    q, k, v = torch_functional.linear(x, attention.qkv.weight, attention.qkv.bias).split(
        (config.d_model, keys, keys), dim=-1
    )
    q, k, v = (y.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for y in (q, k, v))
    if config.positions == "rotary":
        q, k = (plain_turned(y, config.rotary_base) for y in (q, k))
    k, v = (y.repeat_interleave(shared, dim=1) for y in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(config.head_dim)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    return torch_functional.linear((weights @ v).transpose(1, 2).flatten(2), attention.out.weight, attention.out.bias)


def plain_feed_forward(x: Tensor, layer: torch.nn.Module, config: TransformerConfig) -> Tensor:
    name, gated = ACTIVATIONS[config.activation]
    functions = {
        "gelu": torch_functional.gelu,
        "gelu_tanh": lambda y: torch_functional.gelu(y, approximate="tanh"),
        "relu": torch.relu,
        "silu": torch_functional.silu,
    }
    hidden = torch_functional.linear(x, layer.linear1.weight, layer.linear1.bias)
    gate = hidden if not gated else torch_functional.linear(x, layer.linear_gate.weight)
    hidden = functions[name](gate) * (hidden if gated else 1)
    return torch_functional.linear(hidden, layer.linear2.weight, layer.linear2.bias)


def plain_gpt(model: GPT, tokens: Tensor) -> Tensor:
    config = model.config
    x = model.token_embedding.weight[tokens]
    if config.positions == "learned":
        x = x + model.position_embedding.weight[: tokens.shape[1]]
    if config.positions == "sinusoidal":
        angles = torch.arange(tokens.shape[1])[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)
        x = x * math.sqrt(32) + torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
    for block in model.blocks:
        for norm, sublayer, plain in (
            (block.norm1, block.attention, plain_attention),
            (block.norm2, block.feed_forward, plain_feed_forward),
        ):
            if config.norm_first:
                x = x + plain(plain_norm(x, norm, config), sublayer, config)
            else:
                x = plain_norm(x + plain(x, sublayer, config), norm, config)
    x = plain_norm(x, model.norm, config) if config.norm_first else x
    unembedding = model.token_embedding if config.tied_unembedding else model.unembedding
    return x @ unembedding.weight.T


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "sinusoidal"},
        {"positions": "rotary", "rotary_base": 50.0},
        {"norm": "rms_norm"},
        {"norm_first": False},
        {"norm_first": False, "norm": "rms_norm", "positions": "rotary"},
        {"norm_eps": 0.5},
        {"num_kv_heads": 1},
        {"num_kv_heads": 2, "positions": "rotary"},
        {"d_hidden": 7},
        {"bias": False},
        {"tied_unembedding": False},
        *({"activation": name} for name in ACTIVATIONS),
    ],
)
def test_gpt_with_every_option(options: dict[str, object]) -> None:
    model = randomised(GPT(GPTConfig(**SIZES, **options)))
    tokens, targets = torch.randint(31, (2, 2, 13))
    expected = plain_gpt(model, tokens)
    assert_close(model(tokens), expected)
    loss = torch_functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    assert_close(model(tokens, targets), loss)
    names, parameters = zip(*model.named_parameters())
    ours = torch.autograd.grad(model(tokens, targets), parameters)
    plains = torch.autograd.grad(loss, parameters)
    largest = max(x.abs().max() for x in plains)
    for name, a, b in zip(names, ours, plains):
        assert (a - b).abs().max() <= 2e-5 * largest, name


# An encoder and a decoder, beside torch.nn's


def torch_stack(config: TransformerConfig, stack: Stack, norm: torch.nn.Module | None) -> torch.nn.Module:
    """torch's encoder, or decoder, with the stack's weights."""
    cross = stack[0].cross_attention is not None
    kind = torch.nn.TransformerDecoderLayer if cross else torch.nn.TransformerEncoderLayer
    options = {"activation": "gelu", "batch_first": True, "norm_first": config.norm_first, "dropout": 0.0}
    layer = kind(config.d_model, config.num_heads, config.hidden_width, **options)
    if cross:
        torchs = torch.nn.TransformerDecoder(layer, len(stack), norm)
    else:
        torchs = torch.nn.TransformerEncoder(layer, len(stack), norm, enable_nested_tensor=False)
    for ours, theirs in zip(stack, torchs.layers):
        state = {"self_attn.in_proj": ours.attention.qkv, "self_attn.out_proj": ours.attention.out}
        state |= {"linear1": ours.feed_forward.linear1, "linear2": ours.feed_forward.linear2, "norm1": ours.norm1}
        if cross:
            state |= {"multihead_attn.out_proj": ours.cross_attention.out, "norm2": ours.cross_norm}
        state["norm3" if cross else "norm2"] = ours.norm2
        tensors = {}
        for name, module in state.items():
            for end in ("weight", "bias"):
                tensors[name + ("_" if name.endswith("in_proj") else ".") + end] = getattr(module, end)
        if cross:
            parts = ours.cross_attention.query, ours.cross_attention.key_value
            for end in ("weight", "bias"):
                tensors[f"multihead_attn.in_proj_{end}"] = torch.cat([getattr(part, end) for part in parts])
        theirs.load_state_dict(tensors, strict=True)
    return torchs


@pytest.mark.parametrize("norm_first", [True, False])
def test_seq2seq_is_torchs_transformer(norm_first: bool) -> None:
    config = Seq2SeqConfig(**SIZES, positions="sinusoidal", norm_first=norm_first, num_decoder_layers=3)
    model = randomised(Seq2Seq(config))
    encoder = torch_stack(config, model.encoder, model.encoder_norm)
    decoder = torch_stack(config, model.decoder, model.decoder_norm)
    source, tokens = torch.randint(31, (3, 9)), torch.randint(31, (3, 5))
    lengths = torch.tensor([9, 4, 1])
    padding = torch.arange(9) >= lengths[:, None]

    def embedded(x: Tensor) -> Tensor:
        return model.token_embedding(x) * math.sqrt(32) + model.position_embedding.table[: x.shape[1]]

    memory = encoder(embedded(source), src_key_padding_mask=padding)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
    features = decoder(embedded(tokens), memory, tgt_mask=causal, memory_key_padding_mask=padding)
    expected = features @ model.token_embedding.weight.T
    assert_close(model(source, tokens, source_lengths=lengths), expected)
    assert_close(model(source, tokens, source_mask=~padding), expected)
    ours = model.encode(source, source_lengths=lengths)
    assert_close(ours[~padding], memory[~padding])


def test_loss_of_seq2seq_with_padding_on_both_sides() -> None:
    """That of each pair alone, weighted by its tokens."""
    config = Seq2SeqConfig(**SIZES, start_token=2)
    model = randomised(Seq2Seq(config))
    pairs = [(torch.randint(31, (n,)), torch.randint(31, (m,))) for n, m in ((9, 3), (2, 7), (5, 5))]
    source, targets = torch.zeros(3, 9, dtype=torch.int64), torch.full((3, 7), -100)
    for i, (x, y) in enumerate(pairs):
        source[i, : len(x)], targets[i, : len(y)] = x, y
    lengths = torch.tensor([9, 2, 5])
    loss = model(source, shift_right(targets, 2), targets, source_lengths=lengths)
    alone = [model(x[None], shift_right(y[None], 2), y[None]) * len(y) for x, y in pairs]
    assert_close(loss, sum(alone) / 15)
    for i, (_, y) in enumerate(pairs):  # and by torch's cross-entropy of the logits
        logits = model(source, shift_right(targets, 2), source_lengths=lengths)[i, : len(y)]
        assert_close(torch_functional.cross_entropy(logits, y) * len(y), alone[i])


def test_shift_right() -> None:
    targets = torch.tensor([[5, 6, 7, 8], [5, 6, -100, -100]])
    assert shift_right(targets, 1).tolist() == [[1, 5, 6, 7], [1, 5, 6, 1]]
    assert targets[0].tolist() == [5, 6, 7, 8]


# BERT (whose outputs are compared with transformers' in test_models_pretrained.py)


def test_padding_of_bert_changes_nothing() -> None:
    model = randomised(BERT(BERTConfig(**SIZES, pooler=True, num_classes=3, next_sentence_head=True)))
    tokens, lengths = torch.randint(31, (3, 9)), torch.tensor([9, 4, 1])
    mask = torch.arange(9) < lengths[:, None]
    segments = torch.randint(2, (3, 9))
    found = model(tokens, tokens_lengths=lengths, segments=segments)
    assert torch.equal(found, model(tokens, tokens_mask=mask, segments=segments))
    classes = model.classify(tokens, tokens_lengths=lengths, segments=segments)
    for i, length in enumerate(lengths):
        alone = tokens[i : i + 1, :length], segments[i : i + 1, :length]
        assert_close(found[i, :length], model(alone[0], segments=alone[1])[0])
        assert_close(classes[i], model.classify(alone[0], segments=alone[1])[0])
    other = torch.where(mask, tokens, 30)
    assert torch.equal(model(other, tokens_lengths=lengths, segments=segments)[mask], found[mask])


def test_bert_sees_both_sides_and_ignores_minus_100() -> None:
    model = randomised(BERT(BERTConfig(**SIZES, num_segments=0)))
    tokens = torch.randint(31, (1, 6))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 31
    assert (model(tokens)[0, 0] - model(changed)[0, 0]).abs().max() > 1e-2
    targets = torch.full((1, 6), -100)
    targets[0, 2] = 7
    assert_close(model(tokens, targets), -model(tokens)[0, 2].log_softmax(-1)[7])


# Rotary scaling


def test_scaled_frequencies() -> None:
    scaling = RotaryScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=1000)
    turns = torch.tensor([100.0, 4.0, 2.5, 1.0, 0.01], dtype=torch.float64)  # in 1000 tokens
    frequencies = turns * 2 * math.pi / 1000
    expected = torch.tensor([1.0, 1.0, 0.5 + 0.5 / 8, 1 / 8, 1 / 8], dtype=torch.float64)
    torch.testing.assert_close(scaled_frequencies(frequencies, scaling) / frequencies, expected)


def test_rotary_table_stays_exact_in_a_half_model() -> None:
    scaling = RotaryScaling(8.0, 1.0, 4.0, 16)
    table = RotaryTable(8, 32, 100.0, scaling)
    frequencies = scaled_frequencies(100.0 ** (-torch.arange(0, 8, 2).double() / 8), scaling)
    expected = (torch.arange(32)[:, None] * frequencies).cos().float()
    assert torch.equal(table.cos, expected)
    assert torch.equal(table.bfloat16().cos, expected)
    assert not table.state_dict()


# Dropout


def test_dropout_of_everything_leaves_the_embeddings() -> None:
    """Probability 1: the residual stream is what the embeddings are."""
    tokens = torch.randint(31, (2, 5))
    model = randomised(GPT(GPTConfig(**SIZES, dropout=1.0)))
    embedded = model.token_embedding.weight[tokens] + model.position_embedding.weight[:5]
    assert_close(model.features(tokens), plain_norm(embedded, model.norm, model.config))
    assert (model.eval().features(tokens) - plain_norm(embedded, model.norm, model.config)).abs().max() > 0.1


@pytest.mark.parametrize("norm_first", [True, False])
def test_dropout_of_the_embeddings(norm_first: bool) -> None:
    model = randomised(GPT(GPTConfig(**SIZES, embedding_dropout=1.0, norm_first=norm_first)))
    features = model.features(torch.randint(31, (2, 5)))
    assert_close(features, features[:1, :1].expand_as(features))  # nothing tells positions apart
    assert model.eval().features(torch.randint(31, (2, 5))).var(dim=1).max() > 1e-2


def test_dropout_of_the_attention_weights() -> None:
    model = randomised(GPT(GPTConfig(**SIZES, attention_dropout=1.0)))
    tokens = torch.randint(31, (1, 6))
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 31
    assert torch.equal(model(tokens)[0, 1:], model(changed)[0, 1:])  # no position sees another
    assert not torch.equal(model.eval()(tokens)[0, 1:], model(changed)[0, 1:])


@pytest.mark.parametrize("name", ["gpt", "bert", "seq2seq"])
def test_dropout_repeats_with_the_seed_and_ends_in_evaluation(name: str) -> None:
    options = {"dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3}
    kind, config = {"gpt": (GPT, GPTConfig), "bert": (BERT, BERTConfig), "seq2seq": (Seq2Seq, Seq2SeqConfig)}[name]
    model: Transformer = kind(config(**SIZES, **options))
    tokens = torch.randint(31, (2, 8))
    inputs = (tokens, tokens, tokens) if name == "seq2seq" else (tokens, tokens)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model(*inputs).item()

    assert loss(0) == loss(0) != loss(1)
    model.eval()
    assert loss(0) == loss(1)


# Training


@pytest.mark.parametrize("name", ["gpt", "bert", "seq2seq"])
def test_every_parameter_learns_and_compiled_losses_are_the_same(name: str) -> None:
    kind, config = {"gpt": (GPT, GPTConfig), "bert": (BERT, BERTConfig), "seq2seq": (Seq2Seq, Seq2SeqConfig)}[name]
    model: Transformer = kind(config(**SIZES))
    tokens, targets = torch.randint(31, (2, 4, 8))
    inputs = (tokens, shift_right(targets, 0), targets) if name == "seq2seq" else (tokens, targets)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    first = model(*inputs)
    assert_close(compiled(*inputs), first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(*inputs)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert loss < 0.3 * first
