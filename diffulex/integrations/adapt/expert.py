"""How one expert computes that is a module of Linears: which of them come first, and what lies between."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowering.errors import Reason, ReasonCode

from .compare import FOREIGN, difference, told
from .effects import quiet
from .form import activation_name, random_hidden, watched

# for experts whose forward names a function
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.silu": functional.silu,
    "F.gelu": functional.gelu,
    "F.gelu, tanh": lambda pre: functional.gelu(pre, approximate="tanh"),
    "F.relu": functional.relu,
    "F.relu, squared": lambda pre: functional.relu(pre).square(),
}
_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class ExpertShape:
    """ups, down: names of the Linears; act, dropout: what is between; hidden: H.

    order: where the gate is in what the first Linears make, `gate, up` or `up, gate`; empty without a gate.
    """

    ups: tuple[str, ...]
    down: str
    order: str
    act: str
    hidden: int
    dropout: str = ""

    def gated(self, expert: Any, pre_NJ: Tensor) -> Tensor:
        """Rows [N, J] floating of the first products, to [N, I]: the activation and dropout are the expert's own."""
        act = _FUNCTIONS[self.act] if self.act in _FUNCTIONS else getattr(expert, self.act)
        if self.order:
            first_NI, second_NI = pre_NJ.chunk(2, dim=-1)
            act_NI = act(first_NI) * second_NI if self.order == "gate, up" else act(second_NI) * first_NI
        else:
            act_NI = act(pre_NJ)
        return getattr(expert, self.dropout)(act_NI) if self.dropout else act_NI

    def run(self, expert: Any, hidden_TH: Tensor) -> Tensor:
        """hidden [T, H] floating through the expert, to [T, H]."""
        pre_TJ = torch.cat([getattr(expert, name)(hidden_TH) for name in self.ups], dim=-1)
        return getattr(expert, self.down)(self.gated(expert, pre_TJ))


def expert_shape(experts: list[Any]) -> ExpertShape | Reason:
    """How a layer's experts compute, if all are made alike of two or three Linears and an activation."""
    unlike = _unlike(experts)
    if unlike is not None:
        return Reason(ReasonCode.STRUCTURE, unlike)
    first = experts[0]
    guesses = list(_guesses(first))
    if not guesses:
        return Reason(ReasonCode.STRUCTURE, "the sizes of its experts' Linears do not fit an expert")
    reason: Reason | None = None
    for hidden in dict.fromkeys(guess.hidden for guess in guesses):  # more than one where sizes do not tell the order
        found = _fitting(first, [guess for guess in guesses if guess.hidden == hidden])
        if isinstance(found, ExpertShape):
            return found
        reason = reason or found
    assert reason is not None
    return reason


def _fitting(expert: Any, guesses: list[ExpertShape]) -> ExpertShape | Reason:
    """The guess, of those with one size of hidden states, that computes what the expert does."""
    rows = random_hidden(next(expert.parameters()), torch.Generator().manual_seed(1), _TOKENS, guesses[0].hidden)
    with quiet(expert, training=False):
        try:
            wanted = expert(rows)
        except FOREIGN as error:
            return Reason(ReasonCode.UNVERIFIED, f"an expert fails on random hidden states: {told(error)}")
        problems = {guess: difference(guess.run(expert, rows), wanted) for guess in guesses}
    found = next((guess for guess, problem in problems.items() if problem is None), None)
    if found is not None:
        return _with_dropout(expert, found, rows)
    problem = next(iter(problems.values()))
    assert problem is not None
    return Reason(problem.code, f"an expert is not known products and activations: {problem.detail}")


def _with_dropout(expert: Any, guess: ExpertShape, hidden_TH: Tensor) -> ExpertShape:
    """The guess, with the dropout that shows behind the activation in training."""
    dropouts = [name for name, child in expert.named_children() if isinstance(child, nn.Dropout)]
    with quiet(expert, training=True):
        try:
            wanted = expert(hidden_TH) if dropouts else None
        except FOREIGN:
            return guess
        for name in dropouts:
            tried = dataclasses.replace(guess, dropout=name)
            if difference(tried.run(expert, hidden_TH), wanted) is None:
                return tried
    return guess


def _unlike(experts: list[Any]) -> str | None:
    """What keeps a list from being one of experts alike."""
    if not experts or any(expert is None for expert in experts):
        return "its list of experts is empty or has gaps, as where other ranks hold the rest"
    if len({id(expert) for expert in experts}) < len(experts):
        return "one expert is in its list more than once"
    kinds = {type(expert) for expert in experts}
    if len(kinds) > 1:
        return f"its experts are of different classes: {', '.join(sorted(kind.__name__ for kind in kinds))}"
    if any(watched(part) for expert in experts for part in expert.modules()):
        return "hooks wait for calls of its experts or of modules in them"
    for expert in experts:
        for name, child in expert.named_children():
            if _weights(child) and type(child) is not nn.Linear:
                return f"{name} of its experts is a {type(child).__name__}, not a plain Linear"
        if any(True for _ in itertools.chain(expert.parameters(recurse=False), expert.buffers(recurse=False))):
            return "its experts hold tensors beside their Linears"
    names = _linears(experts[0])
    if len(names) not in (2, 3):
        return f"its experts have {len(names)} Linears"
    facts = {tuple(_facts(getattr(expert, name, None)) for name in names) for expert in experts}
    return None if len(facts) == 1 else "its experts differ in size, dtype, device or bias"


def _weights(module: nn.Module) -> bool:
    return any(True for _ in itertools.chain(module.parameters(), module.buffers()))


def _linears(expert: nn.Module) -> list[str]:
    return [name for name, child in expert.named_children() if type(child) is nn.Linear]


def _facts(linear: Any) -> tuple[Any, ...]:
    if type(linear) is not nn.Linear:
        return ()
    return tuple(linear.weight.shape), linear.weight.dtype, linear.weight.device, linear.bias is not None


def _guesses(expert: Any) -> Iterator[ExpertShape]:
    """Every way in which the sizes of the Linears fit, the expert's own activation first."""
    own = activation_name(expert)
    acts = ([own] if own else []) + list(_FUNCTIONS)
    for order_of_names in itertools.permutations(_linears(expert)):
        *ups, down = order_of_names
        firsts, last = [getattr(expert, name) for name in ups], getattr(expert, down)
        hidden, width = last.out_features, last.in_features
        sizes = [linear.out_features for linear in firsts]
        biased = {linear.bias is not None for linear in firsts}
        if any(linear.in_features != hidden for linear in firsts) or len(biased) > 1:
            continue
        orders = {(width,): ("",), (2 * width,): ("gate, up", "up, gate"), (width, width): ("gate, up",)}
        for order, act in itertools.product(orders.get(tuple(sizes), ()), acts):
            yield ExpertShape(tuple(ups), down, order, act, hidden)
