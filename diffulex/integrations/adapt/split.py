"""Experts in two children `fc1` and `fc2` with weights [E, in, out], which route by themselves, as Aria has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .form import TOKENS, Adapted, Candidate, arguments, bank, random_hidden, run_experts


class SelfRoutedExperts(Adapted):
    """Experts that get logits and choose by their own `route_tokens_to_experts`."""

    adapted_form = "fc1 and fc2, transposed"
    bypassed = ("fc1", "fc2")

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """hidden [T, H] floating and logits [T, E] floating, to [T, H] in hidden's dtype."""
        hidden_states, router_logits = self.bound(args, kwargs)
        if not self.runs_ops(hidden_states):
            return super().forward(*args, **kwargs)
        ids_TK, weights_TK = self.route_tokens_to_experts(router_logits)
        return run_experts(
            hidden_states,
            ids_TK,
            weights_TK=weights_TK,
            w13_EJH=self.fc1.weight.transpose(1, 2),
            w2_EHI=self.fc2.weight.transpose(1, 2),
            gate=_silu_gate,
        )


def _silu_gate(pre_NJ: Tensor) -> Tensor:
    gate_NI, up_NI = pre_NJ.chunk(2, dim=-1)
    return nn.functional.silu(gate_NI) * up_NI


def split(module: nn.Module) -> Iterator[Candidate]:
    """Guesses for modules with `fc1`, `fc2` and `route_tokens_to_experts`, called with hidden states and logits."""
    children = (getattr(module, name, None) for name in ("fc1", "fc2"))
    found = [bank(child, "weight") for child in children if isinstance(child, nn.Module)]
    if len(found) < 2 or any(weight is None for weight in found) or len(arguments(module)) != 2:
        return
    if callable(getattr(module, "route_tokens_to_experts", None)):
        yield Candidate(SelfRoutedExperts, _sample, reads=("fc1.weight", "fc2.weight"))


def _sample(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    weight = module.fc1.weight
    logits_TE = random_hidden(weight, generator, TOKENS, weight.shape[0])
    return random_hidden(weight, generator, TOKENS, weight.shape[1]), logits_TE
