"""The router of the DeepSeek line: the K greatest among the experts of the best groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowering.errors import MoEOptionError
from lowering.spec import RoutingSpec

from .base import TopKRouter
from .naive import route


class GroupLimitedTopKRouter(TopKRouter):
    """Chooses among the experts of the `topk_group` best of `n_group` groups, by `diffulex::moe_route`.

    Raises `MoEOptionError` for a spec without groups, which `NaiveTopKRouter` is for.
    """

    def __init__(self, spec: RoutingSpec, num_experts: int, **factory: Any) -> None:
        super().__init__(spec, num_experts, **factory)
        if spec.n_group < 2:
            raise MoEOptionError.of(
                "GroupLimitedTopKRouter",
                expected="a spec with n_group > 1",
                got=f"n_group={spec.n_group}",
                hint="Use NaiveTopKRouter, or build_topk_router('triton', ...), which picks the class.",
            )

    def choose(self, logits_TE: Tensor, ids_TK: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights [T, K + n_shared] fp32 and ids of the same shape int32, for logits [T, E] and ids [T, K] int."""
        return route(self, logits_TE, ids_TK)
