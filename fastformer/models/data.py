"""Text to train on, and batches of it for GPT and BERT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def sample_text() -> str:
    """The topics of Python's own help (about half a megabyte of English), in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path) -> str:
    """A UTF-8 text file.

    Raises:
        OSError: it can't be read.
        ValueError: it is not UTF-8 text, or is empty.
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file, or not UTF-8 (byte {error.start})") from error
    if "\0" in text:
        raise ValueError(f"{path}: not a text file (it has zero bytes)")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def split_text(text: str, held_out: float = 0.1) -> tuple[str, str]:
    """(training text, held-out text): the last ``held_out`` share is kept apart, cut at a line where possible."""
    cut = int(len(text) * (1 - held_out))
    cut = text.rfind("\n", cut // 2, cut) + 1 or cut
    return text[:cut], text[cut:]


def check_length(tokens: Tensor, context_length: int, name: str) -> None:
    """Raise ValueError unless tokens [N] hold one window of ``context_length`` tokens and their successors."""
    if len(tokens) <= context_length:
        raise ValueError(
            f"text is too short: its {name} part has {len(tokens)} tokens, must have more than context_length,"
            f" {context_length}"
        )


def random_batch(
    tokens: Tensor, batch_size: int, context_length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(inputs, targets), int64 [batch_size, context_length] each: random windows of tokens [N] and what follows."""
    starts = torch.randint(len(tokens) - context_length, (batch_size, 1), generator=generator)
    windows = tokens[starts + torch.arange(context_length + 1)]  # [B, S + 1]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def consecutive_batches(
    tokens: Tensor, batch_size: int, context_length: int, max_windows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets), at most batch_size rows of context_length: the first ``max_windows`` windows of tokens [N]."""
    count = min((len(tokens) - 1) // context_length, max_windows)
    inputs = tokens[: count * context_length].view(count, context_length)
    targets = tokens[1 : count * context_length + 1].view(count, context_length)
    yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)


def mask_tokens(
    tokens: Tensor, mask_token: int, vocab_size: int, generator: torch.Generator, *, special_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of BERT's masked-language task (arXiv 1810.04805, section 3.1), int64 [B, S] each.

    15% of the tokens of each row, one at least, are to be predicted: they are the targets, which are -100 elsewhere. In
    the inputs 80% of them are ``mask_token``, 10% a random token and 10% what they were.

    Args:
        tokens: int64 [B, S], none of them special.
        mask_token: stands for a hidden token.
        vocab_size: random tokens are below it.
        generator: of the CPU.
        special_tokens: how many tokens at the start of the vocabulary are special, and never a random token.
    """
    count = max(1, round(0.15 * tokens.shape[1]))
    order = torch.rand(tokens.shape, generator=generator).argsort(dim=1)
    chosen = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, order[:, :count], True)
    fate = torch.rand(tokens.shape, generator=generator)
    random_tokens = torch.randint(special_tokens, vocab_size, tokens.shape, generator=generator)
    inputs = tokens.masked_fill(chosen & (fate < 0.8), mask_token)
    inputs = torch.where(chosen & (fate >= 0.9), random_tokens, inputs)
    return inputs, tokens.masked_fill(~chosen, -100)
