"""GPT, Llama and BERT as one writes them with PyTorch alone: the peers that fastformer.models is measured against.

Parameter names are those of fastformer.models, so that a state_dict loads both ways. Changing nothing but the two
imports below runs them on fastformer's layers.

Shapes: B batch, S positions, C width (d_model), H heads of queries, G of keys and values, D head_dim, V vocabulary.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class SelfAttention(nn.Module):
    def __init__(
        self, d_model: int, num_heads: int, num_kv_heads: int, *, bias: bool = True, is_causal: bool = True
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.is_causal = num_heads, num_kv_heads, is_causal
        self.head_dim = d_model // num_heads
        self.qkv = nn.Linear(d_model, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: tuple[torch.Tensor, torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, S, C] -> [B, S, C]. A cache, of keys and values [B, G, T, D], takes the new ones at ``positions`` [S]."""
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # [B, H + 2 G, S, D]
        query, key, value = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if cache is not None:
            key, value = cache[0].index_copy_(2, positions, key), cache[1].index_copy_(2, positions, value)
        # One query is the newest: it sees all keys.
        is_causal = self.is_causal and mask is None and length > 1
        y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn features i and i + D / 2 of [B, H, S, D] by the angles whose cos and sin [S, D / 2] are given."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class FeedForward(nn.Module):
    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_hidden)
        self.linear2 = nn.Linear(d_hidden, d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear2(F.gelu(self.linear1(x)))


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_hidden, bias=False)
        self.linear2 = nn.Linear(d_hidden, d_model, bias=False)
        self.linear_gate = nn.Linear(d_model, d_hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear2(F.silu(self.linear_gate(x)) * self.linear1(x))


class PreNormBlock(nn.Module):
    def __init__(self, norm1: nn.Module, attention: SelfAttention, norm2: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.feed_forward = norm1, attention, norm2, feed_forward

    def forward(self, x: torch.Tensor, *context: object) -> torch.Tensor:
        """[B, S, C] -> [B, S, C]; the context is SelfAttention's."""
        x = x + self.attention(self.norm1(x), *context)
        return x + self.feed_forward(self.norm2(x))


class PostNormBlock(nn.Module):
    def __init__(self, d_model: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.attention = SelfAttention(d_model, num_heads, num_heads, is_causal=False)
        self.norm1 = nn.LayerNorm(d_model, eps)
        self.feed_forward = FeedForward(d_model, 4 * d_model)
        self.norm2 = nn.LayerNorm(d_model, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.feed_forward(x))


class Decoder(nn.Module):
    """What GPT and Llama share.

    A subclass has ``embed(tokens, positions)``, what the first block takes and the rotation for all of them, and
    ``unembed(features)``.
    """

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, S, V] of tokens [B, S]; given targets [B, S], the mean cross-entropy."""
        logits = self.unembed(self.features(tokens, torch.arange(tokens.shape[1], device=tokens.device)))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def features(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the last norm gives [B, S, C], of tokens at ``positions`` [S]; a cache has an entry for each layer."""
        x, rotation = self.embed(tokens, positions)
        for block, entry in zip(self.blocks, cache or [None] * len(self.blocks)):
            x = block(x, rotation, entry, positions, mask)
        return self.norm(x)


def sizes(config: object) -> dict[str, int]:
    """The arguments that all models take, of a configuration of fastformer.models."""
    names = ("vocab_size", "context_length", "num_layers", "num_heads", "d_model")
    return {name: getattr(config, name) for name in names}


class PlainGPT(Decoder):
    """GPT-2 (Radford et al. 2019)."""

    def __init__(self, vocab_size: int, context_length: int, num_layers: int, num_heads: int, d_model: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(context_length, d_model)
        self.blocks = nn.ModuleList(
            PreNormBlock(
                nn.LayerNorm(d_model),
                SelfAttention(d_model, num_heads, num_heads),
                nn.LayerNorm(d_model),
                FeedForward(d_model, 4 * d_model),
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.token_embedding(tokens) + self.position_embedding(positions), None

    def unembed(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.token_embedding.weight)


class PlainLlama(Decoder):
    """Llama 2 (arXiv 2307.09288): RMSNorm, SwiGLU, rotary positions, grouped queries, no biases."""

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        num_layers: int,
        num_heads: int,
        d_model: int,
        num_kv_heads: int,
        d_hidden: int,
        norm_eps: float,
        rotary_base: float,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(
            PreNormBlock(
                nn.RMSNorm(d_model, norm_eps),
                SelfAttention(d_model, num_heads, num_kv_heads, bias=False),
                nn.RMSNorm(d_model, norm_eps),
                SwiGLU(d_model, d_hidden),
            )
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(d_model, norm_eps)
        self.unembedding = nn.Linear(d_model, vocab_size, bias=False)
        frequencies = rotary_base ** -(torch.arange(0, 1, 2 * num_heads / d_model, dtype=torch.float64))
        angles = torch.outer(torch.arange(context_length, dtype=torch.float64), frequencies)  # [S, D / 2]
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def embed(
        self, tokens: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        return self.token_embedding(tokens), (self.cos[positions], self.sin[positions])

    def unembed(self, features: torch.Tensor) -> torch.Tensor:
        return self.unembedding(features)


class MaskedLanguageHead(nn.Module):
    def __init__(self, vocab_size: int, d_model: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model, eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, features: torch.Tensor, unembedding: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(F.gelu(self.linear(features))), unembedding, self.bias)


class PlainBERT(nn.Module):
    """BERT (arXiv 1810.04805) and its masked-language head, for texts of one segment."""

    def __init__(
        self, vocab_size: int, context_length: int, num_layers: int, num_heads: int, d_model: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(context_length, d_model)
        self.segment_embedding = nn.Embedding(2, d_model)
        self.embedding_norm = nn.LayerNorm(d_model, norm_eps)
        self.blocks = nn.Sequential(*(PostNormBlock(d_model, num_heads, norm_eps) for _ in range(num_layers)))
        self.masked_language_head = MaskedLanguageHead(vocab_size, d_model, norm_eps)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, S, V] of tokens [B, S]; given targets [B, S], the mean cross-entropy."""
        fixed = self.position_embedding.weight[: tokens.shape[1]] + self.segment_embedding.weight[0]  # [S, C]
        x = self.blocks(self.embedding_norm(self.token_embedding(tokens) + fixed))
        logits = self.masked_language_head(x, self.token_embedding.weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


Cache = Sequence[tuple[torch.Tensor, torch.Tensor]]  # keys and values [B, G, T, D] of each layer


class Generator:
    """Greedy generation with a cache of keys and values in room allotted once, anew in each call.

    Eagerly, a step attends to the part of the cache that is filled. A compiled step's shapes must not change: it
    attends to all of it, under a mask. A CUDA graph writes to the cache that it was recorded with: there all calls have
    one, allotted before them.

    Args:
        model: PlainGPT or PlainLlama.
        batch: B.
        room: T, the most positions.
        compile_options: those of torch.compile for the steps behind the prompt; None to run them eagerly.
    """

    def __init__(self, model: Decoder, batch: int, room: int, compile_options: dict[str, object] | None = None) -> None:
        self.model = model
        attention = model.blocks[0].attention
        self.shape = (batch, attention.num_kv_heads, room, attention.head_dim)
        self.places = torch.arange(room, device=model.token_embedding.weight.device)
        self.compiled, self.kept = None, None
        if compile_options is not None:
            self.compiled = torch.compile(self.masked_step, **compile_options)
            if compile_options.get("mode") == "reduce-overhead":
                self.kept = self.cache()
                for tensor in itertools.chain(*self.kept):
                    torch._dynamo.mark_static_address(tensor)

    def cache(self) -> Cache:
        """An empty one."""
        if self.kept is not None:
            return self.kept
        weight = self.model.token_embedding.weight
        # Zeros where a mask hides what is not filled: it must be finite.
        new = weight.new_empty if self.compiled is None else weight.new_zeros
        return [(new(self.shape), new(self.shape)) for _ in self.model.blocks]

    def logits(self, tokens: torch.Tensor, start: int, cache: Cache) -> torch.Tensor:
        """Of the last of tokens [B, S], which are at positions from ``start`` on: [B, V]. S is 1 behind others."""
        end = start + tokens.shape[1]
        if self.compiled is not None and start:
            return self.compiled(tokens, self.places[start:end], cache)
        filled = [(keys[:, :, :end], values[:, :, :end]) for keys, values in cache]
        features = self.model.features(tokens, self.places[start:end], filled)
        return self.model.unembed(features[:, -1])

    def masked_step(self, tokens: torch.Tensor, position: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits [B, V] of tokens [B, 1] at ``position`` [1]."""
        features = self.model.features(tokens, position, cache, self.places[None] <= position)
        return self.model.unembed(features[:, -1])

    @torch.no_grad()
    def generate(self, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """[B, S] -> [B, S + new_tokens], always the likeliest token."""
        cache = self.cache()
        tokens, pending = prompt, prompt
        for _ in range(new_tokens):
            pending = self.logits(pending, tokens.shape[1] - pending.shape[1], cache).argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, pending), dim=1)
        return tokens
