"""Oracle of a router with its product: one token at a time, in the dtype it is given, rounded where the op rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import RoutingSpec
from .moe_route import moe_route_reference


def moe_route_linear_reference(
    hidden_TH: Tensor,
    weight_EH: Tensor,
    *,
    spec: RoutingSpec,
    linear_bias_E: Tensor | None = None,
    bias_E: Tensor | None = None,
    per_expert_scale_E: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`moe_route_reference` (weights [T, K], ids [T, K]) of weight @ x[t] + linear_bias, and those logits [T, E].

    hidden [T, H], weight [E, H], linear_bias [E] in one floating dtype; bias and scale [E] floating. The logits are
    rounded to `product_dtype`, by default not at all, and come back in the dtype of hidden.
    """
    logits_TE = hidden_TH.new_zeros(hidden_TH.shape[0], weight_EH.shape[0])
    for token, row_H in enumerate(hidden_TH):
        logits_TE[token] = torch.mv(weight_EH, row_H)
    if linear_bias_E is not None:
        logits_TE += linear_bias_E
    if product_dtype is not None:
        logits_TE = logits_TE.to(product_dtype).to(hidden_TH.dtype)
    options = {"bias_E": bias_E, "per_expert_scale_E": per_expert_scale_E, "dtype": hidden_TH.dtype}
    return *moe_route_reference(logits_TE, spec, **options), logits_TE  # type: ignore[arg-type]
