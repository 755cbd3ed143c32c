"""Experts one under the other in matrices `w1`, `v1`, `w2` [E*I, H], as DBRX has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowering import ops

from .form import Adapted, Candidate, activation_name, arguments, bank, random_choice, random_hidden


class FlatExperts(Adapted):
    """Experts one under the other: viewed as [E, I, H], with a product for the gate and one for the other half."""

    adapted_form = "flat weights"
    options: ClassVar[str]

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """hidden [B, S, H] floating, ids [B*S, K] int64, weights [B*S, K] floating, to [B, S, H] in hidden's dtype."""
        if not self.runs_ops(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        top_k_index, top_k_weights = (*args, *kwargs.values())
        glu, hidden_TH = self.mlp, hidden_states.reshape(-1, hidden_states.shape[-1])
        gate_EIH, up_EIH, down_EIH = (
            weight.view(self.num_experts, -1, hidden_TH.shape[1]) for weight in (glu.w1, glu.v1, glu.w2)
        )
        order_N, _, offsets_E1 = ops.moe_dispatch(top_k_index, self.num_experts)
        top_k, input_TH = top_k_index.shape[1], hidden_TH.to(gate_EIH.dtype)
        gate_NI = ops.moe_expert_up(input_TH, gate_EIH, None, order_N, offsets_E1, top_k)
        up_NI = ops.moe_expert_up(input_TH, up_EIH, None, order_N, offsets_E1, top_k)
        act_NI = getattr(glu, self.options)(gate_NI) * up_NI
        slots_NH = ops.moe_expert_down(act_NI, down_EIH.transpose(1, 2), None, order_N, offsets_E1)
        return ops.moe_combine(slots_NH, top_k_weights).to(hidden_states.dtype).view(hidden_states.shape)


def flat(module: nn.Module) -> Iterator[Candidate]:
    """Guesses for modules with `num_experts` whose child `mlp` holds the three matrices."""
    glu, count = getattr(module, "mlp", None), getattr(module, "num_experts", 0)
    if not isinstance(glu, nn.Module) or not isinstance(count, int) or len(arguments(module)) != 3:
        return
    found = [weight for name in ("w1", "v1", "w2") if (weight := bank(glu, name, rank=2)) is not None]
    act = activation_name(glu)
    if len(found) < 3 or act is None or count < 1 or any(weight.shape[0] % count for weight in found):
        return
    yield Candidate(FlatExperts, _sample, act)


def _sample(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    weight = module.mlp.w1
    ids_TK, weights_TK = random_choice(weight, generator, num_experts=module.num_experts)
    return random_hidden(weight, generator, 2, ids_TK.shape[0] // 2, weight.shape[1]), ids_TK, weights_TK
