"""Every decision of the compiler leaves a record here; `explain` and the logger read them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

from .errors import Reason

logger = logging.getLogger("diffulex")
OWN_KERNEL = "the op's own kernel"


@dataclasses.dataclass(frozen=True)
class Decision:
    """One decision: `stage` is recognise, plan or lower; `subject` a pass or an op; `reason` says why not.

    A generated kernel has a reason where it is not the one that the plan would have had.
    """

    stage: str
    subject: str
    layer: str
    outcome: str
    reason: Reason | None = None

    @property
    def kernel_refusal(self) -> Reason | None:
        """Why an op got no generated kernel, or None."""
        return self.reason if self.outcome == OWN_KERNEL else None


_lock = threading.Lock()
_collectors: list[list[Decision]] = []


def record(stage: str, subject: str, *, layer: str, outcome: str, reason: Reason | None = None) -> None:
    """Log a decision and hand it to every open `collect()`."""
    decision = Decision(stage, subject, layer, outcome, reason)
    logger.debug("%s %s %s: %s%s", stage, subject, layer, outcome, f" ({reason})" if reason else "")
    with _lock:
        for collector in _collectors:
            collector.append(decision)


@contextlib.contextmanager
def collect() -> Iterator[list[Decision]]:
    """The decisions made inside the block, in order."""
    collector: list[Decision] = []
    with _lock:
        _collectors.append(collector)
    try:
        yield collector
    finally:
        with _lock:
            _collectors[:] = [other for other in _collectors if other is not collector]


def layer_of(node: Any) -> str:
    """Qualified name of the module an FX node comes from ("model.layers.0.mlp.experts"), or "" where unknown.

    A node of the backward comes from the module of its forward.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0].replace("._modules", "")
    path = re.sub(r"^(L\['\w+'\](\[\d+\])?|self)", "", path)  # the local name the module was called by
    return re.sub(r"\['?(\w+)'?\]", r".\1", path).lstrip(".")
