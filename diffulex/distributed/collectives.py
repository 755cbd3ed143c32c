"""Differentiable collectives as ops, which torch.compile captures and keeps in order.

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

from .exchange_ops import define

_OPS = torch.ops._c10d_functional


def exchange(rows: Tensor, recv: list[int], *, send: list[int], group: str) -> Tensor:
    """send[r] rows to each rank r of `group` and recv[r] rows from it, S = sum(send) and R = sum(recv) in all.

    rows [S, ...] of any dtype; returns [R, ...] in it. Not differentiable.
    """
    return _exchange_op(rows, recv, send, group)  # type: ignore[no-any-return]


def all_gather(rows: Tensor, size: int, *, group: str) -> Tensor:
    """The rows [C, ...] of all ranks in order, [size * C, ...], any dtype; not differentiable."""
    return _all_gather_op(rows, size, group)  # type: ignore[no-any-return]


def of_first_rank(tensor: Tensor, *, group: str) -> Tensor:
    """The tensor [...] of the first rank of `group`, on all of them, in its dtype; not differentiable."""
    return _of_first_rank_op(tensor, group)  # type: ignore[no-any-return]


def total_of_ranks(counts: Tensor, group: str) -> Tensor:
    """The sum over all ranks of `group` of an integer tensor [...], in its dtype; not differentiable."""
    return _all_reduce_op(counts, group)  # type: ignore[no-any-return]


def exchange_now(rows: Tensor, recv: list[int], *, send: list[int], group: str) -> Tensor:
    """`exchange` inside another op: rows [S, ...] of any dtype to [R, ...] in it."""
    return _OPS.wait_tensor(_OPS.all_to_all_single(rows.contiguous(), recv, send, group))


def _all_gather(rows: Tensor, size: int, group: str) -> Tensor:
    return _OPS.wait_tensor(_OPS.all_gather_into_tensor(rows.contiguous(), size, group))


def _of_first_rank(tensor: Tensor, group: str) -> Tensor:
    return _OPS.wait_tensor(_OPS.broadcast(tensor.contiguous(), 0, group))


def _all_reduce(tensor: Tensor, group: str) -> Tensor:
    return _OPS.wait_tensor(_OPS.all_reduce(tensor.contiguous(), "sum", group))


_exchange_op = define(
    "exchange(Tensor rows, SymInt[] recv, SymInt[] send, str group) -> Tensor",
    lambda rows, recv, send, group: exchange_now(rows, recv, send=send, group=group),
    fake=lambda rows, recv, send, group: rows.new_empty(sum(recv), *rows.shape[1:]),
)
_all_gather_op = define(
    "all_gather(Tensor rows, int size, str group) -> Tensor",
    _all_gather,
    fake=lambda rows, size, group: rows.new_empty(size * rows.shape[0], *rows.shape[1:]),
)
_of_first_rank_op = define(
    "of_first_rank(Tensor tensor, str group) -> Tensor",
    _of_first_rank,
    fake=lambda tensor, group: tensor.new_empty(tensor.shape),
)
_all_reduce_op = define(
    "all_reduce(Tensor tensor, str group) -> Tensor",
    _all_reduce,
    fake=lambda tensor, group: tensor.new_empty(tensor.shape),
)


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
    summed = _all_reduce_op(tensor.to(_wide(tensor)), group)
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
