"""Differentiable collectives out of functional ones, which torch.compile captures.

A gradient takes the way back with the same splits, so it needs every rank: either all ranks of a group ask for
gradients of a call, or none does. What is added up is added in fp32 or wider: behind an exchange in the order of the
ranks, in an all-reduce in the order of its algorithm, which is the same for all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed  # loads the functional ops
from torch import Tensor
from torch.distributed import _functional_collectives as _registered  # noqa: F401 (their fake functions)

_OPS = torch.ops._c10d_functional


def exchange(rows: Tensor, recv: list[int], *, send: list[int], group: str) -> Tensor:
    """send[r] rows to each rank r of `group` and recv[r] rows from it, S = sum(send) and R = sum(recv) in all.

    rows [S, ...] of any dtype; returns [R, ...] in it. Not differentiable.
    """
    return _OPS.wait_tensor(_OPS.all_to_all_single(rows.contiguous(), recv, send, group))


def gather(rows: Tensor, size: int, *, group: str) -> Tensor:
    """The rows [C, ...] of all ranks in order, [size * C, ...], any dtype; not differentiable."""
    return _OPS.wait_tensor(_OPS.all_gather_into_tensor(rows.contiguous(), size, group))


def of_first_rank(tensor: Tensor, *, group: str) -> Tensor:
    """The tensor [...] of the first rank of `group`, on all of them, in its dtype; not differentiable."""
    return _OPS.wait_tensor(_OPS.broadcast(tensor.contiguous(), 0, group))


def total_of_ranks(counts: Tensor, group: str) -> Tensor:
    """The sum over all ranks of `group` of an integer tensor [...], in its dtype; not differentiable."""
    return _OPS.wait_tensor(_OPS.all_reduce(counts.contiguous(), "sum", group))


def added_in_order(parts: Sequence[Tensor]) -> Tensor:
    """The sum [...] of floating tensors [...] of one dtype, from first to last, in fp32 or wider.

    Not `torch.sum` over a dimension: that adds five or more of them in an order that depends on their sizes.
    """
    first, *others = parts
    total = first.to(_wide(first))
    for other in others:
        total = total + other
    return total


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _sum_over_ranks(tensor: Tensor, group: str) -> Tensor:
    summed = _OPS.wait_tensor(_OPS.all_reduce(tensor.to(_wide(tensor)).contiguous(), "sum", group))
    # Compiled by torch 2.11, a Function whose forward ends in a cast that casts nothing has no gradient at all.
    return summed if summed.dtype == tensor.dtype else summed.to(tensor.dtype)


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_of_ranks(grad, ctx.group), None


class _SumOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _sum_over_ranks(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return copy_to_ranks(grad, ctx.group), None


def copy_to_ranks(tensor: Tensor, group: str) -> Tensor:
    """A floating tensor [...] that is the same on all ranks, as it is; the gradients of all ranks are added up."""
    return _CopyToRanks.apply(tensor, group)


def sum_of_ranks(tensor: Tensor, group: str) -> Tensor:
    """The sum over all ranks of a floating tensor [...]; its gradient, the same on all ranks, goes to each."""
    return _SumOfRanks.apply(tensor, group)
