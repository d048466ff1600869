"""BERT: an encoder-only transformer (Devlin et al. 2019, arXiv 1810.04805) on the fused operators.

Shapes: B batch, S positions, C width (d_model), V vocabulary, K classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer import nn
from fastformer.models import pretrained
from fastformer.models.base import Transformer, check_targets, padding_mask
from fastformer.models.checks import INTEGERS, check_tensor, check_tokens
from fastformer.models.config import ACTIVATIONS, BERTConfig
from fastformer.models.layers import Context, Stack, add_norm, make_norm
from fastformer.ops.feed_forward import ACTIVATIONS as FUNCTIONS


class MaskedLanguageHead(nn.Module):
    """``norm(activation(linear(x)))``, which the unembedding, with a bias of its own, turns into logits."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation][0]
        self.linear = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.norm = make_norm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, features: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.norm(FUNCTIONS[self.activation](self.linear(features)))


class BERT(Transformer):
    """Token, position and segment embeddings and their norm, blocks that see both sides, and heads.

    Every method takes the batch in the same way:

    - tokens: int64 [B, S].
    - segments: int64 [B, S], below ``num_segments``; None for zeros.
    - tokens_lengths or tokens_mask: where there is padding, int64 [B], how many tokens at the start of each row count,
      or bool [B, S], True where one does. Nothing attends to the others.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.segment_embedding = nn.Embedding(config.num_segments, config.d_model) if config.num_segments else None
        self.embedding_norm = make_norm(config)
        self.blocks = Stack(config, config.num_layers)
        self.norm = make_norm(config) if config.norm_first else None
        self.masked_language_head = MaskedLanguageHead(config) if config.masked_language_head else None
        self.pooler = nn.Linear(config.d_model, config.d_model) if config.pooler else None
        self.classifier = None if config.num_classes is None else nn.Linear(config.d_model, config.num_classes)
        self.next_sentence = nn.Linear(config.d_model, 2) if config.next_sentence_head else None
        self.initialise()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        tokens_lengths: Tensor | None = None,
        tokens_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the masked-language head [B, S, V]; given targets, the mean cross-entropy, logits never stored.

        Args:
            targets: int64 [B, S], what stood in place of each token; -100 counts for nothing.
            others: see the class.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or shape, or the model has no such head.
        """
        if self.masked_language_head is None:
            raise ValueError("masked_language_head is False, must be True to call the model")
        features = self.features(tokens, segments=segments, tokens_lengths=tokens_lengths, tokens_mask=tokens_mask)
        head = self.masked_language_head
        if targets is None:
            return F.linear(head(features), self.unembedding_weight, head.bias)
        check_targets(targets, tokens)
        return F.linear_cross_entropy(
            head(features).flatten(0, 1), self.unembedding_weight, targets.flatten(), linear_bias=head.bias
        )

    def features(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        tokens_lengths: Tensor | None = None,
        tokens_mask: Tensor | None = None,
    ) -> Tensor:
        """What the last block gives: [B, S, C]. See the class for the arguments."""
        check_tokens("tokens", tokens, self.config.context_length)
        mask = padding_mask("tokens", tokens, tokens_lengths, tokens_mask)
        positions = slice(0, tokens.shape[1])
        embedded = self.embed(tokens, positions, self._segments(tokens, segments))
        summed, _ = add_norm(*embedded, self.embedding_norm, 0.0)
        summed = F.dropout(summed, self.config.embedding_dropout, self.training)
        context = Context(is_causal=False, training=self.training, rotation=self.rotation(positions), mask=mask)
        return self.blocks(None, summed, self.norm, context)

    def pool(self, features: Tensor) -> Tensor:
        """``tanh(linear(x))`` of the first token: [B, S, C] -> [B, C].

        Raises:
            ValueError: the model has no pooler.
        """
        if self.pooler is None:
            raise ValueError("pooler is False, must be True to pool")
        return torch.tanh(self.pooler(features[:, 0]))

    def classify(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        tokens_lengths: Tensor | None = None,
        tokens_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the classification head [B, K]; given targets, int64 [B], their mean cross-entropy.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or shape, the model has no such head, or targets are
                given where there is only one class.
        """
        if self.classifier is None:
            raise ValueError("num_classes is None, must be given to classify")
        if targets is not None and self.config.num_classes == 1:
            raise ValueError("targets is given, must be None with num_classes 1: there is nothing to choose from")
        features = self.features(tokens, segments=segments, tokens_lengths=tokens_lengths, tokens_mask=tokens_mask)
        config = self.config
        dropout_p = config.dropout if config.classifier_dropout is None else config.classifier_dropout
        return _judge(self.classifier(F.dropout(self.pool(features), dropout_p, self.training)), targets)

    def classify_next_sentence(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        tokens_lengths: Tensor | None = None,
        tokens_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next-sentence head [B, 2]; given targets, int64 [B], their mean cross-entropy.

        The first logit says that the second segment follows the first in its text, the other that it doesn't.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or shape, or the model has no such head.
        """
        if self.next_sentence is None:
            raise ValueError("next_sentence_head is False, must be True to classify the next sentence")
        features = self.features(tokens, segments=segments, tokens_lengths=tokens_lengths, tokens_mask=tokens_mask)
        return _judge(self.next_sentence(self.pool(features)), targets)

    def _segments(self, tokens: Tensor, segments: Tensor | None) -> Tensor | None:
        """Their embeddings, [B, S, C] or what broadcasts to it."""
        if self.segment_embedding is None:
            if segments is not None:
                raise ValueError("segments is given, must be None with num_segments 0")
            return None
        if segments is None:
            return self.segment_embedding.weight[0].expand(*tokens.shape, -1)
        check_tensor("segments", segments, INTEGERS, tokens.shape, tokens.device)
        return self.segment_embedding(segments)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | None = None) -> BERT:
        """A BERT checkpoint in Hugging Face's layout, with the heads that it has; otherwise as GPT.from_pretrained."""
        return pretrained.load(cls, BERTConfig, Path(folder), dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors as Hugging Face has them.

        Raises:
            ValueError: the configuration has something that their BERT hasn't.
        """
        pretrained.save(self, Path(folder))


def _judge(logits: Tensor, targets: Tensor | None) -> Tensor:
    """Logits [B, K], or given targets, int64 [B], their mean cross-entropy."""
    if targets is None:
        return logits
    check_tensor("targets", targets, (torch.int64,), logits.shape[:1], logits.device)
    return F.cross_entropy(logits, targets)
