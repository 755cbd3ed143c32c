"""`diffulex::moe_combine`: the weighted sum of a token's K slots.

With ids [T, K] int32 or int64, slots whose id is outside [0, `num_experts`) count as zeros, whatever is in them; then a
generated kernel does not read them, and the expert GEMM before it need not write them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_float, check_int, check_rank, check_size
from ..errors import MoEShapeError
from ._library import register
from ._rows import rows_alone

_NAME = "diffulex::moe_combine"


def _validate(slots_NH: Tensor, weights_TK: Tensor, ids_TK: Tensor | None) -> None:
    check_rank(_NAME, "slots [T*K, H]", slots_NH, 2)
    check_rank(_NAME, "weights [T, K]", weights_TK, 2)
    check_float(_NAME, "slots", slots_NH)
    check_float(_NAME, "weights", weights_TK)
    check_device(_NAME, ("slots", slots_NH), ("weights", weights_TK))
    if isinstance(weights_TK.shape[1], int) and weights_TK.shape[1] < 1:
        raise MoEShapeError.of(
            _NAME,
            expected="weights [T, K] with K >= 1",
            got=f"shape {tuple(weights_TK.shape)}",
            hint="Pass the weights of moe_route.",
        )
    check_size(_NAME, "rows of slots = T*K", slots_NH.shape[0], weights_TK.shape[0] * weights_TK.shape[1])
    if ids_TK is not None:
        check_rank(_NAME, "ids [T, K]", ids_TK, 2)
        check_int(_NAME, "ids", ids_TK)
        check_device(_NAME, ("slots", slots_NH), ("ids", ids_TK))
        check_size(_NAME, "T of ids", ids_TK.shape[0], weights_TK.shape[0])
        check_size(_NAME, "K of ids", ids_TK.shape[1], weights_TK.shape[1])


def _wide(slots: Tensor, weights_TK: Tensor) -> torch.dtype:
    double = torch.float64 in (slots.dtype, weights_TK.dtype)
    return torch.float64 if double else torch.float32


def _slots_of_tokens(slots_NH: Tensor, weights_TK: Tensor, ids_TK: Tensor | None) -> Tensor:
    _validate(slots_NH, weights_TK, ids_TK)
    return slots_NH.view(*weights_TK.shape, slots_NH.shape[1])


def _known(ids_TK: Tensor, num_experts: int) -> Tensor:
    return (ids_TK >= 0) & (ids_TK < num_experts)


def _weighted(slots_TKH: Tensor, weights_TK: Tensor, ids_TK: Tensor | None, *, num_experts: int) -> Tensor:
    wide, top_k = _wide(slots_TKH, weights_TK), weights_TK.shape[1]
    known_TK = None if ids_TK is None else _known(ids_TK, num_experts)

    def slot(k: int) -> Tensor:
        slot_TH = slots_TKH[:, k].to(wide)
        return slot_TH if known_TK is None else torch.where(known_TK[:, k, None], slot_TH, 0.0)

    out_TH = (slot(0) * weights_TK[:, 0, None]).contiguous()  # whatever the strides of slots
    for k in range(1, top_k):  # K passes in slot order: no [T, K, H] temporary, same order as the generated kernel
        out_TH.addcmul_(slot(k), weights_TK[:, k, None].to(wide))
    return out_TH.to(slots_TKH.dtype)


def _cpu(slots_NH: Tensor, weights_TK: Tensor, ids_TK: Tensor | None = None, num_experts: int = 0) -> Tensor:
    slots_TKH = _slots_of_tokens(slots_NH, weights_TK, ids_TK)
    weighted = functools.partial(_weighted, num_experts=num_experts)
    return rows_alone(weighted, slots_TKH, weights_TK, ids_TK)  # type: ignore[no-any-return]


def _cuda(slots_NH: Tensor, weights_TK: Tensor, ids_TK: Tensor | None = None, num_experts: int = 0) -> Tensor:
    slots_TKH = _slots_of_tokens(slots_NH, weights_TK, ids_TK)
    return _weighted(slots_TKH, weights_TK, ids_TK, num_experts=num_experts)


def _fake(slots_NH: Tensor, weights_TK: Tensor, ids_TK: Tensor | None = None, num_experts: int = 0) -> Tensor:
    _validate(slots_NH, weights_TK, ids_TK)
    return slots_NH.new_empty(weights_TK.shape[0], slots_NH.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
    *tensors, ctx.num_experts = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
    slots_NH, weights_TK, ids_TK = ctx.saved_tensors
    num_tokens, top_k = weights_TK.shape
    wide = _wide(slots_NH, weights_TK)
    grad_T1H = grad_TH.to(wide).unsqueeze(1)
    known_TK1 = None if ids_TK is None else _known(ids_TK, ctx.num_experts).unsqueeze(2)
    grad_slots = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_TKH = grad_T1H * weights_TK.to(wide).unsqueeze(2)
        if known_TK1 is not None:
            grad_TKH = torch.where(known_TK1, grad_TKH, 0.0)
        grad_slots = grad_TKH.to(slots_NH.dtype).reshape(num_tokens * top_k, slots_NH.shape[1])
    if ctx.needs_input_grad[1]:
        slots_TKH = slots_NH.view(num_tokens, top_k, slots_NH.shape[1]).to(wide)
        if known_TK1 is not None:
            slots_TKH = torch.where(known_TK1, slots_TKH, 0.0)
        grad_weights = (grad_T1H * slots_TKH).sum(2).to(weights_TK.dtype)
    return grad_slots, grad_weights, None, None


moe_combine = register(
    "moe_combine", cpu=_cpu, cuda=_cuda, fake=_fake, setup_context=_setup_context, backward=_backward
)
