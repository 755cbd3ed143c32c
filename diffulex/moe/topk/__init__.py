"""Routers: from logits to weights and expert ids, for every `RoutingSpec`."""

from __future__ import annotations

from typing import Any

from lowering.errors import MoEOptionError
from lowering.spec import RoutingSpec

from .base import TopKRouter
from .group_limited import GroupLimitedTopKRouter
from .naive import NaiveTopKRouter
from .output import TopKOutput

ROUTER_IMPLS = ("triton", "naive", "group_limited", "reference")

__all__ = [
    "ROUTER_IMPLS",
    "GroupLimitedTopKRouter",
    "NaiveTopKRouter",
    "TopKOutput",
    "TopKRouter",
    "build_topk_router",
]


def build_topk_router(impl: str, spec: RoutingSpec, num_experts: int, **factory: Any) -> TopKRouter:
    """The router of a spec; `factory` is `device` and `dtype` of its parameters.

    impl   "triton": `GroupLimitedTopKRouter` where the spec has groups, else `NaiveTopKRouter`;
           "naive", "group_limited": that class alone; "reference": a loop over tokens

    Raises `MoEOptionError` for another name or a class that is not for this spec, `MoERangeError` for a spec that has
    no meaning for `num_experts`.
    """
    if impl == "triton":
        impl = "group_limited" if spec.n_group > 1 else "naive"
    if impl == "naive":
        return NaiveTopKRouter(spec, num_experts, **factory)
    if impl == "group_limited":
        return GroupLimitedTopKRouter(spec, num_experts, **factory)
    if impl == "reference":
        from .reference import ReferenceTopKRouter  # loads Dynamo, to be kept out of graphs

        return ReferenceTopKRouter(spec, num_experts, **factory)
    raise MoEOptionError.of(
        "build_topk_router", expected=f"impl in {ROUTER_IMPLS}", got=repr(impl), hint="Use 'triton' where in doubt."
    )
