"""`diffulex::moe_expert_down`: second expert GEMM and bias; rows scattered back to slot order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_float, check_int, check_rank, check_same, check_size
from ._grouped import gathered_bmm
from ._launch import launcher
from ._library import register
from .cpu_gemm import chunks, expert_products, hit_experts

_NAME = "diffulex::moe_expert_down"


def _validate(act_NI: Tensor, w2_EHI: Tensor, b2_EH: Tensor | None, order_N: Tensor, offsets_E1: Tensor) -> None:
    check_rank(_NAME, "act [N, I]", act_NI, 2)
    check_rank(_NAME, "w2 [E, H, I]", w2_EHI, 3)
    check_rank(_NAME, "order [N]", order_N, 1)
    check_rank(_NAME, "offsets [E+1]", offsets_E1, 1)
    check_float(_NAME, "act", act_NI)
    check_same(_NAME, ("act", act_NI), ("w2", w2_EHI))
    check_same(_NAME, ("act", act_NI), ("b2", b2_EH))
    check_int(_NAME, "order", order_N)
    check_int(_NAME, "offsets", offsets_E1)
    check_device(_NAME, ("act", act_NI), ("order", order_N))
    check_device(_NAME, ("act", act_NI), ("offsets", offsets_E1))
    num_experts, width_H, width_I = w2_EHI.shape
    check_size(_NAME, "I of act", act_NI.shape[1], width_I)
    check_size(_NAME, "rows of order = rows of act", order_N.shape[0], act_NI.shape[0])
    check_size(_NAME, "length of offsets = E+1", offsets_E1.shape[0], num_experts + 1)
    if b2_EH is not None:
        check_rank(_NAME, "b2 [E, H]", b2_EH, 2)
        check_size(_NAME, "E of b2", b2_EH.shape[0], num_experts)
        check_size(_NAME, "H of b2", b2_EH.shape[1], width_H)


def _scatter(rows_NH: Tensor, order_N: Tensor) -> Tensor:
    """slots[order[r]] = rows[r]; order is a permutation, so every slot is written once."""
    return torch.empty_like(rows_NH).index_copy_(0, order_N.long(), rows_NH)


def _cpu(act_NI: Tensor, w2_EHI: Tensor, b2_EH: Tensor | None, order_N: Tensor, offsets_E1: Tensor) -> Tensor:
    _validate(act_NI, w2_EHI, b2_EH, order_N, offsets_E1)
    bounds = offsets_E1.tolist()
    slots_NH = act_NI.new_empty(act_NI.shape[0], w2_EHI.shape[1])
    slots_NH.index_fill_(0, order_N[bounds[-1] :].long(), 0.0)
    for first, last, experts in chunks(hit_experts(bounds)):
        rows_RH = slots_NH.new_empty(last - first, slots_NH.shape[1])
        expert_products(act_NI[first:last], w2_EHI, b2_EH, rows_RH, experts=experts)
        slots_NH.index_copy_(0, order_N[first:last].long(), rows_RH)
    return slots_NH


def _cuda(act_NI: Tensor, w2_EHI: Tensor, b2_EH: Tensor | None, order_N: Tensor, offsets_E1: Tensor) -> Tensor:
    _validate(act_NI, w2_EHI, b2_EH, order_N, offsets_E1)
    if act_NI.dtype == torch.float64:
        return _scatter(gathered_bmm(act_NI, w2_EHI, b2_EH, offsets_E1), order_N)
    return launcher().moe_expert_down(act_NI, w2_EHI, b2_EH, order_N, offsets_E1)


def _fake(act_NI: Tensor, w2_EHI: Tensor, b2_EH: Tensor | None, order_N: Tensor, offsets_E1: Tensor) -> Tensor:
    _validate(act_NI, w2_EHI, b2_EH, order_N, offsets_E1)
    return act_NI.new_empty(act_NI.shape[0], w2_EHI.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
    act_NI, w2_EHI, b2_EH, order_N, offsets_E1 = ctx.saved_tensors
    ops = torch.ops.diffulex
    grad_NH = grad_NH.contiguous()
    grad_act = grad_w2 = grad_b2 = None
    if ctx.needs_input_grad[0]:
        grad_act = ops.moe_expert_up(grad_NH, w2_EHI.transpose(1, 2), None, order_N, offsets_E1, 1)
    if ctx.needs_input_grad[1]:
        grad_w2 = ops.moe_expert_grad_weight(grad_NH, act_NI, order_N, None, offsets_E1)
    if b2_EH is not None and ctx.needs_input_grad[2]:
        ones_N1 = grad_NH.new_ones(grad_NH.shape[0], 1)
        grad_b2 = ops.moe_expert_grad_weight(grad_NH, ones_N1, order_N, None, offsets_E1).squeeze(2)
    return grad_act, grad_w2, grad_b2, None, None


moe_expert_down = register(
    "moe_expert_down", cpu=_cpu, cuda=_cuda, fake=_fake, setup_context=_setup_context, backward=_backward
)
