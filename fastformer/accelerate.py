"""Swap the layers of a model that is already built, and put them back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fastformer import nn
from fastformer.integrations import transformers_config, transformers_layers
from fastformer.integrations.transformers_layers import ORIGINAL

#: torch's class -> ours.
FASTER: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    getattr(torch.nn, name): kind
    for name, kind in vars(nn).items()
    if isinstance(kind, type) and hasattr(torch.nn, name)
}

#: Why most modules stay.
UNKNOWN = "fastformer has no such layer"

#: A module's dotted name in the model, or a class: the modules so named or of that class, and all inside them.
Selector = str | type[torch.nn.Module]


@dataclass(frozen=True)
class Layer:
    """One module of the model, and what became of it."""

    name: str  # dotted, as in named_modules(); of a shared module, the first; "" is the model itself
    kind: str  # its class before
    reason: str  # why it was swapped or left


@dataclass
class Report:
    """What ``accelerate`` did, or with ``dry_run`` would do: ``print`` shows it."""

    dry_run: bool = False
    swapped: list[Layer] = field(default_factory=list)
    left: list[Layer] = field(default_factory=list)

    def __str__(self) -> str:
        verb = "would be swapped" if self.dry_run else "swapped"
        lines = [f"{len(self.swapped)} layers {verb}, {len(self.left)} left"]
        for title, layers in ((verb, self.swapped), ("left", self.left)):
            groups: dict[tuple[str, str], list[str]] = {}
            for layer in layers:
                groups.setdefault((layer.kind, layer.reason), []).append(layer.name or "(the model itself)")
            for (kind, reason), names in groups.items():
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                lines.append(f"  {title}: {len(names)} {kind} ({reason}): {shown}")
        return "\n".join(lines)


def accelerate(
    model: torch.nn.Module,
    only: Selector | Iterable[Selector] | None = None,
    skip: Selector | Iterable[Selector] | None = None,
    dry_run: bool = False,
) -> Report:
    """Make the layers of torch.nn and of Hugging Face transformers in ``model`` fastformer's, in place.

    Each layer stays the same object and becomes an instance of our subclass of its class. So its parameters, buffers,
    hooks, dtype, device, training flag and names stay as they are, whatever else refers to it still does, and the model
    itself may be a layer. No class and no function changes. ``restore`` puts everything back.

    Of transformers' layers those are known that fastformer.integrations.transformers_layers lists. Attention of the
    default implementation becomes ``attn_implementation="fastformer"`` in a copy of the config that is the model's own;
    a query that sees padding alone then gives zeros. A causal language model that is given labels in training computes
    its logits only when they are read from the output, which must be before the weights change.

    Args:
        model: any module.
        only: names or classes of modules; layers that are not one of these nor inside one are left. All if None.
        skip: likewise, of modules to leave.
        dry_run: report, and change nothing.

    Raises:
        TypeError: ``model`` is not a module, or a selector neither a name nor a module class.
        ValueError: a name that no module in the model has.
    """
    _check(model)
    names: dict[torch.nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, name)
    wanted = names.keys() if only is None else _select("only", only, model)
    unwanted = set() if skip is None else _select("skip", skip, model)
    report = Report(dry_run)
    swaps: dict[torch.nn.Module, _Plan] = {}
    for module, name in names.items():
        plan = _plan(module, model)
        if plan is None:
            continue
        reason = plan.reason
        if reason == UNKNOWN and model.get_submodule(name.rpartition(".")[0]) in swaps:
            reason = "part of a swapped layer"
        if not reason and module in unwanted:
            reason = "in skip"
        if not reason and module not in wanted:
            reason = "not in only"
        if reason:
            report.left.append(Layer(name, type(module).__name__, reason))
        else:
            report.swapped.append(Layer(name, type(module).__name__, plan.now))
            swaps[module] = plan
    if not dry_run:
        _swap(model, swaps)
    return report


def restore(model: torch.nn.Module) -> int:
    """Give every layer in ``model`` the class, and every config, that ``accelerate`` found there.

    Layers that were fastformer's from the start stay, and so does what was changed in a model's config since then.

    Args:
        model: any module.

    Returns:
        How many layers were given back.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check(model)
    restored = 0
    for module in model.modules():
        original = getattr(module, ORIGINAL, None)
        if original is not None and type(module) is _faster_class(original):  # not made something else since
            module.__dict__.pop(ORIGINAL, None)
            module.__dict__.pop("__module__", None)
            module.__class__ = original
            restored += 1
        if transformers_config.give_back(module) and transformers_config.is_attention(module):
            restored += 1
    return restored


def _faster_class(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return FASTER.get(original) or transformers_layers.faster_class(original)


def _check(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, must be a torch.nn.Module")


class _Plan(NamedTuple):
    """What is to become of a module."""

    reason: str = ""  # why it stays, if it does
    now: str = ""  # what the report says if it doesn't
    faster: type[torch.nn.Module] | None = None  # the class that it gets; None where it gets another config instead


def _plan(module: torch.nn.Module, model: torch.nn.Module) -> _Plan | None:
    """Of a module in ``model``; None for a container, or the user's own module: its layers are looked at one by one."""
    kind = type(module)
    if transformers_layers.is_transformers(kind):
        if kind.__name__ in transformers_layers.RECIPES:
            reason = transformers_layers.reason_to_leave(module)
            if reason:
                return _Plan(reason)
            return _Plan("", transformers_layers.RECIPES[kind.__name__].now, transformers_layers.faster_class(kind))
        if transformers_config.is_attention(module):
            reason = transformers_config.reason_to_leave(module, model)
            return _Plan(reason, f"now attn_implementation={transformers_config.NAME!r}")
        if kind.__name__ in transformers_layers.LEFT:
            return _Plan(transformers_layers.LEFT[kind.__name__])
    if kind in FASTER.values():
        return _Plan("is fastformer's already")
    if kind not in FASTER:
        base = next((base for base in FASTER if isinstance(module, base)), None)
        if base is not None and not kind.__module__.startswith("torch.nn.modules."):  # attention's out_proj
            return _Plan(f"a subclass of torch.nn.{base.__name__}")
        is_container = next(module.children(), None) is not None
        return None if is_container else _Plan(UNKNOWN)
    if "forward" in module.__dict__:
        return _Plan("its forward was replaced")
    weight = getattr(module, "weight", None)
    if weight is not None and type(weight) not in (torch.nn.Parameter, torch.Tensor):
        return _Plan(f"its weight is a {type(weight).__name__}")  # quantized, or distributed
    if kind is torch.nn.Linear and weight is not None and weight.device.type not in ("cpu", "meta"):
        return _Plan(f"fastformer has no such layer for {weight.device.type}")
    return _Plan("", f"now fastformer.nn.{kind.__name__}", FASTER[kind])


def _swap(model: torch.nn.Module, plans: dict[torch.nn.Module, _Plan]) -> None:
    for module, plan in plans.items():
        if plan.faster is not None:
            # By its __module__ torch.fx knows a layer of torch.nn, which it doesn't look into.
            module.__dict__ |= {ORIGINAL: type(module), "__module__": type(module).__module__}
            module.__class__ = plan.faster
    attention = [module for module, plan in plans.items() if plan.faster is None]
    if attention:
        transformers_config.switch(model, attention)


def _select(argument: str, selectors: Selector | Iterable[Selector], model: torch.nn.Module) -> set[torch.nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    selected: set[torch.nn.Module] = set()
    for selector in [selectors] if isinstance(selectors, str | type) else selectors:
        if isinstance(selector, str):
            if selector not in modules:
                raise ValueError(f"{argument} has {selector!r}, must be the name of a module in the model, or a class")
            roots = [modules[selector]]
        elif isinstance(selector, type) and issubclass(selector, torch.nn.Module):
            roots = [module for module in modules.values() if isinstance(module, selector)]
        else:
            raise TypeError(f"{argument} has {selector!r}, must be a module's name or a module class")
        for root in roots:
            selected.update(root.modules())
    return selected
