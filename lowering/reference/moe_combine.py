"""Oracle of the combine stage."""

from __future__ import annotations

import torch
from torch import Tensor


def moe_combine_reference(
    slots_NH: Tensor, weights_TK: Tensor, *, ids_TK: Tensor | None = None, num_experts: int = 0
) -> Tensor:
    """out[t] = sum over k of weights[t, k] * slots[t * K + k], in slot order, in at least fp32.

    slots [T*K, H] and weights [T, K] floating; returns [T, H] in the dtype of slots. With ids [T, K] int, slots whose
    id is outside [0, `num_experts`) count as zeros.
    """
    num_tokens, top_k = weights_TK.shape
    wide = torch.promote_types(torch.promote_types(slots_NH.dtype, weights_TK.dtype), torch.float32)
    out_TH = torch.zeros(num_tokens, slots_NH.shape[1], dtype=wide, device=slots_NH.device)
    for token in range(num_tokens):
        for k in range(top_k):
            if ids_TK is not None and not 0 <= int(ids_TK[token, k]) < num_experts:
                continue
            out_TH[token] += weights_TK[token, k].to(wide) * slots_NH[token * top_k + k].to(wide)
    return out_TH.to(slots_NH.dtype)
