"""`diffulex::_expert_gemm_specialized`: an expert GEMM whose kernel no template of Inductor's can hold.

Private to compiled graphs, which call it in the place of `moe_expert_up` and `moe_expert_down` once these have been
lowered; so it has neither a gradient nor a kernel on a CPU. The schedule is the compiler's, as whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activation import intermediate_size
from ._launch import launcher
from ._library import LIBRARY, NAMESPACE

_NAME = "_expert_gemm_specialized"

LIBRARY.define(
    f"{_NAME}(Tensor a, Tensor weight, Tensor order, Tensor offsets,"
    " str act, bool up, bool unread, int[] schedule) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


def _cuda(
    a: Tensor,
    weight_EYX: Tensor,
    order_N: Tensor,
    offsets_E1: Tensor,
    act: str,
    up: bool,
    unread: bool,
    schedule: Sequence[int],
) -> Tensor:
    return launcher().expert_gemm_specialized(
        a, weight_EYX, order_N, offsets_E1, act=act, up=up, unread=unread, schedule=schedule
    )


def _fake(
    a: Tensor,
    weight_EYX: Tensor,
    order_N: Tensor,
    offsets_E1: Tensor,
    act: str,
    up: bool,
    unread: bool,
    schedule: Sequence[int],
) -> Tensor:
    width = weight_EYX.shape[1]
    return a.new_empty(order_N.shape[0], intermediate_size(act, width) if up else width)


LIBRARY.impl(_NAME, _cuda, "CUDA")
torch.library.register_fake(f"{NAMESPACE}::{_NAME}", _fake, lib=LIBRARY)
expert_gemm_specialized = torch.ops.diffulex._expert_gemm_specialized.default
