"""Swapping one module: its class is replaced, what it returns compared with what it was, and put back if they differ.

Compared on random inputs of usual size and of a size at which clamps and caps show, on a crowd of equal tokens, some of
which a fixed capacity of experts would drop, and in training its gradients too.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowering.errors import Reason, ReasonCode
from lowering.state import is_enabled

from .compare import FOREIGN, difference, told
from .effects import Effects, quiet
from .form import PREFIX, Adapted, Candidate, adapted_class, form_of, watched

_LARGE = 64.0  # what hidden states are multiplied by, so that activations meet their clamps
_CROWD = 272  # tokens; more than the capacities that code gives an expert, and few enough to be computed in no time
_EQUAL = f"{_CROWD} equal tokens"
_ROUNDING_OF_GRADIENTS = 8.0  # gradients of routers are differences of nearly equal numbers
_WATCHED = "hooks wait for calls of modules in it that its form does without"


def unswap(module: nn.Module) -> None:
    """Give each adapted module in and below this one its own class back."""
    for part in module.modules():
        if isinstance(part, Adapted):
            part.restore()
            vars(part).pop("own_training", None)
            part.__class__ = part.stock


def try_swap(module: nn.Module, candidates: Iterable[Candidate]) -> tuple[Reason | None, Reason | None]:
    """Give the module the first form that computes on random inputs what it does now; otherwise leave it as it was.

    Returns why it was left, and, for a module that was swapped, why it runs its own code in training.
    """
    if not is_enabled():
        return Reason(ReasonCode.DISABLED, "and without the ops there is nothing to compare"), None
    reason: Reason | None = None
    adapted, prepared = False, None
    try:
        for candidate in candidates:
            problem, training = _try(module, candidate)
            if problem is None:
                adapted = True
                return None, training
            if reason is None or _EQUAL in problem.detail:  # a guess that holds for few tokens says most
                reason = problem
            if prepared is None and any(name.startswith(PREFIX) for name in module._buffers):
                prepared = candidate
    finally:
        if not adapted:
            if prepared is not None:  # it stayed for the next guess, and ends here
                _swap(module, prepared)
            unswap(module)
    assert reason is not None
    return reason, None


def _try(module: nn.Module, candidate: Candidate) -> tuple[Reason | None, Reason | None]:
    reason = _unread(module, candidate) or _check(module, candidate)
    if reason is not None:
        _to_stock(module)
        return reason, None
    training = _check_training(module, candidate)
    if training is not None:
        _inference_only(module, training)
    return None, training


def _swap(module: nn.Module, candidate: Candidate) -> None:
    """Give the module, and the children that go with it, the classes of a form."""
    _to_stock(module)
    for name, form in (*candidate.children, ("", candidate.form)):
        part: Any = module.get_submodule(name)
        part.__class__ = adapted_class(form, type(part), options=candidate.options)
        part.prepare()


def _to_stock(module: nn.Module) -> dict[Any, type[Adapted]]:
    """Give the adapted modules their own classes back, but keep what was prepared. Returns the classes they had."""
    kinds: dict[Any, type[Adapted]] = {part: type(part) for part in module.modules() if isinstance(part, Adapted)}
    for part, kind in kinds.items():
        part.__class__ = kind.stock
    return kinds


def _inference_only(module: nn.Module, reason: Reason) -> None:
    """Let the adapted modules in and below this one run their own code in training."""
    for part in module.modules():
        if isinstance(part, Adapted):
            kind = type(part)
            part.__class__ = adapted_class(form_of(kind), kind.stock, options=kind.options, trains=False)
            part.own_training = reason


def _unread(module: nn.Module, candidate: Candidate) -> Reason | None:
    """Tensors that the form would not read: they may be zero or one today, and something else tomorrow."""
    for name, _ in itertools.chain(module.named_parameters(), module.named_buffers()):
        if not name.startswith(PREFIX) and not any(
            name == read or name.startswith(f"{read}.") for read in candidate.reads
        ):
            return Reason(ReasonCode.STRUCTURE, f"it holds {name}, which its form does not have")
    return None


def _check(module: nn.Module, candidate: Candidate) -> Reason | None:
    """Why the module, swapped by this function, does not compute what it did, in eval mode."""
    if any(watched(module.get_submodule(name)) for name in candidate.form.bypassed):
        return Reason(ReasonCode.STRUCTURE, _WATCHED)
    with quiet(module, training=False):
        try:
            cases = [_inputs(module, candidate, factor) for factor in (1.0, _LARGE)]
            with Effects(module) as own:
                wanted = [candidate.run(module, inputs) for inputs in cases]
            one_by_one = candidate.probe(module, torch.Generator().manual_seed(2)) if candidate.probe else None
        except FOREIGN as error:
            return Reason(ReasonCode.UNVERIFIED, f"its own forward fails on a random input: {told(error)}")
        _swap(module, candidate)
        try:
            with Effects(module) as ours:
                got = [candidate.run(module, inputs) for inputs in cases]
                problem = difference(got[0], wanted[0])
                if problem is None and _finite(wanted[1]):
                    problem = difference(got[1], wanted[1])
                many = candidate.run(module, _crowd(module, candidate)) if problem is None else None
            if problem is None and candidate.probe is not None:
                problem = difference(candidate.probe(module, torch.Generator().manual_seed(2)), one_by_one)
        except FOREIGN as error:
            return Reason(ReasonCode.UNLIKE, f"the ops fail on a random input: {told(error)}")
        return problem or _missing(own, ours) or _check_crowd(module, candidate, many)


def _check_crowd(module: nn.Module, candidate: Candidate, ours: Any) -> Reason | None:
    """Why the swapped module, which computes what it did for a few tokens, does not for many with the same experts."""
    try:
        with _stock(module), Effects(module):
            wanted = candidate.run(module, _crowd(module, candidate))
    except FOREIGN as error:
        return Reason(ReasonCode.UNVERIFIED, f"its own forward fails on {_EQUAL}: {told(error)}")
    return _in_crowd(difference(ours, wanted))


def _in_crowd(problem: Reason | None) -> Reason | None:
    if problem is None:
        return None
    return Reason(problem.code, f"with {_EQUAL}, some of which a fixed capacity drops: {problem.detail}")


def _crowd(module: nn.Module, candidate: Candidate) -> tuple[Tensor, ...]:
    """A sample with `_CROWD` tokens, each the first one of those in it.

    What there is one number of for each token, such as its kind, is repeated: code may need every one of them.
    """
    inputs = _inputs(module, candidate, 1.0)
    sizes = inputs[0].shape[:-1]
    crowd = (*sizes[:-1], _CROWD // sizes[:-1].numel())

    def many(value: Tensor) -> Tensor:
        if value.shape == sizes:
            return value.repeat(*(1 for _ in sizes[:-1]), -(-crowd[-1] // sizes[-1]))[..., : crowd[-1]]
        if value.shape[: len(sizes)] == sizes:
            return value[(0,) * len(sizes)].expand(*crowd, *value.shape[len(sizes) :]).clone()
        return value[0].expand(_CROWD, *value.shape[1:]).clone()  # of tokens in one row, where hidden has [B, S]

    return tuple(many(value) for value in inputs)


def _missing(own: Effects, ours: Effects) -> Reason | None:
    left = sorted(own.changed - ours.changed)
    return Reason(ReasonCode.STRUCTURE, f"its forward sets {left[0]}, which others may read") if left else None


def _check_training(module: nn.Module, candidate: Candidate) -> Reason | None:
    """Why the swapped module does not compute in training what its own code does there."""
    with quiet(module, training=True):
        try:
            with _stock(module), Effects(module) as own:
                wanted, wanted_grads, wanted_many, extra = _trained(module, candidate)
        except FOREIGN as error:
            return Reason(ReasonCode.UNVERIFIED, f"its own code fails on a random input: {told(error)}")
    with quiet(module, training=True):
        try:
            with Effects(module) as ours:
                got, grads, many, _ = _trained(module, candidate)
        except FOREIGN as error:
            return Reason(ReasonCode.UNLIKE, f"the ops fail on a random input: {told(error)}")
    if extra:
        return Reason(ReasonCode.UNLIKE, "its own code adds to gradients, as auxiliary losses do")
    problem = difference((got, grads), (wanted, wanted_grads), slack=_ROUNDING_OF_GRADIENTS)
    return problem or _in_crowd(difference(many, wanted_many)) or _missing(own, ours)


@contextlib.contextmanager
def _stock(module: nn.Module) -> Iterator[None]:
    """The own classes of the adapted modules in and below this one, for a while."""
    kinds = _to_stock(module)
    try:
        yield
    finally:
        for part, kind in kinds.items():
            part.__class__ = kind


def _trained(module: nn.Module, candidate: Candidate) -> tuple[Any, list[Tensor], Any, bool]:
    """Outputs, the gradients of what is given to the module, the outputs for a crowd, and whether there are gradients
    where outputs have none.
    """
    with torch.enable_grad():
        inputs = tuple(
            value.requires_grad_() if value.is_floating_point() else value for value in _inputs(module, candidate, 1.0)
        )
        outputs = candidate.run(module, inputs)
        found = [out for out in pytree.tree_leaves(outputs) if isinstance(out, Tensor) and out.requires_grad]
        leaves = [value for value in inputs if value.is_floating_point()]
        if not found:
            raise RuntimeError("its output does not depend on its input")
        at = [torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out.dtype) for out in found]
        zeros = [torch.zeros_like(out) for out in found]
        nothing = torch.autograd.grad(found, leaves, zeros, retain_graph=True, allow_unused=True)
        grads = torch.autograd.grad(found, leaves, at, allow_unused=True)
    extra = any(grad is not None and bool(grad.any()) for grad in nothing)
    detached = pytree.tree_map_only(Tensor, Tensor.detach, outputs)
    many = candidate.run(module, _crowd(module, candidate))
    return detached, [grad for grad in grads if grad is not None and bool(grad.any())], many, extra


def _inputs(module: nn.Module, candidate: Candidate, factor: float) -> tuple[Tensor, ...]:
    hidden, *others = candidate.sample(module, torch.Generator().manual_seed(0))
    return hidden * factor, *others


def _finite(values: Any) -> bool:
    tensors = [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
    return all(bool(value.isfinite().all()) for value in tensors if value.is_floating_point())
