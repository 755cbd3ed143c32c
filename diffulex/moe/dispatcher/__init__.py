"""Token dispatchers: how tokens reach the ranks of their experts, and the results their tokens; one file a backend."""

from __future__ import annotations

from typing import Any

from lowering.errors import MoEOptionError

from ...distributed.parallel import DISPATCHERS
from .base_dispatcher import DispatcherOutput, ExchangePlan, TokenDispatcher

__all__ = ["DispatcherOutput", "ExchangePlan", "TokenDispatcher", "build_token_dispatcher"]


def build_token_dispatcher(backend: str, plan: ExchangePlan) -> TokenDispatcher[Any]:
    """The dispatcher of a backend: "naive" (exact splits), "static" (static shapes, no host sync) or "deepep".

    Raises `MoEOptionError` for another one, `MoEUnsupportedError` where DeepEP is absent or cannot do what the plan
    says.
    """
    if backend == "naive":
        from .naive_dispatcher import NaiveA2ADispatcher

        return NaiveA2ADispatcher(plan)
    if backend == "static":
        from .static_dispatcher import StaticDispatcher

        return StaticDispatcher(plan)
    if backend == "deepep":
        from .deepep_dispatcher import DeepEPDispatcher

        return DeepEPDispatcher(plan)
    raise MoEOptionError.of(
        "build_token_dispatcher",
        expected=f"backend in {DISPATCHERS}",
        got=repr(backend),
        hint="'naive' is the reference.",
    )
