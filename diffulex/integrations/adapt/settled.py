"""Routers that convert their own Linear in every forward, as Switch Transformers and NLLB-MoE do: nothing is left to
convert after the first, but older releases of Dynamo do not trace the attempt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .form import Adapted, adapted_class


class SettledLinear(Adapted):
    """A Linear that is asked for a dtype it has."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself where it has the dtype already; else what `nn.Module.to` does."""
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.dtype) and self._has(args[0]):
            return self
        return super().to(*args, **kwargs)

    def _has(self, dtype: torch.dtype) -> bool:
        return self.weight.dtype == dtype and (self.bias is None or self.bias.dtype == dtype)


def settle_routers(block: nn.Module) -> None:
    """Swap the `classifier` of the routers among a block's children, where experts beside them were adapted."""
    for child in block.children():
        classifier = getattr(child, "classifier", None)
        if type(classifier) is nn.Linear and isinstance(getattr(child, "dtype", None), torch.dtype):
            classifier.__class__ = adapted_class(SettledLinear, nn.Linear, options=None)
