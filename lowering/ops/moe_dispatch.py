"""`diffulex::moe_dispatch`: the slots in expert order, by a stable counting sort."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import MoERangeError, MoEShapeError
from ._checks import check_int, check_rank
from ._library import register

_NAME = "diffulex::moe_dispatch"
_INT32_MAX = 2**31 - 1
_Slots = tuple[Tensor, Tensor, Tensor]
Constants = dict[str, int | float | bool | str]


def _validate(ids_TK: Tensor, num_experts: int) -> None:
    check_rank(_NAME, "ids [T, K]", ids_TK, 2)
    check_int(_NAME, "ids", ids_TK)
    num_tokens, top_k = ids_TK.shape
    if isinstance(top_k, int) and top_k == 0:
        raise MoEShapeError.of(
            _NAME,
            expected="ids [T, K] with K >= 1",
            got=f"shape {tuple(ids_TK.shape)}",
            hint="Pass the ids of moe_route.",
        )
    if not 0 < num_experts < _INT32_MAX:
        raise MoERangeError.of(
            _NAME,
            expected="num_experts >= 1",
            got=f"num_experts={num_experts}",
            hint="Pass the number of experts of the layer.",
        )
    if isinstance(num_tokens, int) and num_tokens * top_k > _INT32_MAX:
        raise MoERangeError.of(
            _NAME,
            expected="fewer than 2**31 slots",
            got=f"T*K = {num_tokens * top_k}",
            hint="Split the batch: slots are numbered in int32.",
        )


def _cpu(ids_TK: Tensor, num_experts: int) -> _Slots:
    _validate(ids_TK, num_experts)
    top_k = ids_TK.shape[1]
    ids_N = ids_TK.numpy().reshape(-1)
    unsigned_N = ids_N.view(np.uint32 if ids_N.dtype == np.int32 else np.uint64)  # negative ids become huge ones
    narrow = np.int16 if num_experts <= np.iinfo(np.int16).max else np.int32
    expert_N = np.minimum(unsigned_N, num_experts, dtype=unsigned_N.dtype).astype(narrow)
    order_N = expert_N.argsort(kind="stable")  # a radix sort for 16-bit keys, several times faster than torch.sort
    offsets_E1 = expert_N[order_N].searchsorted(np.arange(num_experts + 1, dtype=narrow)).astype(np.int32)
    order_N = order_N.astype(np.int32)
    token_N = order_N // np.int32(top_k)
    return torch.from_numpy(order_N), torch.from_numpy(token_N), torch.from_numpy(offsets_E1)


def dispatch_schedule(slots: int) -> tuple[Constants, int]:
    """Constants of `moe_dispatch.jinja` and num_warps for about `slots` = T*K slots; right for any number of them.

    ROWS * STEPS * 32 slots are sorted in one reading of the ids, more in two.
    """
    if slots <= 1024:
        return {"ROWS": 16, "STEPS": 8}, 4
    if slots <= 32768:
        return {"ROWS": 64, "STEPS": 16}, 16
    return {"ROWS": 128, "STEPS": 32}, 16


def dispatch_constants(num_experts: int, top_k: int) -> Constants:
    """Constants of `moe_dispatch.jinja` that follow from the problem: ids [T, top_k] int, experts 0 to E-1."""
    return {"NUM_EXPERTS": num_experts, "TOP_K": top_k, "ACC_TYPE": "tl.int32"}


def _cuda(ids_TK: Tensor, num_experts: int) -> _Slots:
    from ..templates import standalone
    from ..templates.render import template_text

    _validate(ids_TK, num_experts)
    num_tokens, top_k = ids_TK.shape
    order_N, token_N = (ids_TK.new_empty(num_tokens * top_k, dtype=torch.int32) for _ in range(2))
    offsets_E1 = ids_TK.new_empty(num_experts + 1, dtype=torch.int32)
    schedule, num_warps = dispatch_schedule(num_tokens * top_k)
    standalone.launch(
        template_text("moe_dispatch"),
        {"IDS": ids_TK.contiguous(), "ORDER": order_N, "TOKEN": token_N, "OUT": offsets_E1},
        name="moe_dispatch",
        constants=dispatch_constants(num_experts, top_k) | schedule,
        grid=(num_experts + 1,),
        num_warps=num_warps,
        num_stages=1,
    )
    return order_N, token_N, offsets_E1


def _fake(ids_TK: Tensor, num_experts: int) -> _Slots:
    _validate(ids_TK, num_experts)
    slots = ids_TK.shape[0] * ids_TK.shape[1]
    order_N, token_N = (ids_TK.new_empty(slots, dtype=torch.int32) for _ in range(2))
    return order_N, token_N, ids_TK.new_empty(num_experts + 1, dtype=torch.int32)


moe_dispatch = register("moe_dispatch", cpu=_cpu, cuda=_cuda, fake=_fake)
