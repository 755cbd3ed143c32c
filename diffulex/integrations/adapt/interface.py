"""Experts of transformers' interface that run their own loop, because they were told to or because their model does:
`experts_implementation="eager"`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..transformers import diffulex_experts_forward
from .form import Adapted, Candidate, bank, random_choice, random_hidden


class InterfaceExperts(Adapted):
    """Experts in the forms that transformers' decorator declares, read in place."""

    adapted_form = "transformers' interface"

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """hidden [T, H] floating, ids [T, K] int64 and weights [T, K] floating, to [T, H] in hidden's dtype."""
        hidden_TH, ids_TK, weights_TK = self.bound(args, kwargs)
        if not self.runs_ops(hidden_TH):
            return super().forward(*args, **kwargs)
        return diffulex_experts_forward(self, hidden_TH, ids_TK, weights_TK)


def runs_own_loop(module: nn.Module) -> bool | None:
    """Whether a module of transformers' interface runs its own loop; None for modules outside it.

    These attributes are set by the decorator that leads to the interface.
    """
    if not hasattr(module, "has_gate") or not hasattr(module, "is_transposed"):
        return None
    return getattr(getattr(module, "config", None), "_experts_implementation", None) == "eager"


def interface(module: nn.Module) -> Iterator[Candidate]:
    """The one guess for modules of the interface: the decorator has declared their form."""
    if not runs_own_loop(module):
        return
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up = bank(module, name)
    if up is None:
        return
    reads = (name, f"{name}_bias", "down_proj", "down_proj_bias", "post_expert_norm", "act_fn")
    yield Candidate(InterfaceExperts, functools.partial(_sample, name=name), reads=reads)


def _sample(module: Any, generator: torch.Generator, *, name: str) -> tuple[Tensor, ...]:
    up = getattr(module, name)
    ids_TK, weights_TK = random_choice(up, generator, num_experts=up.shape[0])
    hidden_TH = random_hidden(up, generator, ids_TK.shape[0], up.shape[1 if module.is_transposed else 2])
    return hidden_TH, ids_TK, weights_TK
