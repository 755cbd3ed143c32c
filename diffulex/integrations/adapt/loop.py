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

from lowering.errors import Reason, ReasonCode

from .expert import expert_shape
from .form import Candidate, arguments, random_hidden, weights_reason
from .stacked import StackedExperts, StackedOptions, each_expert, list_of_experts

_GATES = ("gate", "router")
_TOP_K = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_k",
    "topk",
    "num_selected_experts",
    "n_activated_experts",
)
_SHARED = ("shared_experts", "shared_expert")
# what a block returns beside its output
_LOGITS, _LOGITS_BY_TOKEN, _CHOICE = "logits [B*S, E]", "logits [B, S, E]", "logits [B, S, E] and ids [B, S, K]"


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How a block routes and what it adds.

    gate, top_k  names of the router and of the number of experts a token has (`config.` before one of its config)
    score        `softmax` or `sigmoid` of a router that is a Linear; empty: the router returns ids and weights itself
    renorm       whether weights are divided by their sum
    flat         whether a router that returns both reads [T, H] rather than [B, S, H]
    scale, shared, shared_gate  names of a factor, of shared experts and of their gate, empty for none
    beside       what the block returns beside its output, empty for nothing
    """

    gate: str
    top_k: str = ""
    score: str = ""
    renorm: bool = False
    flat: bool = False
    scale: str = ""
    shared: str = ""
    shared_gate: str = ""
    beside: str = ""


class LoopBlock(StackedExperts):
    """A block that loops over its experts in Python."""

    adapted_form = "block with a loop over Linears"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """hidden [B, S, H] floating, to [B, S, H] of its dtype, and beside it what the options say."""
        hidden_states, *others = self.bound(args, kwargs)
        usual = list(self.parameters_of_forward.values())[1:]  # what the form was checked with
        given = any(other is not default for other, default in zip(others, usual, strict=True))
        if given or not self.runs_ops(hidden_states):
            return super().forward(*args, **kwargs)
        extra: LoopOptions = self.options.extra
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, ids_TK, weights_TK = self._routed(extra, hidden_states, hidden_TH)
        out = self.stacked(hidden_TH, ids_TK, weights_TK=weights_TK).view(hidden_states.shape)
        if extra.scale:
            out = out * getattr(self, extra.scale)
        if extra.shared:
            shared = getattr(self, extra.shared)(hidden_states)
            if extra.shared_gate:
                shared = getattr(self, extra.shared_gate)(hidden_states).sigmoid() * shared
            out = out + shared
        if not extra.beside:
            return out
        if extra.beside == _LOGITS:
            return out, logits
        by_token = logits.view(*hidden_states.shape[:-1], -1)
        return out, by_token if extra.beside == _LOGITS_BY_TOKEN else (by_token, ids_TK.view(*by_token.shape[:-1], -1))

    def _routed(self, extra: LoopOptions, hidden: Tensor, hidden_TH: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Logits, ids [T, K] and weights [T, K]."""
        gate = getattr(self, extra.gate)
        if not extra.score:
            return _chosen(gate(hidden_TH if extra.flat else hidden))
        logits = gate(hidden_TH)
        scores_TE = logits.softmax(1, dtype=torch.float32) if extra.score == "softmax" else logits.float().sigmoid()
        weights_TK, ids_TK = scores_TE.topk(_number(self, extra.top_k), dim=-1)
        if extra.renorm:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits, ids_TK, weights_TK.to(hidden.dtype)


def _number(module: Any, name: str) -> Any:
    if name.startswith("config."):
        return getattr(module.config, name[len("config.") :], None)
    return getattr(module, name, None)


def _chosen(outputs: Any) -> tuple[Any, Tensor, Tensor]:
    """Logits, ids [T, K] and weights [T, K] among what a router returns: its integers, and the floats of their shape.

    Logits are other floats than these with as many dimensions; None where there are none.
    """
    if not isinstance(outputs, tuple | list):
        raise TypeError(f"the router returns {type(outputs).__name__}, not ids and weights")
    tensors = [value for value in outputs if isinstance(value, Tensor)]
    ids = [value for value in tensors if not value.is_floating_point()]
    weights = [value for value in tensors if ids and value.is_floating_point() and value.shape == ids[0].shape]
    if not weights:
        raise TypeError("the router does not return ids and weights of one shape")
    others = [value for value in tensors if value is not weights[0] and value.is_floating_point() and value.dim() > 1]
    last = ids[0].shape[-1]
    return others[0] if others else None, ids[0].reshape(-1, last), weights[0].reshape(-1, last)


def loop(module: nn.Module) -> Iterator[Candidate | Reason]:
    """Guesses for blocks with a plain list `experts` and a router, called with hidden states alone."""
    experts: Any = getattr(module, "experts", None)
    if type(experts) not in (nn.ModuleList, nn.ModuleDict):
        return
    gate = next((name for name in _GATES if isinstance(getattr(module, name, None), nn.Module)), None)
    if gate is None or not arguments(module):
        yield Reason(ReasonCode.STRUCTURE, "it has a list of experts, and no `gate` or `router` that is a module")
        return
    shape = weights_reason(module) or expert_shape(list_of_experts(experts))
    if isinstance(shape, Reason):
        yield shape
        return
    guesses = list(_guesses(module, gate))
    if not guesses:
        yield Reason(ReasonCode.STRUCTURE, f"no number of experts for each token among {', '.join(_TOP_K)}")
    kind, sample = type(list_of_experts(experts)[0]), functools.partial(_sample, hidden=shape.hidden)
    for extra in guesses:
        options = StackedOptions("experts", kind, shape, extra)
        reads = tuple(name for name in ("experts", gate, extra.shared, extra.shared_gate) if name)
        probe = functools.partial(each_expert, options=options)
        yield Candidate(LoopBlock, sample, options, reads, probe=probe)


def _guesses(module: nn.Module, gate: str) -> Iterator[LoopOptions]:
    shared = next((name for name in _SHARED if isinstance(getattr(module, name, None), nn.Module)), "")
    shared_gate = f"{shared}_gate" if isinstance(getattr(module, f"{shared}_gate", None), nn.Module) else ""
    names = (*_TOP_K, *(f"config.{name}" for name in _TOP_K if hasattr(module, "config")))
    top_k = next((name for name in names if isinstance(_number(module, name), int)), "")
    scales = ("", "routed_scaling_factor") if hasattr(module, "routed_scaling_factor") else ("",)
    base = LoopOptions(gate, top_k, shared=shared, shared_gate=shared_gate)
    if not isinstance(getattr(module, gate), nn.Linear):
        besides = ("", _LOGITS, _LOGITS_BY_TOKEN, _CHOICE)
        for scale, beside, flat in itertools.product(scales, besides, (False, True)):
            yield dataclasses.replace(base, scale=scale, beside=beside, flat=flat)
    elif top_k:
        scores = itertools.product(("softmax", "sigmoid"), (True, False))
        for (score, renorm), scale, beside in itertools.product(scores, scales, (_LOGITS, "", _LOGITS_BY_TOKEN)):
            yield dataclasses.replace(base, score=score, renorm=renorm, scale=scale, beside=beside)


def _sample(module: Any, generator: torch.Generator, *, hidden: int) -> tuple[Tensor, ...]:
    return (random_hidden(next(module.experts.parameters()), generator, 2, 8, hidden),)
