"""Swap the layers of a model that is already built."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from fastformer import nn

#: torch's class -> ours.
FASTER: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.MultiheadAttention: nn.MultiheadAttention,
    torch.nn.RMSNorm: nn.RMSNorm,
    torch.nn.Softmax: nn.Softmax,
    torch.nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
}

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
    """Make torch.nn's layers in ``model`` fastformer's, in place.

    Each layer stays the same object and becomes an instance of our subclass of its class. So its parameters, buffers,
    hooks, dtype, device, training flag and names stay as they are, whatever else refers to it still does, and the model
    itself may be a layer. No class and no function changes.

    Args:
        model: any module.
        only: names or classes of modules; layers that are not one of these nor inside one are left. All if None.
        skip: likewise, of modules to leave.
        dry_run: report, and change nothing.

    Raises:
        TypeError: ``model`` is not a module, or a selector neither a name nor a module class.
        ValueError: a name that no module in the model has.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, must be a torch.nn.Module")
    names: dict[torch.nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, name)
    wanted = names.keys() if only is None else _select("only", only, model)
    unwanted = set() if skip is None else _select("skip", skip, model)
    report = Report(dry_run)
    for module, name in names.items():
        kind = type(module)
        faster = FASTER.get(kind)
        if faster is None and next(module.children(), None) is not None and not isinstance(module, tuple(FASTER)):
            continue  # a container, or the user's own module: its layers are looked at one by one
        reason = _reason_to_leave(module)
        if not reason and module in unwanted:
            reason = "in skip"
        if not reason and module not in wanted:
            reason = "not in only"
        if reason or faster is None:
            report.left.append(Layer(name, kind.__name__, reason))
            continue
        report.swapped.append(Layer(name, kind.__name__, f"now fastformer.nn.{faster.__name__}"))
        if not dry_run:
            module.__class__ = faster
    return report


def _reason_to_leave(module: torch.nn.Module) -> str:
    """Why this layer can't become ours, or the empty string."""
    kind = type(module)
    if kind in FASTER.values():
        return "is fastformer's already"
    if kind not in FASTER:
        base = next((base for base in FASTER if isinstance(module, base)), None)
        return "fastformer has no such layer" if base is None else f"a subclass of torch.nn.{base.__name__}"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    return ""


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
