"""Rows in expert order without reading offsets on the host: whose they are, and a `bmm` for fp64 on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor


def expert_of_rows(offsets_E1: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """(expert [N] int64 clamped to [0, E), valid [N] bool) of rows in expert order, from offsets [E+1] int32."""
    row_N = torch.arange(num_rows, device=offsets_E1.device, dtype=offsets_E1.dtype)
    expert_N = torch.searchsorted(offsets_E1[1:].contiguous(), row_N, right=True)
    num_experts = offsets_E1.shape[0] - 1
    return expert_N.clamp(max=num_experts - 1), expert_N < num_experts


def gathered_bmm(rows_NX: Tensor, weight_EYX: Tensor, bias_EY: Tensor | None, offsets_E1: Tensor) -> Tensor:
    """out[r] = weight[e] @ rows[r] + bias[e] for rows [N, X] sorted by expert; rows of no expert are zero.

    weight [E, Y, X], bias [E, Y] and the result [N, Y] in the dtype of rows. For fp64 on CUDA (gradcheck), where no
    generated kernel exists: a private weight per row, memory N*Y*X.
    """
    expert_N, valid_N = expert_of_rows(offsets_E1, rows_NX.shape[0])
    out_NY = torch.bmm(weight_EYX[expert_N], rows_NX.unsqueeze(2)).squeeze(2)
    if bias_EY is not None:
        out_NY = out_NY + bias_EY[expert_N]
    return torch.where(valid_N.unsqueeze(1), out_NY, 0.0)
