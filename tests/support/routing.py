"""Which experts each token was sent to: recorded from a model's routers, to tell rounding from a changed choice.

A near tie between two experts falls either way in 16-bit arithmetic, and the token's output then differs by far more
than rounding. Errors are compared on tokens that every run routed alike; how many were not is bounded separately.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RoutingRecorder:
    """Forward hooks on the routers of a model; `ids` holds the expert ids [T, K] of the last forward by router name."""

    def __init__(self, model: nn.Module) -> None:
        self.ids: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if name.endswith((".gate", ".router")):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            self.ids[name] = output[-1]

        return record

    def chosen(self) -> Tensor:
        """Sorted ids [T, routers * K] of the last forward."""
        return torch.cat([ids.long().sort(dim=-1).values for ids in self.ids.values()], dim=-1)


def routed_alike(*recorders: RoutingRecorder) -> Tensor:
    """Tokens [T], bool, that all models sent to the same experts in every layer."""
    first, *others = (recorder.chosen() for recorder in recorders)
    return torch.stack([(first == other).all(dim=-1) for other in others]).all(dim=0)
