"""What is wrong with a checkpoint: every name found wanting, in one error that stays readable."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from lowering.errors import MoECheckpointError

KINDS = 12
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def shortened(names: Iterable[str]) -> str:
    """Names that differ in layers' and experts' numbers alone as one: `layers.0.mlp.gate.weight (and 3 like it)`."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_NUMBER.sub("#", name), []).append(name)
    told = [
        found[0] if len(found) == 1 else f"{found[0]} (and {len(found) - 1} like it)"
        for found in list(kinds.values())[:KINDS]
    ]
    if len(kinds) > KINDS:
        told.append(f"and {len(kinds) - KINDS} more kinds")
    return ", ".join(told)


@dataclasses.dataclass
class Problems:
    """Names that are missing, unexpected or misshapen; the last with what was expected and what came; what to do."""

    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    misshapen: dict[str, str] = dataclasses.field(default_factory=dict)
    hint: str = ""

    def raise_if_any(self, where: str, *, form: str) -> None:
        """Raise one `MoECheckpointError` for all of them; its attributes hold every name."""
        misshapen = tuple(f"{name} {why}" for name, why in self.misshapen.items())
        found = [
            f"{len(names)} {kind}: {shortened(names)}"
            for kind, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("misshapen", misshapen),
            )
            if names
        ]
        if not found:
            return
        error = MoECheckpointError.of(
            f"checkpoint {where}",
            expected=f"the tensors of these MoE blocks in {form} form",
            got="; ".join(found),
            hint=self.hint or self._hint(),
        )
        assert isinstance(error, MoECheckpointError)
        error.missing, error.unexpected, error.misshapen = tuple(self.missing), tuple(self.unexpected), misshapen
        raise error

    def _hint(self) -> str:
        if any(re.search(r"scale|_blocks$|zeros|packed|quant", name) for name in self.unexpected):
            return "The checkpoint looks quantised; save it dequantised first."
        return "Nothing was loaded; check the model type, the layers asked for and the config of the blocks."
