"""`adapt`: walks through a model, recognises modules of experts by their structure, and swaps those it can check."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from lowering.errors import Reason, ReasonCode

from .dense import dense
from .flat import flat
from .form import Adapted, Candidate, weights_reason
from .linears import linears
from .loop import loop
from .packed import packed
from .parallel import parallel
from .refused import refused
from .report import AdaptReport, LayerAdaptation
from .split import split
from .swap import try_swap, unswap

FORMS: tuple[Callable[[nn.Module], Iterator[Candidate]], ...] = (packed, flat, dense, split, parallel, linears, loop)


def adapt(model: nn.Module, *, undo: bool = False) -> AdaptReport:
    """Swap the experts modules of a model, in place, for ones that call the ops on the modules' own parameters.

    Concerns experts that transformers' interface does not reach. Each is recognised by its parameters, children and
    signature, and kept if it then returns on a random input what it returned before, in the dtype of its weights, up
    to rounding. Parameters, their names and the state dict stay; where a model keeps a Linear for each expert, the
    weights of a layer move, once, into one tensor that they are views of. Works in eager mode, compiled, and in
    training; inside `diffulex.disabled()` the modules run their own code.

    undo: give modules adapted earlier their own classes back. The report's `undo()` does the same.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps
    if undo:
        unswap(model)
        return AdaptReport((), model)
    layers: list[LayerAdaptation] = []
    done: list[str] = []
    for name, module in list(model.named_modules()):
        if any(name.startswith(f"{outer}." if outer else "") for outer in done):
            continue
        layer = _adapt_one(name, module)
        if layer is not None:
            layers.append(layer)
            done.append(name)
    return AdaptReport(tuple(layers), model)


def _adapt_one(name: str, module: nn.Module) -> LayerAdaptation | None:
    """What became of a module; None where there is no sign that it holds experts."""
    kind = type(module).__name__
    if isinstance(module, Adapted):
        return LayerAdaptation(name, kind, form=module.adapted_form)
    reason = refused(kind) or _interface(module)
    if reason is None:
        candidates = [candidate for form in FORMS for candidate in form(module)]
        if not candidates:
            return _unknown(name, module)
        reason = weights_reason(module)
        for candidate in candidates if reason is None else ():
            problem = try_swap(module, candidate)
            if problem is None:
                return LayerAdaptation(name, kind, form=candidate.form.adapted_form)
            reason = reason or problem
    return LayerAdaptation(name, kind, reason=reason)


def _interface(module: nn.Module) -> Reason | None:
    """Whether the module goes through transformers' experts interface, which sets these attributes."""
    if not hasattr(module, "has_gate") or not hasattr(module, "is_transposed"):
        return None
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return Reason(ReasonCode.INTERFACE, f"experts_implementation={chosen!r} of transformers' interface decides")


def _unknown(name: str, module: nn.Module) -> LayerAdaptation | None:
    """A module called `experts` in no known form."""
    if name.rpartition(".")[2] != "experts":
        return None
    detail = "its parameters and signature have no form that is known"
    return LayerAdaptation(name, type(module).__name__, reason=Reason(ReasonCode.STRUCTURE, detail))
