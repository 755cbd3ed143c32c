"""Oracle of the up stage with a shared expert: one row at a time, in the dtype it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import evaluate
from .moe_expert_up import moe_expert_up_reference


def moe_expert_up_shared_reference(
    hidden_TH: Tensor,
    w13_EJH: Tensor,
    order_N: Tensor,
    offsets_E1: Tensor,
    shared_hidden_TD: Tensor,
    shared_w1_SD: Tensor,
    shared_w3_SD: Tensor | None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """`moe_expert_up_reference` [N, I], and act(w1 @ x[t], w3 @ x[t]) [T, S] for each row of the shared expert.

    hidden [T, H], w13 [E, J, H], shared_hidden [T, D], w1 and w3 [S, D] in one floating dtype, order [N] and offsets
    [E+1] int; options: top_k, act, b13_EJ, interleaved.
    """
    act_NI = moe_expert_up_reference(hidden_TH, w13_EJH, order_N, offsets_E1, **options)  # type: ignore[arg-type]
    shared_TS = hidden_TH.new_zeros(shared_hidden_TD.shape[0], shared_w1_SD.shape[0])
    for token, row_D in enumerate(shared_hidden_TD):
        gate_S = torch.mv(shared_w1_SD, row_D)
        up_S = gate_S if shared_w3_SD is None else torch.mv(shared_w3_SD, row_D)
        shared_TS[token] = evaluate(str(options["act"]), gate_S[None], up_S[None])[0]
    return act_NI, shared_TS
