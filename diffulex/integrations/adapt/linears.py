"""Lists and dicts of expert modules with a forward of their own, called with ids or a mask (Switch Transformers)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .form import Candidate, arguments, random_choice, random_hidden
from .stacked import StackedExperts, stacked_options


class MaskedExperts(StackedExperts):
    """Experts called with a one-hot mask, whose empty rows are tokens that no expert reads."""

    adapted_form = "Linears, called with a mask"

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """hidden [T, H] floating, mask [T, K, E] int64, weights [T, K] floating, to [T, H] in hidden's dtype."""
        if not self.runs_ops(hidden_states) or not self.plain():
            return super().forward(hidden_states, *args, **kwargs)
        selected_experts, routing_weights = (*args, *kwargs.values())
        none = selected_experts.shape[2]
        ids_TK = torch.where(selected_experts.amax(2) > 0, selected_experts.argmax(2), none)
        return self.stacked(hidden_states, ids_TK, weights_TK=routing_weights)


class ListedExperts(StackedExperts):
    """Experts called with the numbers of a token's experts."""

    adapted_form = "Linears, called with ids"

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """hidden [T, H] floating, ids [T, K] int64, weights [T, K] floating, to [T, H] in hidden's dtype."""
        if not self.runs_ops(hidden_states) or not self.plain():
            return super().forward(hidden_states, *args, **kwargs)
        top_k_index, top_k_weights = (*args, *kwargs.values())
        return self.stacked(hidden_states, top_k_index, weights_TK=top_k_weights)


def linears(module: nn.Module) -> Iterator[Candidate]:
    """Guesses for lists and dicts of experts that are called with hidden states and two more tensors."""
    if type(module) in (nn.ModuleList, nn.ModuleDict) or not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return
    options = stacked_options(list(module.children()), "")
    if options is None or len(arguments(module)) != 3:
        return
    yield Candidate(ListedExperts, _listed, options)
    yield Candidate(MaskedExperts, _masked, options)


def _listed(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    weight = next(module.parameters())
    ids_TK, weights_TK = random_choice(weight, generator, num_experts=len(list(module.children())))
    width_H = next(child for child in module.modules() if isinstance(child, nn.Linear)).in_features
    return random_hidden(weight, generator, ids_TK.shape[0], width_H), ids_TK, weights_TK


def _masked(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    hidden_TH, ids_TK, weights_TK = _listed(module, generator)
    mask_T1E = nn.functional.one_hot(ids_TK[:, :1], len(list(module.children())))
    mask_T1E[-1] = 0
    return hidden_TH, mask_T1E, weights_TK[:, :1].contiguous()
