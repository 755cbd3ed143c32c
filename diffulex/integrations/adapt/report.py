"""What `diffulex.adapt` changed in a model, what it did not and why, and the way back."""

from __future__ import annotations

import dataclasses

from torch import nn

from lowering.errors import Reason

from .swap import unswap


@dataclasses.dataclass(frozen=True)
class LayerAdaptation:
    """One module of experts.

    form      what it was recognised as
    reason    why it was left as it is, None if adapted
    training  why it runs its own code in training although adapted, None where it runs the ops there too
    """

    name: str
    kind: str
    form: str = ""
    reason: Reason | None = None
    training: Reason | None = None

    @property
    def adapted(self) -> bool:
        """Whether the module runs the ops now."""
        return self.reason is None

    def __str__(self) -> str:
        state = f"adapted, {self.form}" if self.adapted else f"left as it is: {self.reason}"
        if self.training is not None:
            state += f"; runs its own code in training: {self.training}"
        return f"{self.name or '(the model)'} ({self.kind}): {state}"


@dataclasses.dataclass(frozen=True)
class AdaptReport:
    """The modules of experts that were found in a model, in its order."""

    layers: tuple[LayerAdaptation, ...]
    model: nn.Module = dataclasses.field(repr=False)

    @property
    def adapted(self) -> tuple[LayerAdaptation, ...]:
        """The modules that run the ops now."""
        return tuple(layer for layer in self.layers if layer.adapted)

    @property
    def refused(self) -> tuple[LayerAdaptation, ...]:
        """The modules that were left as they are."""
        return tuple(layer for layer in self.layers if not layer.adapted)

    def undo(self) -> None:
        """Give every adapted module of the model its own class and forward back; parameters keep their values."""
        unswap(self.model)

    def __str__(self) -> str:
        counts = f"{len(self.adapted)} of {len(self.layers)} module(s) of experts adapted"
        return "\n".join([counts, *(str(layer) for layer in self.layers)])
