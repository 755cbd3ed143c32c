"""Tokens to all ranks, and rows back, in static shapes: through symmetric memory or collectives, bitwise the same.

Gradients travel by collectives either way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .collectives import added_in_order, all_gather, exchange
from .symmetric import all_to_all_op, gather_op, offsets_of, rows_at, rows_of_ranks_op


@dataclasses.dataclass(frozen=True)
class Route:
    """Which ranks an exchange is between, and the key of the workspace that it goes through; None: collectives."""

    group: str
    size: int
    workspace: str | None = None


def bytes_to_ranks(capacity: int, row_bytes: int, *, top_k: int) -> int:
    """What `tokens_to_ranks` needs of a workspace at most: hidden states of so many bytes a token, ids and weights."""
    hidden, details = ((capacity, row_bytes), torch.uint8), ((capacity, 2 * top_k), torch.int64)
    return offsets_of((hidden, details))[1]


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """[T, X] -> [rows, X] in the same dtype, zeros at the end; one graph for a full and a partly filled tensor."""
    return torch.cat((tensor, tensor.new_zeros(rows, tensor.shape[1])))[:rows]


def gathered(parts: list[Tensor], capacity: int, *, route: Route) -> list[Tensor]:
    """Tensors [T, X] of any dtype -> [ranks * C, X] in it, zeros in the places without a token; not differentiable."""
    if route.workspace is not None:
        return gather_op(parts, capacity, route.size, route.workspace)  # type: ignore[no-any-return]
    return [all_gather(_padded(part, capacity), route.size, group=route.group) for part in parts]


def packed(places_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Places [T, K] int and weights [T, K] floating side by side, [T, 2K] int32 or int64."""
    wide, words = _words_of(weights_TK.dtype)
    return torch.cat((places_TK.to(words), weights_TK.to(wide).view(words)), dim=1)


def unpacked(details_RD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Places [R, K] int and weights [R, K] in their floating dtype, from details [R, 2K] int32 or int64."""
    wide, _ = _words_of(dtype)
    top_k = details_RD.shape[1] // 2
    weights_RK = details_RD[:, top_k:].contiguous().view(wide)
    if wide != dtype:  # torch 2.11 compiles a Function that ends in a cast of nothing without a gradient
        weights_RK = weights_RK.to(dtype)
    return details_RD[:, :top_k].contiguous(), weights_RK


def _words_of(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """A floating and an integer dtype of the same size that hold weights of that dtype."""
    return (torch.float64, torch.int64) if dtype == torch.float64 else (torch.float32, torch.int32)


class _TokensToRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weights_TK: Tensor, places_TK: Tensor, capacity: int, route: Route
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(places_TK)
        ctx.route = route
        details = packed(places_TK, weights_TK)
        hidden_RH, details = gathered([hidden_TH, details], capacity, route=route)
        places_RK, weights_RK = unpacked(details, weights_TK.dtype)
        ctx.mark_non_differentiable(places_RK)
        return hidden_RH, weights_RK, places_RK

    @staticmethod
    def backward(
        ctx: Any, grad_RH: Tensor, grad_RK: Tensor, _: Any
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (places_TK,) = ctx.saved_tensors
        grads = (
            _sums_at_home(grad, places_TK, ctx.route) if needed else None
            for grad, needed in zip((grad_RH, grad_RK), ctx.needs_input_grad, strict=False)
        )
        return *grads, None, None, None  # type: ignore[return-value]


def _sums_at_home(grad: Tensor, places_TK: Tensor, route: Route) -> Tensor:
    """The gradients [R, X] that all ranks have for this one's tokens, added up in the order of the ranks: [T, X]."""
    count = grad.shape[0] // route.size
    back = exchange(grad, [count] * route.size, send=[count] * route.size, group=route.group)
    summed = added_in_order(back.chunk(route.size)).to(grad.dtype)
    # a slice has a graph of its own when full; the number of tokens comes from a tensor, as compiled code wants it
    return summed.index_select(0, torch.arange(places_TK.shape[0], device=grad.device))


class _RowsBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route) -> Tensor:
        ctx.route = route
        if route.workspace is not None:
            return all_to_all_op(rows, route.size, route.workspace)  # type: ignore[no-any-return]
        return _evenly(rows, route)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _evenly(grad, ctx.route), None


class _SlotsBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places_N: Tensor, route: Route) -> Tensor:
        ctx.save_for_backward(places_N)
        ctx.route, ctx.count = route, rows.shape[0]
        if route.workspace is not None:
            return rows_of_ranks_op(rows, places_N, route.size, route.workspace)  # type: ignore[no-any-return]
        return rows_at(_evenly(rows, route), places_N)

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None, None]:
        (places_N,) = ctx.saved_tensors
        # all that is for no rank goes to one more row, which stays here
        place_N = torch.where(places_N >= 0, places_N, ctx.count)
        grad = grad_NH.new_zeros(ctx.count + 1, grad_NH.shape[1]).index_copy(0, place_N, grad_NH)
        return _evenly(grad[: ctx.count], ctx.route), None, None


def _evenly(rows: Tensor, route: Route) -> Tensor:
    splits = [rows.shape[0] // route.size] * route.size
    return exchange(rows, splits, send=splits, group=route.group)


def tokens_to_ranks(
    hidden_TH: Tensor, weights_TK: Tensor, places_TK: Tensor, *, capacity: int, route: Route
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of all ranks, C = `capacity` places for each of them and zeros in those without a token.

    hidden [T, H] and weights [T, K] floating, places [T, K] int below 2**31; T <= C. Returns hidden [R, H] and
    weights [R, K] in their dtypes and places [R, K] int32 or int64, for R = ranks * C. Hidden states and weights are
    differentiable: the gradients of all ranks are added up.
    """
    return _TokensToRanks.apply(hidden_TH, weights_TK, places_TK, capacity, route)  # type: ignore[no-any-return]


def rows_back(rows: Tensor, route: Route) -> Tensor:
    """The r-th of equal parts of floating rows [R, H] to rank r, [R, H] from all in order; differentiable."""
    return _RowsBack.apply(rows, route)  # type: ignore[no-any-return]


def slots_back(rows: Tensor, places_N: Tensor, *, route: Route) -> Tensor:
    """Rows of `rows_back` at places [N] int64, each at most once, and zeros at -1: floating [R, H] to [N, H].

    Differentiable. Through symmetric memory other rows do not travel.
    """
    return _SlotsBack.apply(rows, places_N, route)  # type: ignore[no-any-return]
