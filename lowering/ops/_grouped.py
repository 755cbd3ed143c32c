"""Grouped GEMM on the host's terms: one `mm` per expert that has rows (CPU), gathered `bmm` for fp64 on CUDA."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from ..state import is_batch_invariant
from ._rows import rows_alone


def grouped_mm_cpu(rows_NX: Tensor, weight_EYX: Tensor, bias_EY: Tensor | None, bounds: list[int]) -> Tensor:
    """out[r] = weight[e] @ rows[r] + bias[e] for rows [N, X] sorted by expert; rows past bounds[E] are zero.

    weight [E, Y, X] of any strides and bias [E, Y] in the dtype of rows. Returns [N, Y].
    """
    out_NY = rows_NX.new_empty(rows_NX.shape[0], weight_EYX.shape[1])
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        weight_XY, bias_Y = weight_EYX[expert].t(), None if bias_EY is None else bias_EY[expert]
        if is_batch_invariant():
            out_NY[start:end] = rows_alone(functools.partial(_product, weight_XY, bias_Y), rows_NX[start:end])
        else:
            _product(weight_XY, bias_Y, rows_NX[start:end], out=out_NY[start:end])
    out_NY[bounds[-1] :].zero_()
    return out_NY


def _product(weight_XY: Tensor, bias_Y: Tensor | None, rows_NX: Tensor, out: Tensor | None = None) -> Tensor:
    if bias_Y is None:
        return torch.mm(rows_NX, weight_XY, out=out)
    return torch.addmm(bias_Y, rows_NX, weight_XY, out=out)


def expert_of_rows(offsets_E1: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """(expert [N] int64 clamped to [0, E), valid [N] bool) of rows in expert order, from offsets [E+1] int32."""
    row_N = torch.arange(num_rows, device=offsets_E1.device, dtype=offsets_E1.dtype)
    expert_N = torch.searchsorted(offsets_E1[1:].contiguous(), row_N, right=True)
    num_experts = offsets_E1.shape[0] - 1
    return expert_N.clamp(max=num_experts - 1), expert_N < num_experts


def gathered_bmm(rows_NX: Tensor, weight_EYX: Tensor, bias_EY: Tensor | None, offsets_E1: Tensor) -> Tensor:
    """The same as `grouped_mm_cpu` without reading offsets on the host: a private weight per row [N, Y, X], any dtype.

    For fp64 on CUDA (gradcheck), where no generated kernel exists. Memory N*Y*X.
    """
    expert_N, valid_N = expert_of_rows(offsets_E1, rows_NX.shape[0])
    out_NY = torch.bmm(weight_EYX[expert_N], rows_NX.unsqueeze(2)).squeeze(2)
    if bias_EY is not None:
        out_NY = out_NY + bias_EY[expert_N]
    return torch.where(valid_N.unsqueeze(1), out_NY, 0.0)
