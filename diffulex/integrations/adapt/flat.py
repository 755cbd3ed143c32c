"""Experts one under the other in matrices `w1`, `v1`, `w2` [E*I, H], as DBRX has them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowering import ops

from .form import Adapted, Candidate, activation_name, arguments, bank, random_choice, random_hidden

_COUNTS = ("num_experts", "moe_num_experts")


@dataclasses.dataclass(frozen=True)
class FlatOptions:
    """act, count: names of the activation and of the number of experts; ids, weights: their places among arguments."""

    act: str
    count: str
    ids: int
    weights: int


class FlatExperts(Adapted):
    """Experts one under the other: viewed as [E, I, H], with a product for the gate and one for the other half."""

    adapted_form = "flat weights"
    bypassed = ("mlp",)
    options: ClassVar[FlatOptions]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """hidden [B, S, H] floating, ids [B*S, K] int64, weights [B*S, K] floating, to [B, S, H] in hidden's dtype."""
        values = self.bound(args, kwargs)
        hidden_states, top_k_index, top_k_weights = values[0], values[self.options.ids], values[self.options.weights]
        if not self.runs_ops(hidden_states):
            return super().forward(*args, **kwargs)
        num_experts = getattr(self, self.options.count)
        glu, hidden_TH = self.mlp, hidden_states.reshape(-1, hidden_states.shape[-1])
        gate_EIH, up_EIH, down_EIH = (
            weight.view(num_experts, -1, hidden_TH.shape[1]) for weight in (glu.w1, glu.v1, glu.w2)
        )
        order_N, _, offsets_E1 = ops.moe_dispatch(top_k_index, num_experts)
        top_k, input_TH = top_k_index.shape[1], hidden_TH.to(gate_EIH.dtype)
        gate_NI = ops.moe_expert_up(input_TH, gate_EIH, None, order_N, offsets_E1, top_k)
        up_NI = ops.moe_expert_up(input_TH, up_EIH, None, order_N, offsets_E1, top_k)
        act_NI = getattr(glu, self.options.act)(gate_NI) * up_NI
        slots_NH = ops.moe_expert_down(act_NI, down_EIH.transpose(1, 2), None, order_N, offsets_E1)
        return ops.moe_combine(slots_NH, top_k_weights).to(hidden_states.dtype).view(hidden_states.shape)


def flat(module: nn.Module) -> Iterator[Candidate]:
    """Guesses for modules with a number of experts whose child `mlp` holds the three matrices.

    Called with hidden states, ids and weights, or, as the model's own code does, with hidden states, the router's
    weights of all experts, which it does not read, weights and ids.
    """
    glu, names = getattr(module, "mlp", None), arguments(module)
    count = next((name for name in _COUNTS if isinstance(getattr(module, name, None), int)), None)
    if not isinstance(glu, nn.Module) or count is None or len(names) not in (3, 4):
        return
    found = [weight for name in ("w1", "v1", "w2") if (weight := bank(glu, name, rank=2)) is not None]
    act, num_experts = activation_name(glu), getattr(module, count)
    if len(found) < 3 or act is None or num_experts < 1 or any(weight.shape[0] % num_experts for weight in found):
        return
    options = FlatOptions(act, count, 1, 2) if len(names) == 3 else FlatOptions(act, count, 3, 2)
    reads = ("mlp.w1", "mlp.v1", "mlp.w2", f"mlp.{act}")
    yield Candidate(FlatExperts, functools.partial(_sample, options=options), options, reads)


def _sample(module: Any, generator: torch.Generator, *, options: FlatOptions) -> tuple[Tensor, ...]:
    weight, num_experts = module.mlp.w1, getattr(module, options.count)
    ids_TK, weights_TK = random_choice(weight, generator, num_experts=num_experts)
    hidden = random_hidden(weight, generator, 2, ids_TK.shape[0] // 2, weight.shape[1])
    if options.ids == 1:
        return hidden, ids_TK, weights_TK
    all_TE = weights_TK.new_zeros(ids_TK.shape[0], num_experts).scatter(1, ids_TK, weights_TK)
    return hidden, all_TE, weights_TK, ids_TK
