"""`diffulex::moe_expert_grad_weight`: the weight gradient of both expert GEMMs, a ragged sum of outer products."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_float, check_int, check_rank, check_same, check_size
from ._grouped import expert_of_rows
from ._launch import launcher
from ._library import register

_NAME = "diffulex::moe_expert_grad_weight"


def _validate(
    left: Tensor, right: Tensor, left_index_N: Tensor | None, right_index_N: Tensor | None, offsets_E1: Tensor
) -> None:
    check_rank(_NAME, "left [*, L]", left, 2)
    check_rank(_NAME, "right [*, R]", right, 2)
    check_rank(_NAME, "offsets [E+1]", offsets_E1, 1)
    check_float(_NAME, "left", left)
    check_same(_NAME, ("left", left), ("right", right))
    check_int(_NAME, "offsets", offsets_E1)
    check_device(_NAME, ("left", left), ("offsets", offsets_E1))
    for name, index_N in (("left_index", left_index_N), ("right_index", right_index_N)):
        if index_N is not None:
            check_rank(_NAME, f"{name} [N]", index_N, 1)
            check_int(_NAME, name, index_N)
            check_device(_NAME, ("left", left), (name, index_N))
    rows = [
        (t if index_N is None else index_N).shape[0] for t, index_N in ((left, left_index_N), (right, right_index_N))
    ]
    check_size(_NAME, "rows of right (or of right_index) = rows of left (or of left_index)", rows[1], rows[0])


def _rows(tensor: Tensor, index_N: Tensor | None) -> Tensor:
    return tensor if index_N is None else tensor.index_select(0, index_N)


def _cpu(
    left: Tensor, right: Tensor, left_index_N: Tensor | None, right_index_N: Tensor | None, offsets_E1: Tensor
) -> Tensor:
    _validate(left, right, left_index_N, right_index_N, offsets_E1)
    left_NL, right_NR = _rows(left, left_index_N), _rows(right, right_index_N)
    bounds = offsets_E1.tolist()
    grad_ELR = left.new_zeros(len(bounds) - 1, left.shape[1], right.shape[1])
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start < end:
            torch.mm(left_NL[start:end].t(), right_NR[start:end], out=grad_ELR[expert])
    return grad_ELR


def _cuda(
    left: Tensor, right: Tensor, left_index_N: Tensor | None, right_index_N: Tensor | None, offsets_E1: Tensor
) -> Tensor:
    _validate(left, right, left_index_N, right_index_N, offsets_E1)
    if left.dtype != torch.float64:
        return launcher().moe_expert_grad_weight(left, right, left_index_N, right_index_N, offsets_E1)
    left_NL, right_NR = _rows(left, left_index_N), _rows(right, right_index_N)
    expert_N, valid_N = expert_of_rows(offsets_E1, left_NL.shape[0])
    grads = []
    for expert in range(offsets_E1.shape[0] - 1):  # gradcheck sizes; rows of others are left out, not times zero
        member_N1 = ((expert_N == expert) & valid_N).unsqueeze(1)
        grads.append(torch.where(member_N1, left_NL, 0.0).t() @ torch.where(member_N1, right_NR, 0.0))
    return torch.stack(grads)


def _fake(
    left: Tensor, right: Tensor, left_index_N: Tensor | None, right_index_N: Tensor | None, offsets_E1: Tensor
) -> Tensor:
    _validate(left, right, left_index_N, right_index_N, offsets_E1)
    return left.new_empty(offsets_E1.shape[0] - 1, left.shape[1], right.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad_side(grad_EYX: Tensor, other_NX: Tensor, side: Tensor, index_N: Tensor | None, offsets_E1: Tensor) -> Tensor:
    """Gradient of one side [*, Y]: grad[e] @ other row, added up where an index repeats, without atomics."""
    row_N = torch.arange(other_NX.shape[0], dtype=offsets_E1.dtype, device=offsets_E1.device)
    grad_NY = torch.ops.diffulex.moe_expert_up(other_NX, grad_EYX, None, row_N, offsets_E1, 1)
    if index_N is None:
        return grad_NY
    return torch.index_put(torch.zeros_like(side), (index_N.long(),), grad_NY, accumulate=True)


def _backward(ctx: Any, grad_ELR: Tensor) -> tuple[Tensor | None, ...]:
    left, right, left_index_N, right_index_N, offsets_E1 = ctx.saved_tensors
    grad_left = grad_right = None
    if ctx.needs_input_grad[0]:
        grad_left = _grad_side(grad_ELR, _rows(right, right_index_N), left, left_index_N, offsets_E1)
    if ctx.needs_input_grad[1]:
        grad_ERL = grad_ELR.transpose(1, 2)
        grad_right = _grad_side(grad_ERL, _rows(left, left_index_N), right, right_index_N, offsets_E1)
    return grad_left, grad_right, None, None, None


moe_expert_grad_weight = register(
    "moe_expert_grad_weight", cpu=_cpu, cuda=_cuda, fake=_fake, setup_context=_setup_context, backward=_backward
)
