"""Oracle of dispatch: each expert collects its slots in a list."""

from __future__ import annotations

import torch
from torch import Tensor


def moe_dispatch_reference(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the slots of ids [T, K] int by expert: order [N], token [N] and offsets [E+1], all int32, N = T*K.

    Rows offsets[e] to offsets[e+1] of `order` are the slots of expert e, ascending; token = order // K. Slots whose id
    is outside [0, E) follow at the end, ascending too, and offsets[E] is where they begin.
    """
    top_k = ids_TK.shape[1]
    slots_of: list[list[int]] = [[] for _ in range(num_experts)]
    tail: list[int] = []
    for slot, expert in enumerate(ids_TK.reshape(-1).tolist()):
        (slots_of[expert] if 0 <= expert < num_experts else tail).append(slot)
    order: list[int] = []
    offsets = [0]
    for slots in slots_of:
        order += slots
        offsets.append(len(order))
    order += tail
    token = [slot // top_k for slot in order]
    order_N, token_N, offsets_E1 = (torch.tensor(values, dtype=torch.int32) for values in (order, token, offsets))
    return order_N, token_N, offsets_E1
