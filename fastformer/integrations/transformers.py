"""Hugging Face transformers: attention by the name ``attn_implementation="fastformer"``.

B batch, H query heads, G key and value heads, Sq and Sk lengths, D head_dim, Dv value width.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer.ops import attention_torch
from fastformer.ops.attention_torch import Options

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "fastformer"

#: Arguments that change what attention computes and that this one can't honour: what they ask for.
REFUSED = {
    "cache": "a paged cache",
    "indices": "keys selected by index",
    "block_indices": "blocks of keys selected by index",
    "sinks": "sinks that differ between queries",
}


def register() -> None:
    """Make ``attn_implementation="fastformer"`` and ``model.set_attn_implementation("fastformer")`` known.

    May be called again.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"transformers is not installed: pip install fastformer[transformers] ({error})") from error
    # Marks it for Dynamo, which takes a second to import: transformers has done that, and not every user of this file.
    torch.compiler.assume_constant_result(_passes_masks_on)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(*args: Any, config: PreTrainedConfig, **kwargs: Any) -> Tensor | None:
    """The mask that a model hands to its attention; arguments and result are those of transformers' own functions.

    Raises:
        ValueError: the model is one of those that compute attention themselves, and would misread the mask.
    """
    from transformers import masking_utils

    build = masking_utils.sdpa_mask if _passes_masks_on(type(config)) else masking_utils.eager_mask
    return build(*args, config=config, **kwargs)


def _passes_masks_on(config_class: type) -> bool:
    """Whether every model with such a config leaves its masks to the attention function that the config names.

    If not, or if there is no telling, they get the mask that transformers' own attention understands, as ours does.
    """
    from transformers import PreTrainedModel

    modeling = sys.modules.get(config_class.__module__.replace(".configuration_", ".modeling_"))
    models = [
        model
        for model in vars(modeling or object).values()
        if isinstance(model, type) and issubclass(model, PreTrainedModel) and model.config_class is config_class
    ]
    for model in models:
        if not model._can_set_attn_implementation():
            raise ValueError(
                f"attn_implementation is '{NAME}', must be 'eager': {model.__name__} has its own attention"
            )
    return bool(models) and all(model._supports_sdpa or model._supports_attention_backend for model in models)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' attention modules call.

    Args:
        module: the caller, whose ``is_causal`` (True if it has none) holds where the argument is None.
        query: [B, H, Sq, D]; key, value: [B, G, Sk, D] and [B, G, Sk, Dv].
        attention_mask: broadcasts to [B, H, Sq, Sk]: bool (True may attend) or floating point. It says all that there
            is to say about order, window and padding. None: no padding, and a single query sees every key, several
            are the first ones of the keys and causal or not; or with ``cu_seq_lens_q`` and its like, sequences packed
            one behind the other.
        position_bias: added to the scores, broadcasts to [B, H, Sq, Sk].
        sliding_window: query i sees no key further than this minus 1; read only where ``attention_mask`` is None.
        softcap: c > 0: scores become c tanh(scores / c).
        s_aux: [H], attention sinks.
        output_attentions: return the weights too, computed by the plain formula. A few models (GPT-2, OPT) keep this
            argument from their attention function; they return none, as with torch's own.
        kwargs: what else the model was called with; REFUSED names what may not be among it.

    Returns:
        output [B, Sq, H, Dv] and None, or the weights [B, H, Sq, Sk] after dropout. A query that may attend to nothing
        gives zeros.

    Raises:
        ValueError: an argument of REFUSED, or one that packed sequences don't take.
        TypeError, ValueError: as functional.scaled_dot_product_attention.
    """
    for name, meaning in REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} asks for {meaning}, which attn_implementation='{NAME}' doesn't have")
    seqlen_q, seqlen_k, hidden = query.shape[2], key.shape[2], 0
    window = None
    if attention_mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        starts = kwargs.get("cu_seq_lens_q")
        if starts is not None and starts.shape[0] > 2:
            if dropout > 0 or position_bias is not None or output_attentions:
                raise ValueError(
                    "cu_seq_lens_q holds several sequences, which take no dropout, position_bias and output_attentions"
                )
            features = {"scale": scaling, "is_causal": is_causal, "softcap": softcap, "sinks": s_aux}
            return _packed(query, key, value, kwargs, sliding_window, **features), None
        is_causal = seqlen_q > 1 and is_causal
        if is_causal and seqlen_k > seqlen_q:
            # An empty static cache: what lies behind the queries is no key yet.
            seqlen_k, hidden = seqlen_q, seqlen_k - seqlen_q
            key, value = key[:, :, :seqlen_k], value[:, :, :seqlen_k]
            position_bias = None if position_bias is None else position_bias[..., :seqlen_k]
        if sliding_window is not None and seqlen_k > sliding_window:
            window, is_causal = (sliding_window - 1, 0 if is_causal else sliding_window - 1), False
    else:
        is_causal = False
    mask = attention_mask if position_bias is None else attention_torch.masked(position_bias, attention_mask)
    if output_attentions:
        left, right = (None, None) if window is None else window
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        features = {"window_left": left, "window_right": right, "softcap": softcap, "sinks": s_aux}
        options = Options(scale, is_causal, window is not None, dropout_p=dropout, **features)
        weights = attention_torch.weigh(query, key, mask, options)[0].to(value.dtype)
        output = weights @ attention_torch.repeated(value, query)
        weights = F.pad(weights, (0, hidden))
    else:
        weights = None
        features = {"window": window, "softcap": softcap, "sinks": s_aux}
        alignment = "top_left" if window is None else "bottom_right"
        output = F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal, scaling, True, causal_alignment=alignment, **features
        )
    return output.transpose(1, 2).contiguous(), weights


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: dict[str, Any],
    sliding_window: int | None,
    is_causal: bool,
    **features: Any,
) -> Tensor:
    """[1, T, H, Dv] of sequences that lie one behind the other, by the lengths that transformers passes on."""
    starts = [lengths[name].to(torch.int32) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    longest = [int(lengths[name]) for name in ("max_length_q", "max_length_k")]
    side = -1 if sliding_window is None else sliding_window - 1
    rows = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    window = (side, 0 if is_causal else side)
    return F.varlen_attn(*rows, *starts, *longest, window_size=window, enable_gqa=True, **features).unsqueeze(0)
