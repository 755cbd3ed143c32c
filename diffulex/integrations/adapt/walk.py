"""`adapt`: walks through a model, recognises modules of experts by their structure, and swaps those it can check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor, nn

from lowering.errors import Reason, ReasonCode

from .dense import dense
from .flat import flat
from .form import Adapted, Candidate, weights_reason
from .interface import interface, runs_own_loop
from .linears import linears
from .loop import loop
from .modalities import modalities
from .packed import packed
from .parallel import parallel
from .refused import refused
from .report import AdaptReport, LayerAdaptation
from .settled import settle_routers
from .split import split
from .stacked import StackedExperts
from .swap import try_swap, unswap

FORMS: tuple[Callable[[nn.Module], Iterator[Candidate | Reason]], ...] = (
    modalities,
    interface,
    packed,
    flat,
    dense,
    split,
    parallel,
    linears,
    loop,
)


def adapt(model: nn.Module, *, undo: bool = False) -> AdaptReport:
    """Swap the experts modules of a model, in place, for ones that call the ops on the modules' own parameters.

    Concerns experts that transformers' interface does not reach, those that run their own loop under the name "eager"
    among them, and blocks around experts that wait for the host. Each is recognised by its parameters, children and
    signature, and kept if it then returns on random inputs what it returned before, in the dtype of its weights, up
    to rounding, every expert and large values among them. A module that does something else in training, such as
    jitter or a loss of its own, runs its own code there, and the report says so. Parameters, their names and the state
    dict stay; where a model keeps a Linear for each expert, the weights of a layer move, once, into one tensor that
    they are views of. Works in eager mode, compiled, and in training; inside `diffulex.disabled()` the modules run
    their own code, as they do where experts were wrapped or hooked since, or moved apart.

    Adapt before compiling. Compiled code keeps reading the tensor of a layer's weights: after code that gives single
    parameters other tensors (`parameter.data = ...`; not optimizers, `load_state_dict` or `model.to`), compile again.
    The same holds for a `functional_call`, compiled without gradients, that replaces some of a layer's weights.
    Experts without tokens get zero gradients, where code that passes over them leaves none.

    undo: give modules adapted earlier their own classes back. The report's `undo()` does the same.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps
    if undo:
        unswap(model)
        return AdaptReport((), model)
    return AdaptReport(tuple(_Walk(model).below("", model)), model)


class _Walk:
    """One walk through a model. It remembers what held for a class of modules: it is tried first for the next one."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: set[nn.Module] = set()
        self._held: dict[type[nn.Module], Hashable] = {}
        self._owners = Counter(
            storage
            for part in model.modules()
            for tensor in (*part._parameters.values(), *part._buffers.values())
            if (storage := _storage(tensor))
        )

    def below(self, name: str, module: nn.Module) -> list[LayerAdaptation]:
        """What became of a module and, unless adapted, of those below it: all, or those adapted where it says why."""
        if module in self._seen:
            return []
        self._seen.add(module)
        layer = self._adapt_one(name, module)
        if layer is not None and (layer.adapted or _final(module)):
            return [layer]
        parts = [(f"{name}.{child}" if name else child, part) for child, part in module.named_children()]
        found = [found for part_name, part in parts for found in self.below(part_name, part)]
        if any(isinstance(part, Adapted) for _, part in parts):
            settle_routers(module)
        return found if layer is None else [layer, *(each for each in found if each.adapted)]

    def _adapt_one(self, name: str, module: nn.Module) -> LayerAdaptation | None:
        """What became of a module; None where there is no sign that it holds experts."""
        kind = type(module).__name__
        if isinstance(module, Adapted):
            module.prepare()
            if not module.adapted_form:  # a part of what another one needs
                return None
            return LayerAdaptation(name, kind, form=module.adapted_form, training=module.own_training)
        final = _final(module)
        if final is not None:
            return LayerAdaptation(name, kind, reason=final)
        scripted = isinstance(module, torch.jit.ScriptModule)  # has no class to swap
        guesses = [] if scripted else [guess for form in FORMS for guess in form(module)]
        if not guesses:
            return _unknown(name, module)
        reason = weights_reason(module)
        candidates = [guess for guess in guesses if isinstance(guess, Candidate)]
        reason = reason or self._fixed(module, candidates)
        training = None
        if reason is None and candidates:
            candidates.sort(key=lambda candidate: candidate.options != self._held.get(type(module)))
            reason, training = try_swap(module, candidates)
        if isinstance(module, Adapted):
            self._held[module.stock] = module.options
            return LayerAdaptation(name, kind, form=module.adapted_form, training=training)
        reason = reason or next(guess for guess in guesses if isinstance(guess, Reason))
        return LayerAdaptation(name, kind, reason=reason)

    def _fixed(self, module: nn.Module, candidates: list[Candidate]) -> Reason | None:
        """Why weights cannot move, where they would: others share them and would not see it, or PyTorch forbids it."""
        stacked = [candidate for candidate in candidates if issubclass(candidate.form, StackedExperts)]
        if not stacked:
            return None
        banks = module.get_submodule(stacked[0].options.at)
        for name, parameter in banks.named_parameters():
            if parameter.is_inference():
                return Reason(ReasonCode.STRUCTURE, f"{name} of its experts was made in inference mode and cannot move")
            if self._owners[_storage(parameter)] > 1:
                return Reason(ReasonCode.STRUCTURE, f"{name} of its experts shares memory with another tensor")
        return None


def _storage(tensor: Tensor | None) -> int:
    """Where a tensor's memory begins; 0 for what has none of its own."""
    if tensor is None or type(tensor) not in (nn.Parameter, Tensor) or tensor.device.type == "meta":
        return 0
    return tensor.untyped_storage().data_ptr()


def _final(module: nn.Module) -> Reason | None:
    """Why neither this module nor one below it is tried."""
    return refused(type(module).__name__) or _interface(module)


def _interface(module: nn.Module) -> Reason | None:
    """Whether the interface of transformers leads the module away from its own loop."""
    if runs_own_loop(module) is not False:
        return None
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return Reason(ReasonCode.INTERFACE, f"experts_implementation={chosen!r} of transformers' interface decides")


def _unknown(name: str, module: nn.Module) -> LayerAdaptation | None:
    """A module called `experts` in no known form."""
    if name.rpartition(".")[2] != "experts":
        return None
    detail = "its parameters and signature have no form that is known"
    return LayerAdaptation(name, type(module).__name__, reason=Reason(ReasonCode.STRUCTURE, detail))
