"""The code that Inductor generates, as text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def collect_output_code() -> Iterator[list[str]]:
    """The wrappers of the graphs that are compiled or loaded inside the block, in order."""
    from torch._inductor.graph import GraphLowering  # here, not above: this loads triton

    collected: list[str] = []
    before = GraphLowering.save_output_code

    def keep(code: str) -> None:
        collected.append(code)
        if before is not None:
            before(code)

    GraphLowering.save_output_code = keep
    try:
        yield collected
    finally:
        GraphLowering.save_output_code = before
