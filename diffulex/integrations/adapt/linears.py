"""Lists and dicts of expert modules with a forward of their own, called with ids (NLLB) or a mask (Switch)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowering.errors import Reason

from .expert import expert_shape
from .form import Candidate, arguments, random_choice, random_hidden, weights_reason
from .stacked import StackedExperts, StackedOptions, each_expert, list_of_experts


class MaskedExperts(StackedExperts):
    """Experts called with a one-hot mask, whose empty rows are tokens that no expert reads."""

    adapted_form = "Linears, called with a mask"

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """hidden [T, H] floating, mask [T, K, E] int64, weights [T, K] floating, to [T, H] in hidden's dtype."""
        hidden_states, selected_experts, routing_weights = self.bound(args, kwargs)
        if not self.runs_ops(hidden_states):
            return super().forward(*args, **kwargs)
        none = selected_experts.shape[2]
        ids_TK = torch.where(selected_experts.amax(2) > 0, selected_experts.argmax(2), none)
        return self.stacked(hidden_states, ids_TK, weights_TK=routing_weights)


class ListedExperts(StackedExperts):
    """Experts called with the numbers of a token's experts. Dropout of whole tokens is a factor in eval mode (NLLB)."""

    adapted_form = "Linears, called with ids"

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """hidden [T, H] floating, ids [T, K] int64, weights [T, K] floating, to [T, H] in hidden's dtype."""
        hidden_states, top_k_index, top_k_weights = self.bound(args, kwargs)
        if not self.runs_ops(hidden_states):
            return super().forward(*args, **kwargs)
        if not self.training:
            top_k_weights = top_k_weights * (1 - getattr(self, "moe_token_dropout", 0))
        return self.stacked(hidden_states, top_k_index, weights_TK=top_k_weights)


def linears(module: nn.Module) -> Iterator[Candidate | Reason]:
    """Guesses for lists and dicts of experts that are called with hidden states and two more tensors."""
    if type(module) in (nn.ModuleList, nn.ModuleDict) or not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return
    if len(arguments(module)) != 3:
        return
    shape = weights_reason(module) or expert_shape(list_of_experts(module))
    if isinstance(shape, Reason):
        yield shape
        return
    options = StackedOptions("", type(list_of_experts(module)[0]), shape)
    reads, probe = tuple(name for name, _ in module.named_children()), functools.partial(each_expert, options=options)
    for form, sample in ((ListedExperts, _listed), (MaskedExperts, _masked)):
        sampled = functools.partial(sample, hidden=shape.hidden)
        yield Candidate(form, sampled, options, reads, probe=probe)


def _listed(module: Any, generator: torch.Generator, *, hidden: int) -> tuple[Tensor, ...]:
    weight = next(module.parameters())
    ids_TK, weights_TK = random_choice(weight, generator, num_experts=len(list_of_experts(module)))
    return random_hidden(weight, generator, ids_TK.shape[0], hidden), ids_TK, weights_TK


def _masked(module: Any, generator: torch.Generator, *, hidden: int) -> tuple[Tensor, ...]:
    hidden_TH, ids_TK, weights_TK = _listed(module, generator, hidden=hidden)
    mask_T1E = nn.functional.one_hot(ids_TK[:, :1], len(list_of_experts(module)))
    mask_T1E[-1] = 0
    return hidden_TH, mask_T1E, weights_TK[:, :1].contiguous()
