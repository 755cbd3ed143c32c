"""Oracle of the down stage with a shared expert: one row at a time, in the dtype it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from .moe_expert_down import moe_expert_down_reference


def moe_expert_down_shared_reference(
    act_NI: Tensor,
    w2_EHI: Tensor,
    order_N: Tensor,
    offsets_E1: Tensor,
    shared_TS: Tensor,
    shared_w2_DS: Tensor,
    *,
    b2_EH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`moe_expert_down_reference` [N, H], and w2 @ shared[t] [T, D] for each row of the shared expert.

    act [N, I], w2 [E, H, I], shared [T, S], shared_w2 [D, S] in one floating dtype, order [N] and offsets [E+1] int.
    """
    slots_NH = moe_expert_down_reference(act_NI, w2_EHI, order_N, offsets_E1, b2_EH=b2_EH)
    out_TD = act_NI.new_zeros(shared_TS.shape[0], shared_w2_DS.shape[0])
    for token, row_S in enumerate(shared_TS):
        out_TD[token] = torch.mv(shared_w2_DS, row_S)
    return slots_NH, out_TD
