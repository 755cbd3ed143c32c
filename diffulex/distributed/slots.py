"""Exchanges of rows with exact splits as ops, so that `torch.compile` captures a call whose sizes the routing decides.

`send_rows` reads the splits on the host, once a call, and gives them on as a tensor of the host; how many rows it
receives is an unbacked size of the graph. `exchange_rows` takes the way back, or the same way again, by those splits. A
gradient takes the other way, so every rank asks for gradients of a call or none does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .collectives import exchange_now
from .exchange_ops import define


def send_rows(rows_NH: Tensor, details_ND: Tensor, *, splits_2R: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """The first rows to the ranks of `group`, and what goes with each: what came, and the splits on the host.

    rows [N, H] floating and details [N, D] of any dtype: those of rank 0 first, then rank 1's, and so on; what stands
    behind them stays here. splits [2, ranks] int64 on the device of rows: how many go to each rank, and come from it.
    Returns rows [R, H], details [R, D] and splits [2, ranks] int64 on the CPU. Differentiable in the rows. The caller
    sees to it that the splits of all ranks fit one another, and that no rank sends more than N rows.
    """
    return _send_rows_op(rows_NH, details_ND, splits_2R, group)  # type: ignore[no-any-return]


def exchange_rows(rows_SH: Tensor, splits_2R: Tensor, *, count: int, back: bool, group: str) -> Tensor:
    """The first of rows [S, H], floating, by the splits [2, ranks] on the CPU: [count, H], with zeros behind what came.

    By the first row of the splits to the ranks; with `back` by the second one, from where they came. Differentiable.
    The splits are those of `send_rows`: no more than `count` rows come.
    """
    return _exchange_rows_op(rows_SH, splits_2R, count, back, group)  # type: ignore[no-any-return]


def _send_rows(rows_NH: Tensor, details_ND: Tensor, splits_2R: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    # a copy, as an op must not return what it was given, and laid out as the fake one
    splits_on_host_2R = splits_2R.to("cpu", copy=True, memory_format=torch.contiguous_format)
    send, recv = splits_on_host_2R.tolist()
    sent = sum(send)
    recv_RH = exchange_now(rows_NH[:sent], recv, send=send, group=group)
    return recv_RH, exchange_now(details_ND[:sent], recv, send=send, group=group), splits_on_host_2R


def _exchange_rows(rows_SH: Tensor, splits_2R: Tensor, count: int, back: bool, group: str) -> Tensor:
    there, here = reversed(splits_2R.tolist()) if back else splits_2R.tolist()
    came_RH = exchange_now(rows_SH[: sum(there)], here, send=there, group=group)
    if came_RH.shape[0] == count:
        return came_RH
    return torch.cat((came_RH, came_RH.new_zeros(count - came_RH.shape[0], *came_RH.shape[1:])))


def _expect(count: torch.SymInt, rows: int | torch.SymInt) -> None:
    """Have code compiled for as many rows as a rank sends, which is what comes to one of ranks that are alike."""
    rows = rows if isinstance(rows, int) else rows.node.hint
    if rows is not None:
        count.node.shape_env.var_to_hint_override[count.node.expr] = rows


def _send_rows_fake(
    rows_NH: Tensor, details_ND: Tensor, splits_2R: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    _expect(count, rows_NH.shape[0])
    recv_RH, recv_RD = (tensor.new_empty(count, tensor.shape[1]) for tensor in (rows_NH, details_ND))
    return recv_RH, recv_RD, torch.empty(splits_2R.shape, dtype=splits_2R.dtype, device="cpu")


def _exchange_rows_fake(rows_SH: Tensor, splits_2R: Tensor, count: int, back: bool, group: str) -> Tensor:
    return rows_SH.new_empty(count, rows_SH.shape[1])


def _keep_send(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.count, ctx.group = inputs[0].shape[0], inputs[3]
    ctx.save_for_backward(output[2])


def _send_back(ctx: Any, grad_RH: Tensor, *of_others: Tensor) -> tuple[Tensor | None, ...]:
    (splits_2R,) = ctx.saved_tensors
    return exchange_rows(grad_RH, splits_2R, count=ctx.count, back=True, group=ctx.group), None, None, None


def _keep_exchange(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.count, ctx.back, ctx.group = inputs[0].shape[0], inputs[3], inputs[4]
    ctx.save_for_backward(inputs[1])


def _exchange_back(ctx: Any, grad_SH: Tensor) -> tuple[Tensor | None, ...]:
    (splits_2R,) = ctx.saved_tensors
    grad = exchange_rows(grad_SH, splits_2R, count=ctx.count, back=not ctx.back, group=ctx.group)
    return grad, None, None, None, None


# a CUDA graph would keep the splits of one call, which the host reads
_UNSAFE = (torch.Tag.cudagraph_unsafe,)
_send_rows_op = define(
    "send_rows(Tensor rows, Tensor details, Tensor splits, str group) -> (Tensor, Tensor, Tensor)",
    _send_rows,
    fake=_send_rows_fake,
    tags=_UNSAFE,
    setup_context=_keep_send,
    backward=_send_back,
)
_exchange_rows_op = define(
    "exchange_rows(Tensor rows, Tensor splits, SymInt count, bool back, str group) -> Tensor",
    _exchange_rows,
    fake=_exchange_rows_fake,
    tags=_UNSAFE,
    setup_context=_keep_exchange,
    backward=_exchange_back,
)
