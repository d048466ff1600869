"""Positional encodings as a module: sinusoidal, learned and rotary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fastformer import functional as F

KINDS = ("sinusoidal", "learned", "rotary")


class PositionalEncoding(Module):
    """Tells a transformer where each token stands, in one of three ways.

    - "sinusoidal" (Vaswani et al. 2017, arXiv 1706.03762, section 3.5) adds a fixed table to the token embeddings: row
      ``p`` has ``sin(p / base^(2i / d_model))`` at 2i and the cosine of the same at 2i + 1.
    - "learned" adds a trained table, the parameter ``weight`` [max_length, d_model], which starts as N(0, 0.02^2).
    - "rotary" (RoFormer, Su et al. 2021, arXiv 2104.09864) turns the pairs of features i of queries and keys by the
      angle ``p / base^(2i / d_model)``.

    The fixed tables are buffers that no state_dict holds. They are computed in float64 and kept in float32, or float64
    in a float64 module, whatever other dtype the module is cast to; ``to_empty`` fills them too, while ``weight`` is
    then filled by loading a checkpoint or by ``reset_parameters``.

    Args:
        d_model: width of the embeddings; of "rotary", how many features of each head are turned, usually all of them.
        max_length: number of positions.
        kind: "sinusoidal", "learned" or "rotary".
        dropout: probability that an element of the sum is dropped while training. Not of "rotary".
        batch_first: input is [B, S, d_model] if true, else [S, B, d_model], as in torch.nn. Not of "rotary".
        base: of the two fixed kinds.
        interleaved: of "rotary": pairs are features (2i, 2i + 1); else (i, i + d_model / 2).
        device, dtype: of the tables.

    Raises:
        ValueError: an unknown ``kind``, an option that the kind doesn't have, or a number out of its range.
    """

    def __init__(
        self,
        d_model: int,
        max_length: int,
        *,
        kind: str = "sinusoidal",
        dropout: float = 0.0,
        batch_first: bool = False,
        base: float = 10000.0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_options(d_model, max_length, kind, dropout, batch_first, base, interleaved)
        self.d_model = d_model
        self.max_length = max_length
        self.kind = kind
        self.dropout = dropout
        self.batch_first = batch_first
        self.base = base
        self.interleaved = interleaved
        if kind == "learned":
            self.weight = Parameter(torch.empty(max_length, d_model, device=device, dtype=dtype))
        else:
            like = torch.empty(0, device=device, dtype=dtype)
            for name, table in self._tables(like).items():
                self.register_buffer(name, table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``weight`` anew, if there is one."""
        if self.kind == "learned":
            torch.nn.init.normal_(self.weight, std=0.02)

    def forward(self, input: Tensor, key: Tensor | None = None, *, offset: int = 0) -> Tensor | tuple[Tensor, Tensor]:
        """The encoded input; of "rotary", ``input`` is the query, and the query and the key are returned, turned.

        Args:
            input: [B, S, d_model] with ``batch_first``, else [S, B, d_model]; unbatched [S, d_model]. Of "rotary":
                [B, H, S, D] with D >= d_model, whose features from d_model on pass through.
            key: of "rotary" alone, [B, G, S, D].
            offset: position of the first token, when the earlier ones are in a cache.

        Returns:
            Tensors of the shape and dtype of those that were given.

        Raises:
            TypeError: ``key`` is missing for "rotary", or given for another kind.
            ValueError: a tensor of the wrong shape, or positions outside [0, max_length).
        """
        if (key is None) == (self.kind == "rotary"):
            wanted = "a Tensor" if self.kind == "rotary" else "None"
            raise TypeError(f"key is {'None' if key is None else 'given'}, must be {wanted} for kind {self.kind!r}")
        if self.kind == "rotary":
            positions = self._positions(input, -2, offset)
            return F.rotary(input, key, self.cos[positions], self.sin[positions], interleaved=self.interleaved)
        if input.dim() not in (2, 3) or input.shape[-1] != self.d_model:
            raise ValueError(f"input has shape {tuple(input.shape)}, must be 3-D, or 2-D, and end in {self.d_model}")
        unbatched = input.dim() == 2
        positions = self._positions(input, 0 if unbatched or not self.batch_first else 1, offset)
        table = self.weight if self.kind == "learned" else self.table
        encoding = table[positions].to(input.dtype)  # [S, C]
        if not unbatched and not self.batch_first:
            encoding = encoding.unsqueeze(1)  # [S, 1, C]
        return F.dropout(input + encoding, self.dropout, self.training)

    def _positions(self, input: Tensor, length_dim: int, offset: int) -> slice:
        end = offset + input.shape[length_dim]
        if offset < 0 or end > self.max_length:
            raise ValueError(f"input has positions {offset} to {end - 1}, must be in [0, {self.max_length})")
        return slice(offset, end)

    def _tables(self, like: Tensor) -> dict[str, Tensor]:
        """The fixed tables, on the device of ``like``."""
        # On the CPU, which has float64, and whose values are then every device's.
        exponents = torch.arange(0, self.d_model, 2, dtype=torch.float64, device="cpu") / self.d_model
        positions = torch.arange(self.max_length, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, self.base**-exponents)  # [max_length, d_model / 2]
        if self.kind == "rotary":
            tables = {"cos": angles.cos(), "sin": angles.sin()}
        else:
            pairs = torch.stack((angles.sin(), angles.cos()), dim=-1)
            tables = {"table": pairs.flatten(1)[:, : self.d_model]}
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return {name: table.to(like.device, dtype).contiguous() for name, table in tables.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        """Behind ``to`` and its kind, which would round the fixed tables, and ``to_empty``, which would lose them."""
        super()._apply(fn, recurse)
        buffers = dict(self.named_buffers(recurse=False))
        if buffers:
            for name, table in self._tables(next(iter(buffers.values()))).items():
                setattr(self, name, table)
        return self

    def extra_repr(self) -> str:
        return f"{self.d_model}, {self.max_length}, kind={self.kind!r}, dropout={self.dropout}"


def _check_options(
    d_model: int, max_length: int, kind: str, dropout: float, batch_first: bool, base: float, interleaved: bool
) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, must be one of {', '.join(KINDS)}")
    if d_model < 1 or (kind == "rotary" and d_model % 2):
        raise ValueError(f"d_model is {d_model}, must be positive, and even for kind 'rotary'")
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}, must be positive")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout is {dropout}, must be in [0, 1]")
    if not base > 0.0:
        raise ValueError(f"base is {base}, must be positive")
    if kind == "rotary" and (dropout or batch_first):
        name, value = ("dropout", dropout) if dropout else ("batch_first", batch_first)
        raise ValueError(f"{name} is {value}, must be left at its default for kind 'rotary'")
    if kind != "rotary" and interleaved:
        raise ValueError(f"interleaved is {interleaved}, must be False for kind {kind!r}")
    if kind == "learned" and base != 10000.0:
        raise ValueError(f"base is {base}, must be left at its default for kind 'learned'")
