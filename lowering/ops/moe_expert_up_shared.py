"""`diffulex::moe_expert_up_shared`: the up stage of routed experts and, beside it, that of a shared expert."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_rank, check_same, check_size
from ..activation import evaluate, is_gated
from ..errors import MoEOptionError
from ._library import register_composite
from .moe_expert_up import moe_expert_up

_NAME = "diffulex::moe_expert_up_shared"


def _validate(
    hidden_TH: Tensor, shared_TD: Tensor, shared_w1_SD: Tensor, shared_w3_SD: Tensor | None, act: str
) -> None:
    check_rank(_NAME, "shared_hidden [T, D]", shared_TD, 2)
    check_rank(_NAME, "shared_w1 [S, D]", shared_w1_SD, 2)
    check_same(_NAME, ("hidden", hidden_TH), ("shared_hidden", shared_TD))
    check_same(_NAME, ("hidden", hidden_TH), ("shared_w1", shared_w1_SD))
    check_size(_NAME, "rows of shared_hidden = T", shared_TD.shape[0], hidden_TH.shape[0])
    check_size(_NAME, "D of shared_hidden", shared_TD.shape[1], shared_w1_SD.shape[1])
    if is_gated(act) != (shared_w3_SD is not None):
        raise MoEOptionError.of(
            _NAME,
            expected="shared_w3 exactly where the activation reads u",
            got=f"act={act!r} and {'no ' if shared_w3_SD is None else ''}shared_w3",
            hint="Pass the up projection of the shared expert as shared_w3, or an ungated activation.",
        )
    if shared_w3_SD is not None:
        check_rank(_NAME, "shared_w3 [S, D]", shared_w3_SD, 2)
        check_same(_NAME, ("hidden", hidden_TH), ("shared_w3", shared_w3_SD))
        check_size(_NAME, "S of shared_w3", shared_w3_SD.shape[0], shared_w1_SD.shape[0])
        check_size(_NAME, "D of shared_w3", shared_w3_SD.shape[1], shared_w1_SD.shape[1])


def shared_expert_up(shared_TD: Tensor, shared_w1_SD: Tensor, shared_w3_SD: Tensor | None, *, act: str) -> Tensor:
    """act(x @ w1.T, x @ w3.T) [T, S] of x [T, D], w1 and w3 [S, D] in one floating dtype; act in at least fp32."""
    wide = torch.float64 if shared_TD.dtype == torch.float64 else torch.float32
    gate_TS = (shared_TD @ shared_w1_SD.t()).to(wide)
    up_TS = gate_TS if shared_w3_SD is None else (shared_TD @ shared_w3_SD.t()).to(wide)
    return evaluate(act, gate_TS, up_TS).to(shared_TD.dtype)


def _composite(
    hidden_TH: Tensor,
    w13_EJH: Tensor,
    b13_EJ: Tensor | None,
    order_N: Tensor,
    offsets_E1: Tensor,
    shared_hidden_TD: Tensor,
    shared_w1_SD: Tensor,
    shared_w3_SD: Tensor | None,
    top_k: int,
    act: str,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    act_NI = moe_expert_up(hidden_TH, w13_EJH, b13_EJ, order_N, offsets_E1, top_k, act, interleaved)
    _validate(hidden_TH, shared_hidden_TD, shared_w1_SD, shared_w3_SD, act)
    return act_NI, shared_expert_up(shared_hidden_TD, shared_w1_SD, shared_w3_SD, act=act)


moe_expert_up_shared = register_composite("moe_expert_up_shared", _composite)
