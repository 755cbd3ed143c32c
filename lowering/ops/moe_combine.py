"""`diffulex::moe_combine`: the weighted sum of a token's K slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_float, check_rank, check_size
from ..errors import MoEShapeError
from ._library import register
from ._rows import rows_alone

_NAME = "diffulex::moe_combine"


def _validate(slots_NH: Tensor, weights_TK: Tensor) -> None:
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


def _wide(slots: Tensor, weights_TK: Tensor) -> torch.dtype:
    double = torch.float64 in (slots.dtype, weights_TK.dtype)
    return torch.float64 if double else torch.float32


def _slots_of_tokens(slots_NH: Tensor, weights_TK: Tensor) -> Tensor:
    _validate(slots_NH, weights_TK)
    return slots_NH.view(*weights_TK.shape, slots_NH.shape[1])


def _weighted(slots_TKH: Tensor, weights_TK: Tensor) -> Tensor:
    wide, top_k = _wide(slots_TKH, weights_TK), weights_TK.shape[1]
    out_TH = (slots_TKH[:, 0].to(wide) * weights_TK[:, 0, None]).contiguous()  # whatever the strides of slots
    for k in range(1, top_k):  # K passes in slot order: no [T, K, H] temporary, same order as the generated kernel
        out_TH.addcmul_(slots_TKH[:, k].to(wide), weights_TK[:, k, None].to(wide))
    return out_TH.to(slots_TKH.dtype)


def _cpu(slots_NH: Tensor, weights_TK: Tensor) -> Tensor:
    return rows_alone(_weighted, _slots_of_tokens(slots_NH, weights_TK), weights_TK)  # type: ignore[no-any-return]


def _cuda(slots_NH: Tensor, weights_TK: Tensor) -> Tensor:
    return _weighted(_slots_of_tokens(slots_NH, weights_TK), weights_TK)


def _fake(slots_NH: Tensor, weights_TK: Tensor) -> Tensor:
    _validate(slots_NH, weights_TK)
    return slots_NH.new_empty(weights_TK.shape[0], slots_NH.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, Tensor | None]:
    slots_NH, weights_TK = ctx.saved_tensors
    num_tokens, top_k = weights_TK.shape
    wide = _wide(slots_NH, weights_TK)
    grad_T1H = grad_TH.to(wide).unsqueeze(1)
    grad_slots = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_TKH = grad_T1H * weights_TK.to(wide).unsqueeze(2)
        grad_slots = grad_TKH.to(slots_NH.dtype).reshape(num_tokens * top_k, slots_NH.shape[1])
    if ctx.needs_input_grad[1]:
        slots_TKH = slots_NH.view(num_tokens, top_k, slots_NH.shape[1]).to(wide)
        grad_weights = (grad_T1H * slots_TKH).sum(2).to(weights_TK.dtype)
    return grad_slots, grad_weights


moe_combine = register(
    "moe_combine", cpu=_cpu, cuda=_cuda, fake=_fake, setup_context=_setup_context, backward=_backward
)
