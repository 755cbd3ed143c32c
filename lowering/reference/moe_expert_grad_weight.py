"""Oracle of the expert weights' gradient: a sum of outer products, one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def moe_expert_grad_weight_reference(
    left: Tensor,
    right: Tensor,
    offsets_E1: Tensor,
    *,
    left_index_N: Tensor | None = None,
    right_index_N: Tensor | None = None,
) -> Tensor:
    """grad[e] = sum over the rows of expert e of outer(left[left_index[row]], right[right_index[row]]).

    left [*, L] and right [*, R] in one floating dtype, indices [N] int or None for the row itself. Returns [E, L, R].
    """
    num_experts = offsets_E1.numel() - 1
    grad_ELR = left.new_zeros(num_experts, left.shape[1], right.shape[1])
    bounds = offsets_E1.tolist()
    for expert in range(num_experts):
        for row in range(bounds[expert], bounds[expert + 1]):
            left_row = row if left_index_N is None else int(left_index_N[row])
            right_row = row if right_index_N is None else int(right_index_N[row])
            grad_ELR[expert] += torch.outer(left[left_row], right[right_row])
    return grad_ELR
