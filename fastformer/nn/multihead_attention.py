"""Multi-head attention as a module.

Shapes: B batch, L queries, S keys (with those that add_bias_kv and add_zero_attn append), E embed_dim, H heads,
D = E / H head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastformer import functional as F
from fastformer.nn import masks
from fastformer.nn.fusion import is_plain


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on fastformer's kernels (Vaswani et al. 2017, arXiv 1706.03762).

    It differs from torch's in three ways: a query that may attend to nothing has weights of zero, not NaN, and gives
    ``out_proj`` of zeros; ``out_proj``'s hooks run; masks are checked. Nested tensors
    are torch's own case.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights). ``need_weights=False`` is the fast way: the weights then never exist.

        Args:
            query: [B, L, E] with ``batch_first``, else [L, B, E]; unbatched [L, E].
            key, value: likewise with S and kdim, vdim.
            key_padding_mask: [B, S], unbatched [S]: bool (True is masked out) or floating point (added to the scores).
            need_weights: return the attention weights too, after dropout.
            attn_mask: [L, S] or [B * H, L, S], of the same two kinds.
            average_attn_weights: return the weights' mean over the heads.
            is_causal: says that ``attn_mask`` is the causal mask, which then need not be read.

        Returns:
            The output, shaped like query, and weights [B, L, S], [B, H, L, S] when not averaged, or None; unbatched
            without B.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or shape, or ``is_causal`` without ``attn_mask``.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return super().forward(query, key, value, *masks)
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        appended = (self.bias_k is not None) + bool(self.add_zero_attn)
        # The hint stands for the mask where it does in torch, and with padding, where torch merges the masks.
        if is_causal and not need_weights and (key_padding_mask is None or not appended):
            attn_mask = None
        else:
            is_causal = False
        mask = self._mask(attn_mask, key_padding_mask)
        if mask is not None and appended:
            mask = torch.nn.functional.pad(mask, (0, appended), value=mask.dtype == torch.bool)

        q, k, v = (self._split_heads(x) for x in self._project(query, key, value))  # [B, H, L or S, D]
        if self.bias_k is not None:
            k = torch.cat([k, self._split_heads(self.bias_k).to(k.dtype).expand(len(k), -1, -1, -1)], dim=2)
            v = torch.cat([v, self._split_heads(self.bias_v).to(v.dtype).expand(len(v), -1, -1, -1)], dim=2)
        if self.add_zero_attn:
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))

        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            # The query is scaled before the product, which could overflow in float16.
            scores = (q * (1 / math.sqrt(self.head_dim))) @ k.transpose(-2, -1)
            weights = F.softmax(scores, -1, mask=mask)
            weights = F.dropout(weights, dropout_p) if dropout_p > 0 else weights
            output = weights @ v
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)

        output = output.transpose(1, 2)  # [B, L, H, D]
        if query.dim() == 2:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        output = output.flatten(-2)
        if is_plain(self.out_proj, NonDynamicallyQuantizableLinear):
            output = F.linear(output, self.out_proj.weight, self.out_proj.bias)
        else:
            output = self.out_proj(output)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights.squeeze(0) if query.dim() == 2 else weights
        return output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The projected query, key and value, in one product for those that are the same tensor."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and key is value:
            if query is key:
                return F.linear(query, weight, bias).chunk(3, dim=-1)
            sizes = (self.embed_dim, 2 * self.embed_dim)
            q_weight, kv_weight = weight.split(sizes)
            q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
            return F.linear(query, q_weight, q_bias), *F.linear(key, kv_weight, kv_bias).chunk(2, dim=-1)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))

    def _split_heads(self, x: Tensor) -> Tensor:
        """A view [B, H, S, D] of [B, S, E], [S, B, E] or [S, E]."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Both masks in one that the functions take, [B or 1, H or 1, L or 1, S]: bool (True may attend) or added."""
        given = []
        if attn_mask is not None:  # [L, S] -> [1, 1, L, S], [B * H, L, S] -> [B, H, L, S]
            given.append(
                attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask[None, None]
            )
        if key_padding_mask is not None:  # [B, S] -> [B, 1, 1, S], [S] -> [1, 1, S]
            given.append(key_padding_mask[..., None, None, :])
        if not given:
            return None
        if all(mask.dtype == torch.bool for mask in given):
            return ~(given[0] if len(given) == 1 else given[0] | given[1])
        dtype = next(mask.dtype for mask in given if mask.dtype != torch.bool)
        given = [masks.additive(mask, dtype) for mask in given]
        return given[0] if len(given) == 1 else given[0] + given[1]

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}, must be 3-D, or 2-D without a batch, like the others"
                )
            if x.shape[-1] != width:
                raise ValueError(f"{name} has shape {tuple(x.shape)}, its last dimension must be {width}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"value has shape {tuple(value.shape)}, must be like key's, {tuple(key.shape)}")
        batch_dim, length_dim = (0, 1) if self.batch_first else (1, 0)
        batch, queries, keys = 1, query.shape[0], key.shape[0]
        if query.dim() == 3:
            batch, queries, keys = query.shape[batch_dim], query.shape[length_dim], key.shape[length_dim]
            if key.shape[batch_dim] != batch:
                raise ValueError(f"key has a batch of {key.shape[batch_dim]}, must be {batch} like query's")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is the causal mask, so attn_mask must be given")
        for name, mask, shapes in (
            ("attn_mask", attn_mask, ((queries, keys), (batch * self.num_heads, queries, keys))),
            ("key_padding_mask", key_padding_mask, ((batch, keys) if query.dim() == 3 else (keys,),)),
        ):
            if mask is None:
                continue
            if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
                raise TypeError(f"{name} has dtype {mask.dtype}, must be bool or floating point")
            if tuple(mask.shape) not in shapes:
                raise ValueError(f"{name} has shape {tuple(mask.shape)}, must be {' or '.join(map(str, shapes))}")
