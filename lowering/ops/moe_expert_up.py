"""`diffulex::moe_expert_up`: gather, first expert GEMM, bias and activation; rows in expert order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_float, check_int, check_rank, check_same, check_size
from ..activation import IDENTITY, derivative, evaluate, intermediate_size, is_gated, split_gate
from ..errors import MoERangeError
from ._grouped import gathered_bmm
from ._launch import launcher
from ._library import register
from ._rows import rows_alone
from .cpu_gemm import chunks, expert_products, hit_experts

_NAME = "diffulex::moe_expert_up"


def _validate(
    hidden_TH: Tensor, w13_EJH: Tensor, b13_EJ: Tensor | None, order_N: Tensor, offsets_E1: Tensor, top_k: int, act: str
) -> int:
    """Check the arguments and return the output width I."""
    check_rank(_NAME, "hidden [T, H]", hidden_TH, 2)
    check_rank(_NAME, "w13 [E, J, H]", w13_EJH, 3)
    check_rank(_NAME, "order [N]", order_N, 1)
    check_rank(_NAME, "offsets [E+1]", offsets_E1, 1)
    check_float(_NAME, "hidden", hidden_TH)
    check_same(_NAME, ("hidden", hidden_TH), ("w13", w13_EJH))
    check_same(_NAME, ("hidden", hidden_TH), ("b13", b13_EJ))
    check_int(_NAME, "order", order_N)
    check_int(_NAME, "offsets", offsets_E1)
    check_device(_NAME, ("hidden", hidden_TH), ("order", order_N))
    check_device(_NAME, ("hidden", hidden_TH), ("offsets", offsets_E1))
    if top_k < 1:
        raise MoERangeError.of(_NAME, expected="top_k >= 1", got=str(top_k), hint="Pass the K of ids [T, K].")
    num_experts, width_J, width_H = w13_EJH.shape
    check_size(_NAME, "rows of order = T*K", order_N.shape[0], hidden_TH.shape[0] * top_k)
    check_size(_NAME, "H of hidden", hidden_TH.shape[1], width_H)
    check_size(_NAME, "length of offsets = E+1", offsets_E1.shape[0], num_experts + 1)
    if b13_EJ is not None:
        check_rank(_NAME, "b13 [E, J]", b13_EJ, 2)
        check_size(_NAME, "E of b13", b13_EJ.shape[0], num_experts)
        check_size(_NAME, "J of b13", b13_EJ.shape[1], width_J)
    if is_gated(act):
        check_size(_NAME, f"remainder of J / 2 for the gated activation {act!r}", width_J % 2, 0)
    return intermediate_size(act, width_J)


def _gather(hidden_TH: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """The token's row [N, H] for each row in expert order; slot n belongs to token n // top_k."""
    return hidden_TH.index_select(0, order_N if top_k == 1 else torch.div(order_N, top_k, rounding_mode="floor"))


def _activate(pre_NJ: Tensor, act: str, interleaved: bool) -> Tensor:
    """Activation [N, I] in at least fp32, not cast back; may be a view of the pre-activation."""
    wide_NJ = pre_NJ if pre_NJ.dtype == torch.float64 else pre_NJ.float()
    return evaluate(act, *split_gate(wide_NJ, act, interleaved=interleaved))


def _cpu(
    hidden_TH: Tensor,
    w13_EJH: Tensor,
    b13_EJ: Tensor | None,
    order_N: Tensor,
    offsets_E1: Tensor,
    top_k: int,
    act: str = IDENTITY,
    interleaved: bool = False,
) -> Tensor:
    width_I = _validate(hidden_TH, w13_EJH, b13_EJ, order_N, offsets_E1, top_k, act)
    bounds = offsets_E1.tolist()
    out_NI = hidden_TH.new_empty(order_N.shape[0], width_I)
    out_NI[bounds[-1] :].zero_()
    wide = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
    for first, last, experts in chunks(hit_experts(bounds)):
        rows_RH = _gather(hidden_TH, order_N[first:last], top_k)
        out_RI = out_NI[first:last]
        pre_RJ = out_RI if act == IDENTITY else rows_RH.new_empty(last - first, w13_EJH.shape[1], dtype=wide)
        expert_products(rows_RH, w13_EJH, b13_EJ, pre_RJ, experts=experts)
        if act != IDENTITY:
            out_RI.copy_(rows_alone(lambda rows_RJ: _activate(rows_RJ, act, interleaved), pre_RJ))
    return out_NI


def _cuda(
    hidden_TH: Tensor,
    w13_EJH: Tensor,
    b13_EJ: Tensor | None,
    order_N: Tensor,
    offsets_E1: Tensor,
    top_k: int,
    act: str = IDENTITY,
    interleaved: bool = False,
) -> Tensor:
    _validate(hidden_TH, w13_EJH, b13_EJ, order_N, offsets_E1, top_k, act)
    if hidden_TH.dtype == torch.float64:
        pre_NJ = gathered_bmm(_gather(hidden_TH, order_N, top_k), w13_EJH, b13_EJ, offsets_E1)
        if act == IDENTITY:
            return pre_NJ
        valid_N1 = (torch.arange(pre_NJ.shape[0], device=pre_NJ.device) < offsets_E1[-1]).unsqueeze(1)
        return torch.where(valid_N1, _activate(pre_NJ, act, interleaved), 0.0)
    return launcher().moe_expert_up(hidden_TH, w13_EJH, b13_EJ, order_N, offsets_E1, act=act, interleaved=interleaved)


def _fake(
    hidden_TH: Tensor,
    w13_EJH: Tensor,
    b13_EJ: Tensor | None,
    order_N: Tensor,
    offsets_E1: Tensor,
    top_k: int,
    act: str = IDENTITY,
    interleaved: bool = False,
) -> Tensor:
    width_I = _validate(hidden_TH, w13_EJH, b13_EJ, order_N, offsets_E1, top_k, act)
    return hidden_TH.new_empty(order_N.shape[0], width_I)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden_TH, w13_EJH, b13_EJ, order_N, offsets_E1, ctx.top_k, ctx.act, ctx.interleaved = inputs
    ctx.save_for_backward(hidden_TH, w13_EJH, b13_EJ, order_N, offsets_E1)


def _grad_pre(ctx: Any, grad_NI: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
    """Gradient [N, J] before the activation; the pre-activation is computed again, not saved."""
    pre_NJ = moe_expert_up(*saved, ctx.top_k)
    wide = torch.float64 if pre_NJ.dtype == torch.float64 else torch.float32
    gate_NI, up_NI = split_gate(pre_NJ.to(wide), ctx.act, interleaved=ctx.interleaved)
    grad_gate_NI = grad_NI.to(wide) * derivative(ctx.act, "g", gate_NI, up_NI)
    if not is_gated(ctx.act):
        return grad_gate_NI.to(pre_NJ.dtype)
    grad_up_NI = grad_NI.to(wide) * derivative(ctx.act, "u", gate_NI, up_NI)
    if ctx.interleaved:
        grad_NJ = torch.stack((grad_gate_NI, grad_up_NI), dim=2).reshape(pre_NJ.shape)
    else:
        grad_NJ = torch.cat((grad_gate_NI, grad_up_NI), dim=1)
    return grad_NJ.to(pre_NJ.dtype)


def _backward(ctx: Any, grad_NI: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing gives them once
    hidden_TH, w13_EJH, b13_EJ, order_N, offsets_E1 = saved
    ops = torch.ops.diffulex
    grad_NJ = grad_NI.contiguous() if ctx.act == IDENTITY else _grad_pre(ctx, grad_NI, saved)
    grad_hidden = grad_w13 = grad_b13 = None
    if ctx.needs_input_grad[0]:
        # in slot order the K rows of a token stand together: a sum over K, deterministic, without atomics
        slots_NH = ops.moe_expert_down(grad_NJ, w13_EJH.transpose(1, 2), None, order_N, offsets_E1)
        slots_TKH = slots_NH.view(hidden_TH.shape[0], ctx.top_k, hidden_TH.shape[1])
        wide = torch.float64 if slots_NH.dtype == torch.float64 else torch.float32
        grad_hidden = slots_TKH.sum(1, dtype=wide).to(hidden_TH.dtype)
    if ctx.needs_input_grad[1]:
        grad_w13 = ops.moe_expert_grad_weight(grad_NJ, hidden_TH, None, order_N // ctx.top_k, offsets_E1)
    if b13_EJ is not None and ctx.needs_input_grad[2]:
        ones_N1 = grad_NJ.new_ones(grad_NJ.shape[0], 1)
        grad_b13 = ops.moe_expert_grad_weight(grad_NJ, ones_N1, None, None, offsets_E1).squeeze(2)
    return grad_hidden, grad_w13, grad_b13, None, None, None, None, None


moe_expert_up = register(
    "moe_expert_up", cpu=_cpu, cuda=_cuda, fake=_fake, setup_context=_setup_context, backward=_backward
)
