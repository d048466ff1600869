"""The position-wise feed-forward layer as a module."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from fastformer import functional as F
from fastformer.nn.fusion import LINEAR, is_plain
from fastformer.nn.linear import Linear
from fastformer.ops.feed_forward import ACTIVATIONS


class FeedForward(Module):
    """``linear2(dropout(hidden))`` with ``hidden = activation(linear1(x))``.

    Gated, ``hidden = activation(linear_gate(x)) * linear1(x)``: GeGLU with "gelu", SwiGLU with "silu" (Shazeer 2020).
    ``linear_gate`` has no bias. Parameter names are those of torch's ``TransformerEncoderLayer``.

    Args:
        d_model: width of input and output, [..., d_model].
        dim_feedforward: width of the hidden layer.
        activation: "gelu" (erf form), "gelu_tanh", "relu" or "silu".
        gated: multiply the activation of a second projection with the first.
        bias: whether ``linear1`` and ``linear2`` have biases.
        dropout: probability that a hidden value is dropped while training.

    Raises:
        ValueError: unknown ``activation``, or ``dropout`` outside [0, 1].
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, must be one of {', '.join(ACTIVATIONS)}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout is {dropout}, must be in [0, 1]")
        self.activation = activation
        self.dropout = dropout
        self.linear1 = Linear(d_model, dim_feedforward, bias=bias, device=device, dtype=dtype)
        self.linear2 = Linear(dim_feedforward, d_model, bias=bias, device=device, dtype=dtype)
        self.linear_gate = Linear(d_model, dim_feedforward, bias=False, device=device, dtype=dtype) if gated else None

    def forward(self, input: Tensor) -> Tensor:
        up, down, gate = self.linear1, self.linear2, self.linear_gate
        plain = is_plain(up, *LINEAR) and is_plain(down, *LINEAR) and (gate is None or is_plain(gate, *LINEAR))
        if not plain:  # replaced, or with hooks
            return self._call_submodules(input)
        return F.feed_forward(
            input,
            up.weight,
            up.bias,
            down.weight,
            down.bias,
            activation=self.activation,
            weight_gate=None if gate is None else gate.weight,
            dropout_p=self.dropout,
            training=self.training,
        )

    def _call_submodules(self, input: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        up = self.linear1(input)
        hidden = act(up) if self.linear_gate is None else act(self.linear_gate(input)) * up
        return self.linear2(F.dropout(hidden, self.dropout, self.training))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"
