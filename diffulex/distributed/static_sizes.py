"""Tables of a layer whose sizes never change, for code that is compiled with `dynamic=True`."""

from __future__ import annotations

import weakref
from types import ModuleType

from torch import Tensor

from lowering.after_import import after_import


def mark_static(*tables: Tensor) -> None:
    """Have Dynamo take all sizes of these tensors, of any shape [R, E] and dtype, for constants.

    Parameters are so; of another tensor a size that equals the number of tokens of the first call would be taken for
    that. Marked when Dynamo is imported, which takes a second that eager mode does without.
    """
    for table in tables:
        alive = weakref.ref(table)

        def mark(dynamo: ModuleType, alive: weakref.ref[Tensor] = alive) -> None:
            marked = alive()
            if marked is not None:
                dynamo.mark_static(marked)

        after_import("torch._dynamo", mark)
