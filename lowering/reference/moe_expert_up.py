"""Oracle of the up stage: one row at a time, in the dtype it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import IDENTITY, evaluate, intermediate_size, split_gate


def moe_expert_up_reference(
    hidden_TH: Tensor,
    w13_EJH: Tensor,
    order_N: Tensor,
    offsets_E1: Tensor,
    *,
    top_k: int,
    b13_EJ: Tensor | None = None,
    act: str = IDENTITY,
    interleaved: bool = False,
) -> Tensor:
    """act_NI = act(w13[e] @ hidden[order[row] // top_k] + b13[e]) for each row of expert e, else zero.

    hidden [T, H], w13 [E, J, H], b13 [E, J] in one floating dtype, order [N] and offsets [E+1] int. Returns [N, I].
    """
    num_experts, width_J, _ = w13_EJH.shape
    out_NI = hidden_TH.new_zeros(order_N.numel(), intermediate_size(act, width_J))
    bounds = offsets_E1.tolist()
    for expert in range(num_experts):
        for row in range(bounds[expert], bounds[expert + 1]):
            pre_J = torch.mv(w13_EJH[expert], hidden_TH[int(order_N[row]) // top_k])
            if b13_EJ is not None:
                pre_J = pre_J + b13_EJ[expert]
            if act == IDENTITY:
                out_NI[row] = pre_J
            else:
                gate_1I, up_1I = split_gate(pre_J[None], act, interleaved=interleaved)
                out_NI[row] = evaluate(act, gate_1I, up_1I)[0]
    return out_NI
