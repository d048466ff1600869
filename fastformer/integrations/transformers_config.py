"""Attention of a Hugging Face model through the config that its modules read: a copy of it that names fastformer's.

Configs are shared, by the modules of a model and by models, so a model gets its own copies. A module remembers the
config that it had, which gets what was changed in the copy when it is given back. Importing this file doesn't import
transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastformer.integrations.transformers import NAME, register
from fastformer.integrations.transformers_layers import is_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: The attribute of a module that holds its Originals.
ORIGINALS = "_fastformer_configs"

#: transformers' classes that call the attention function which their config names.
ATTENTION = {
    "BartAttention",
    "BertCrossAttention",
    "BertSelfAttention",
    "GPT2Attention",
    "RobertaCrossAttention",
    "RobertaSelfAttention",
    "T5Attention",
    "ViTAttention",
    *(f"{family}Attention" for family in ("Gemma", "Gemma2", "Gemma3", "GptOss")),
    *(f"{family}Attention" for family in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3")),
}


class Original(NamedTuple):
    """A config that a module held, and a copy of it as it was then."""

    config: PreTrainedConfig
    before: PreTrainedConfig


class Originals(dict[str, Original]):
    """By the names of a module's attributes. Unpickling it makes fastformer's attention known."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (dict(self),)


def _rebuild(originals: dict[str, Original]) -> Originals:
    register()
    return Originals(originals)


def is_attention(module: torch.nn.Module) -> bool:
    """Whether the module is of a class in ATTENTION."""
    kind = type(module)
    return kind.__name__ in ATTENTION and is_transformers(kind)


def reason_to_leave(module: torch.nn.Module, model: torch.nn.Module) -> str:
    """Why an attention module of ``model`` can't go through fastformer's, or the empty string."""
    implementation = module.config._attn_implementation
    if implementation == NAME:
        return "is fastformer's already"
    if module.config.output_attentions:
        return "its config asks for the attention weights"
    if implementation == "sdpa" or (implementation == "eager" and _lacks_sdpa(model, module.config)):
        return ""
    return f"its attn_implementation is {implementation!r}, not the default"


def _lacks_sdpa(model: torch.nn.Module, config: PreTrainedConfig) -> bool:
    """Whether a model with that config can't be "sdpa", for its softcap or its sinks, and so is "eager" by default."""
    return any(
        getattr(owner, "config", None) is config and not getattr(owner, "_supports_sdpa", True)
        for owner in model.modules()
    )


def switch(model: torch.nn.Module, selected: Iterable[torch.nn.Module]) -> None:
    """Give the ``selected`` attention modules of ``model`` configs of their own that name fastformer's attention.

    Where these are all attention modules with that config, every other module that holds it gets the same copy.
    """
    register()
    selected = set(selected)
    switched = {id(module.config) for module in selected}
    shared = {id(module.config) for module in model.modules() if is_attention(module) and module not in selected}
    whole = switched - shared
    # One memo for all copies, so that a config inside another stays the same object.
    copies: dict[int, Any] = {}
    snapshots: dict[int, Any] = {}
    for module in model.modules():
        for name, config in list(_configs(module)):
            is_switched = id(config) in switched and module in selected
            if is_switched or any(id(part) in whole for part in _parts(config)):
                original = Original(config, copy.deepcopy(config, snapshots))
                module.__dict__.setdefault(ORIGINALS, Originals()).setdefault(name, original)
                module.__dict__[name] = copy.deepcopy(config, copies)
    for module in selected:
        module.config._attn_implementation = {"": NAME}  # of this config, not of those inside it


def give_back(module: torch.nn.Module) -> bool:
    """Put the module's own configs back, with what was changed in their copies; whether it had others."""
    originals = module.__dict__.pop(ORIGINALS, {})
    for name, (config, before) in originals.items():
        _carry_over(module.__dict__[name], before, config)
        module.__dict__[name] = config
    return bool(originals)


def _carry_over(changed: PreTrainedConfig, before: PreTrainedConfig, original: PreTrainedConfig) -> None:
    """Set in ``original`` what is another in ``changed`` than it was ``before``, but for fastformer's attention."""
    parts = dict(_configs(original))
    for name, value in vars(changed).items():
        if name in parts and name in vars(before):
            _carry_over(value, vars(before)[name], parts[name])
        elif value != NAME and (name not in vars(before) or value != vars(before)[name]):
            vars(original)[name] = value


def _configs(holder: torch.nn.Module | PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """The attributes of a module, or of a config, that are configs."""
    from transformers import PreTrainedConfig

    return ((name, value) for name, value in vars(holder).items() if isinstance(value, PreTrainedConfig))


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The config and those inside it."""
    yield config
    for _, part in _configs(config):
        yield from _parts(part)
