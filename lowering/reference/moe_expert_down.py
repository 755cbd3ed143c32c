"""Oracle of the down stage: one row at a time, in the dtype it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def moe_expert_down_reference(
    act_NI: Tensor, w2_EHI: Tensor, order_N: Tensor, offsets_E1: Tensor, *, b2_EH: Tensor | None = None
) -> Tensor:
    """slots_NH[order[row]] = w2[e] @ act[row] + b2[e] for each row of expert e; slots of invalid ids are zero.

    act [N, I], w2 [E, H, I], b2 [E, H] in one floating dtype, order [N] and offsets [E+1] int. Returns [N, H].
    """
    num_experts, width_H, _ = w2_EHI.shape
    slots_NH = act_NI.new_zeros(act_NI.shape[0], width_H)
    bounds = offsets_E1.tolist()
    for expert in range(num_experts):
        for row in range(bounds[expert], bounds[expert + 1]):
            slot_H = torch.mv(w2_EHI[expert], act_NI[row])
            slots_NH[int(order_N[row])] = slot_H if b2_EH is None else slot_H + b2_EH[expert]
    return slots_NH
