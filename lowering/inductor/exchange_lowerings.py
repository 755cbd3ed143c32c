"""Lowerings of exchanges between ranks: the ops themselves, whose tokens do not keep alive what came before."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import lowering
from torch.utils._ordered_set import OrderedSet

from ..ops._library import FOLLOWING_OPS


def register_exchanges() -> None:
    """Register the lowerings of all `FOLLOWING_OPS` that have none yet."""
    for name in sorted(FOLLOWING_OPS):
        namespace, op = name.split("::")
        overload = getattr(getattr(torch.ops, namespace), op).default
        if overload not in lowering.lowerings:
            lowering.register_lowering(overload, type_promotion_kind=None)(_lowered(overload))


def _lowered(overload: Any) -> Any:
    call = lowering.fallback_handler(overload, add_to_fallback_set=False)

    def lowered(*args: Any, **kwargs: Any) -> Any:
        results = call(*args, **kwargs)
        # An output is thought to use the symbols of its kernel, and a kernel those of its inputs: so every exchange
        # would use the number of rows of each one before, and keep their rows alive to the end of the graph. A token
        # has no elements; that it comes from the kernel is order enough.
        token = results[-1].data.data
        token.get_free_symbol_uses = lambda unbacked_only=False: OrderedSet()
        return results

    return lowered
