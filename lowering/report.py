"""Every decision of the compiler leaves a record here; `explain` and the logger read them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from .errors import Reason, ReasonCode

logger = logging.getLogger("diffulex")
OWN_KERNEL = "the op's own kernel"


@dataclasses.dataclass(frozen=True)
class Decision:
    """One decision: `stage` is recognise, plan or lower; `subject` a pass or an op; `reason` says why not.

    A generated kernel has a reason where it is not the one that the plan would have had. `replayed`: it was made when
    the graph was compiled, and read back with it from a cache.
    """

    stage: str
    subject: str
    layer: str
    outcome: str
    reason: Reason | None = None
    replayed: bool = dataclasses.field(default=False, compare=False)

    @property
    def kernel_refusal(self) -> Reason | None:
        """Why an op got no generated kernel, or None."""
        return self.reason if self.outcome == OWN_KERNEL else None


_lock = threading.Lock()
_collectors: list[list[Decision]] = []
_MOST_WAITING = 1 << 14  # far more than a graph has; what no graph takes must not grow without end


class _Waiting(threading.local):
    """What was decided in this thread since the last `take_decisions`: a graph is compiled by one thread."""

    def __init__(self) -> None:
        self.decisions: collections.deque[Decision] = collections.deque(maxlen=_MOST_WAITING)


_waiting = _Waiting()


def record(stage: str, subject: str, *, layer: str, outcome: str, reason: Reason | None = None) -> None:
    """Log a decision and hand it to every open `collect()`."""
    decision = Decision(stage, subject, layer, outcome, reason)
    _waiting.decisions.append(decision)
    _tell(decision)


def replay(decisions: Iterable[Decision]) -> None:
    """Log decisions that were made earlier and hand them to every open `collect()`, marked as replayed."""
    for decision in decisions:
        _tell(dataclasses.replace(decision, replayed=True))


def _tell(decision: Decision) -> None:
    told = f"{decision.outcome}{f' ({decision.reason})' if decision.reason else ''}"
    mark = ", from the cache" if decision.replayed else ""
    logger.debug("%s %s %s: %s%s", decision.stage, decision.subject, decision.layer, told, mark)
    with _lock:
        for collector in _collectors:
            collector.append(decision)


def take_decisions() -> tuple[Decision, ...]:
    """What `record` was given in this thread since the last call."""
    taken = tuple(_waiting.decisions)
    _waiting.decisions.clear()
    return taken


def decisions_to_json(decisions: Iterable[Decision]) -> str:
    """The decisions as text that `decisions_from_json` reads."""
    return json.dumps([_fields(decision) for decision in decisions])


def _fields(decision: Decision) -> dict[str, Any]:
    fields = {name: getattr(decision, name) for name in _TEXTS}
    reason = decision.reason
    return fields if reason is None else fields | {"reason": {"code": reason.code.name, "detail": reason.detail}}


_TEXTS = ("stage", "subject", "layer", "outcome")


def decisions_from_json(text: Any) -> tuple[Decision, ...]:
    """The decisions of such a text; anything else raises `ValueError`, `TypeError` or `KeyError`."""
    return tuple(map(_decision, json.loads(text)))


def _decision(fields: dict[str, Any]) -> Decision:
    reason = fields.get("reason") if isinstance(fields, dict) else None
    texts = [fields[name] for name in _TEXTS] + ([] if reason is None else [reason["code"], reason["detail"]])
    if not all(isinstance(value, str) for value in texts):
        raise TypeError(f"{fields!r} is no decision")
    why = None if reason is None else Reason(ReasonCode[reason["code"]], reason["detail"])
    stage, subject, layer, outcome = texts[: len(_TEXTS)]
    return Decision(stage, subject, layer, outcome, why)


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
