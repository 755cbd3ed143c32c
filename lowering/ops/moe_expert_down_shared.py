"""`diffulex::moe_expert_down_shared`: the down stage of routed experts and, beside it, that of a shared expert."""

from __future__ import annotations

from torch import Tensor

from .._checks import check_rank, check_same, check_size
from ._library import register_composite
from .moe_expert_down import moe_expert_down

_NAME = "diffulex::moe_expert_down_shared"


def _composite(
    act_NI: Tensor,
    w2_EHI: Tensor,
    b2_EH: Tensor | None,
    order_N: Tensor,
    offsets_E1: Tensor,
    shared_TS: Tensor,
    shared_w2_DS: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    slots_NH = moe_expert_down(act_NI, w2_EHI, b2_EH, order_N, offsets_E1)
    check_rank(_NAME, "shared [T, S]", shared_TS, 2)
    check_rank(_NAME, "shared_w2 [D, S]", shared_w2_DS, 2)
    check_same(_NAME, ("act", act_NI), ("shared", shared_TS))
    check_same(_NAME, ("act", act_NI), ("shared_w2", shared_w2_DS))
    check_size(_NAME, "rows of order = T*K", order_N.shape[0], shared_TS.shape[0] * top_k)
    check_size(_NAME, "S of shared", shared_TS.shape[1], shared_w2_DS.shape[1])
    return slots_NH, shared_TS @ shared_w2_DS.t()


moe_expert_down_shared = register_composite("moe_expert_down_shared", _composite)
