"""Blocks with a plain list of experts and a loop over it in their forward, as models with code of their own have them.

What the router does is guessed, and a guess counts if the block then returns what it returned.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .form import Candidate, arguments, random_hidden
from .stacked import StackedExperts, stacked_options

_GATES = ("gate", "router")
_TOP_K = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k")
_SHARED = ("shared_experts", "shared_expert")


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How a block routes and what it adds.

    gate, top_k  names of the router and of the number of experts a token has
    renorm       whether weights are divided by their sum (None: the router returns ids and weights itself)
    flat         whether a router that returns both reads [T, H] rather than [B, S, H]
    scale, shared, shared_gate  names of a factor, of shared experts and of their gate, empty for none
    pair         whether the block returns the router's logits as well
    """

    gate: str
    top_k: str = ""
    renorm: bool | None = None
    flat: bool = False
    scale: str = ""
    shared: str = ""
    shared_gate: str = ""
    pair: bool = False


class LoopBlock(StackedExperts):
    """A block that loops over its experts in Python."""

    adapted_form = "block with a loop over Linears"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden [B, S, H] floating, to [B, S, H] of its dtype; beside it logits [B*S, E] where the block has any."""
        if not self.runs_ops(hidden_states) or args or kwargs or not self.plain():
            return super().forward(hidden_states, *args, **kwargs)
        extra: LoopOptions = self.options.extra
        hidden_TH = hidden_states.view(-1, hidden_states.shape[-1])
        gate = getattr(self, extra.gate)
        if extra.renorm is None:
            logits: Any = None
            ids_TK, weights_TK = _chosen(gate(hidden_TH if extra.flat else hidden_states))
        else:
            logits = gate(hidden_TH)
            weights_TK, ids_TK = logits.softmax(1, dtype=torch.float32).topk(getattr(self, extra.top_k), dim=-1)
            if extra.renorm:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            weights_TK = weights_TK.to(hidden_states.dtype)
        out = self.stacked(hidden_TH, ids_TK, weights_TK=weights_TK).view(hidden_states.shape)
        if extra.scale:
            out = out * getattr(self, extra.scale)
        if extra.shared:
            shared = getattr(self, extra.shared)(hidden_states)
            if extra.shared_gate:
                shared = getattr(self, extra.shared_gate)(hidden_states).sigmoid() * shared
            out = out + shared
        return (out, logits) if extra.pair else out


def _chosen(outputs: Any) -> tuple[Tensor, Tensor]:
    """ids [T, K] and weights [T, K] among what a router returns: its integers, and the floats of their shape."""
    tensors = [value for value in outputs if isinstance(value, Tensor)]
    ids = next(value for value in tensors if not value.is_floating_point())
    weights = next(value for value in tensors if value.is_floating_point() and value.shape == ids.shape)
    return ids.view(-1, ids.shape[-1]), weights.view(-1, ids.shape[-1])


def loop(module: nn.Module) -> Iterator[Candidate]:
    """Guesses for blocks with a plain list `experts` and a router, called with hidden states alone."""
    experts: Any = getattr(module, "experts", None)
    gate = next((name for name in _GATES if isinstance(getattr(module, name, None), nn.Module)), None)
    if type(experts) not in (nn.ModuleList, nn.ModuleDict) or gate is None or not arguments(module):
        return
    if stacked_options(list(experts.children()), "experts") is None:
        return
    for extra in _guesses(module, gate):
        options = stacked_options(list(experts.children()), "experts", extra=extra)
        yield Candidate(LoopBlock, functools.partial(_sample, gate=gate), options)


def _guesses(module: nn.Module, gate: str) -> Iterator[LoopOptions]:
    shared = next((name for name in _SHARED if isinstance(getattr(module, name, None), nn.Module)), "")
    shared_gate = f"{shared}_gate" if isinstance(getattr(module, f"{shared}_gate", None), nn.Module) else ""
    top_k = next((name for name in _TOP_K if isinstance(getattr(module, name, None), int)), "")
    scales = ("", "routed_scaling_factor") if hasattr(module, "routed_scaling_factor") else ("",)
    base = LoopOptions(gate, top_k, shared=shared, shared_gate=shared_gate)
    if not isinstance(getattr(module, gate), nn.Linear):
        for scale, flat in itertools.product(scales, (False, True)):
            yield dataclasses.replace(base, scale=scale, flat=flat)
    elif top_k:
        for scale, renorm, pair in itertools.product(scales, (True, False), (True, False)):
            yield dataclasses.replace(base, scale=scale, renorm=renorm, pair=pair)


def _sample(module: Any, generator: torch.Generator, *, gate: str) -> tuple[Tensor, ...]:
    expert = next(module.experts.children())
    weight = next(child for child in expert.modules() if isinstance(child, nn.Linear)).weight
    return (random_hidden(weight, generator, 2, 8, weight.shape[1]),)
