"""The router of most models: scores, perhaps a bias, the K greatest."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowering import ops
from lowering.errors import MoEOptionError
from lowering.spec import RoutingSpec

from .base import TopKRouter


def route(router: TopKRouter, logits_TE: Tensor, ids_TK: Tensor | None) -> tuple[Tensor, Tensor]:
    """`diffulex::moe_route` with the parameters of a router: logits [T, E] floating, ids [T, K] int or None.

    Returns weights [T, K + n_shared] fp32 (fp64 for fp64 logits) and ids of the same shape int32.
    """
    spec, bias_E, scale_E = router.spec, router.correction_bias, router.per_expert_scale
    return ops.moe_route(logits_TE, bias_E, ids_TK, *spec.op_args(), scale_E)


class NaiveTopKRouter(TopKRouter):
    """Chooses among all experts at once, by `diffulex::moe_route`.

    Raises `MoEOptionError` for a spec with groups, which `GroupLimitedTopKRouter` is for.
    """

    def __init__(self, spec: RoutingSpec, num_experts: int, **factory: Any) -> None:
        super().__init__(spec, num_experts, **factory)
        if spec.n_group > 1:
            raise MoEOptionError.of(
                "NaiveTopKRouter",
                expected="a spec without groups",
                got=f"n_group={spec.n_group}",
                hint="Use GroupLimitedTopKRouter, or build_topk_router('triton', ...), which picks the class.",
            )

    def choose(self, logits_TE: Tensor, ids_TK: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights [T, K + n_shared] fp32 and ids of the same shape int32, for logits [T, E] and ids [T, K] int."""
        return route(self, logits_TE, ids_TK)
