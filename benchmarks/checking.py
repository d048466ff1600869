"""Is the answer right? What every function of a case is judged by."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fastformer import accuracy

from .case import BACKWARD, FORWARD, MODES, TRAINING, Case, Function
from .timing import Call, Staged, describe, prepared

Name = TypeVar("Name", bound=Hashable)
# A peer further than this from the right answer, as a share of its largest value, computes something else.
PEER_TOLERANCE = 0.05


class Check:
    """The right answers to one case, and torch's, on inputs drawn for it."""

    def __init__(self, case: Case, modes: Collection[str] = MODES) -> None:
        """Of those ``modes`` that the case has.

        Raises:
            ValueError: an input is all zeros; kernels and hardware are faster on those than on what users have.
        """
        modes = [mode for mode in modes if mode in case.work]
        self.inputs = case.inputs()
        for name, x in self.inputs.items():
            if x.is_floating_point() and x.numel() and not x.any():
                raise ValueError(f"inputs: {name} is all zeros, must be drawn")
        leaves = [name for name, x in self.inputs.items() if x.requires_grad]
        standard = case.peers[case.judged_by]
        with torch.no_grad():
            outputs = as_tuple(standard(**self.inputs))
        # Of a loss: its gradient is 1, which some kernels take for granted.
        self.grad_outputs = [torch.randn_like(x) if x.dim() else torch.ones_like(x) for x in outputs]
        output_names = [f"output {i}" if i else "output" for i in range(len(outputs))]
        gradient_names = [f"gradient of {name}" for name in leaves]
        self.names = {
            FORWARD: output_names,
            BACKWARD: gradient_names,
            TRAINING: output_names + gradient_names,
        }
        given = self.inputs | {f"gradient of {name}": x for name, x in zip(output_names, self.grad_outputs)}
        self.given = Kept(given)
        self.torchs = {mode: self.caller(mode, standard)() for mode in modes}
        widest = FORWARD if modes == [FORWARD] else TRAINING
        doubles = [x.double() for x in self.grad_outputs]
        exact = caller(widest, case.reference, doubled(self.inputs), doubles)()
        self.exact = {FORWARD: exact[: len(outputs)], BACKWARD: exact[len(outputs) :], TRAINING: exact}

    def caller(self, mode: str, function: Function, *, copies: bool = False) -> Call:
        """The function on the inputs, see the function of this name; or on copies that are made, untimed, each time."""
        if not copies:
            return caller(mode, function, self.inputs, self.grad_outputs)

        def on_copies() -> Call:
            inputs = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in self.inputs.items()}
            return prepared(caller(mode, function, inputs, [x.clone() for x in self.grad_outputs]))

        return Staged(on_copies, lambda call: call())

    def verdict(self, mode: str, call: Call) -> tuple[str, float | None]:
        """Judges ours: (what is wrong with the answer or "", worst error as a share of the allowed one)."""
        answers, problem = self._answers(mode, call)
        worst = 0.0
        for name, ours, torchs, exact in zip(self.names[mode], answers, self.torchs[mode], self.exact[mode]):
            factor = accuracy.GRADIENT_FACTOR if name.startswith("gradient") else accuracy.FORWARD_FACTOR
            verdict = accuracy.judge(ours, torchs, exact, factor=factor)
            if not verdict.ok:
                return f"wrong {name}: {verdict.share:.3g}x the allowed error", verdict.share
            worst = max(worst, verdict.share)
        return problem, None if problem else worst

    def difference(self, mode: str, call: Call) -> str:
        """Makes sure that a peer computes the same thing: what is wrong with its answer or "".

        Torch's own answers may be further off than PEER_TOLERANCE: some of its gradients are sums in 16 bits.
        """
        answers, problem = self._answers(mode, call)
        for name, peer, torchs, exact in zip(self.names[mode], answers, self.torchs[mode], self.exact[mode]):
            if not exact.numel():
                continue
            allowed = torch.maximum(PEER_TOLERANCE * exact.abs().max(), (torchs - exact).abs().max())
            # Not `distance > allowed`: NaN must count as different.
            if not (peer - exact).abs().max() <= allowed:
                return f"computes something else: {name}"
        return problem

    def _answers(self, mode: str, call: Call) -> tuple[tuple[Tensor, ...], str]:
        """(what the call returned, ""), or ((), the problem). A call that can't run must not end the suite."""
        try:
            answers = call()
        except Exception as error:
            return (), describe(error)
        finally:
            overwritten = self.given.restore()
        if overwritten:
            return (), f"overwrites {', '.join(overwritten)}"
        shapes, expected = ([tuple(x.shape) for x in xs] for xs in (answers, self.torchs[mode]))
        return (answers, "") if shapes == expected else ((), f"wrong shapes {shapes}, not {expected}")


class Kept(Generic[Name]):
    """Tensors by name, and copies of the values that they have now."""

    def __init__(self, tensors: Mapping[Name, Tensor]) -> None:
        self.pairs = {name: (x, x.detach().clone()) for name, x in tensors.items()}

    @torch.no_grad()
    def restore(self) -> list[Name]:
        """The names of those that have other values now, which get the old ones back."""
        changed = [name for name, (x, copied) in self.pairs.items() if not torch.equal(x, copied)]
        for name in changed:
            x, copied = self.pairs[name]
            x.copy_(copied)
        return changed


def caller(mode: str, function: Function, inputs: dict[str, Tensor], grad_outputs: list[Tensor]) -> Call:
    """What a mode calls: forward gives the outputs, backward the gradients, training the outputs and the gradients."""
    leaves = [x for x in inputs.values() if x.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        return as_tuple(function(**inputs))

    def backward(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # A CUDA graph goes on reading what the forward pass has saved.
        retain = outputs[0].is_cuda and torch.cuda.is_current_stream_capturing()
        return torch.autograd.grad(outputs, leaves, grad_outputs, retain_graph=retain)

    def training() -> tuple[Tensor, ...]:
        outputs = forward()
        return outputs + backward(outputs)

    return {FORWARD: torch.no_grad()(forward), BACKWARD: Staged(forward, backward), TRAINING: training}[mode]


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A function's outputs, however many."""
    return result if isinstance(result, tuple) else (result,)


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float64, those that are not integers; which require gradients stays as it is."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs.items()
    }
