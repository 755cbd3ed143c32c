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


def microseconds(value: float) -> str:
    """`1766 us`, `267 us`, `5.48 us`."""
    return f"{value:.0f} us" if value >= 100 else f"{value:.3g} us"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the cost model says of one launch: `bytes` that have to be moved and `flop`, the microseconds that the
    longer of the two takes on `device` by its nominal rates, and those that the launch is predicted to take.

    `usual_us`: those of the schedule that the rows would have if results could depend on the batch; else None.
    """

    device: str
    rows: int
    bytes: float
    flop: float
    floor_us: float
    predicted_us: float
    usual_us: float | None = None

    def __str__(self) -> str:
        floor = f"floor {microseconds(self.floor_us)} ({self.floor_us / self.predicted_us:.0%})"
        told = f"predicted {microseconds(self.predicted_us)} at {self.rows} rows, {floor}"
        if self.usual_us is None:
            return told
        return f"{told}, {microseconds(self.usual_us)} by the schedule for these rows"


@dataclasses.dataclass(frozen=True)
class Decision:
    """One decision: `stage` is recognise, plan or lower; `subject` a pass or an op; `reason` says why not.

    A generated kernel has a reason where it is not the one that the plan would have had. `replayed`: it was made when
    the graph was compiled, and read back with it from a cache. `cost`: of an expert GEMM with a generated kernel.
    `measured_us`: what the profiler said of the op or the kernel, where `explain` was asked to measure.
    `kernels`: the generated kernels, which Inductor calls after the operations that they come from; from `explain`.
    """

    stage: str
    subject: str
    layer: str
    outcome: str
    reason: Reason | None = None
    replayed: bool = dataclasses.field(default=False, compare=False)
    cost: Cost | None = None
    measured_us: float | None = dataclasses.field(default=None, compare=False)
    kernels: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def kernel_refusal(self) -> Reason | None:
        """Why an op got no generated kernel, or None."""
        return self.reason if self.outcome == OWN_KERNEL else None

    @property
    def told(self) -> str:
        """The outcome with the reason and the times, where there are some."""
        told = self.outcome + (f" ({self.reason})" if self.reason is not None else "")
        told += f"; {self.cost}" if self.cost is not None else ""
        if self.measured_us is None:
            return told
        floor = f" (floor: {self.cost.floor_us / self.measured_us:.0%})" if self.cost is not None else ""
        return f"{told}; measured {microseconds(self.measured_us)}{floor}"


_lock = threading.Lock()
_collectors: list[list[Decision]] = []
_MOST_WAITING = 1 << 14  # far more than a graph has; what no graph takes must not grow without end


class _Waiting(threading.local):
    """What was decided in this thread since the last `take_decisions`: a graph is compiled by one thread."""

    def __init__(self) -> None:
        self.decisions: collections.deque[Decision] = collections.deque(maxlen=_MOST_WAITING)


_waiting = _Waiting()


def record(
    stage: str, subject: str, *, layer: str, outcome: str, reason: Reason | None = None, cost: Cost | None = None
) -> None:
    """Log a decision and hand it to every open `collect()`."""
    decision = Decision(stage, subject, layer, outcome, reason, cost=cost)
    _waiting.decisions.append(decision)
    _tell(decision)


def replay(decisions: Iterable[Decision]) -> None:
    """Log decisions that were made earlier and hand them to every open `collect()`, marked as replayed."""
    for decision in decisions:
        _tell(dataclasses.replace(decision, replayed=True))


def _tell(decision: Decision) -> None:
    mark = ", from the cache" if decision.replayed else ""
    logger.debug("%s %s %s: %s%s", decision.stage, decision.subject, decision.layer, decision.told, mark)
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


_TEXTS = ("stage", "subject", "layer", "outcome")


def _fields(decision: Decision) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(decision, name) for name in _TEXTS}
    if decision.reason is not None:
        fields["reason"] = {"code": decision.reason.code.name, "detail": decision.reason.detail}
    if decision.cost is not None:
        fields["cost"] = {name: value for name, value in dataclasses.asdict(decision.cost).items() if value is not None}
    return fields


def decisions_from_json(text: Any) -> tuple[Decision, ...]:
    """The decisions of such a text; anything else raises `ValueError`, `TypeError` or `KeyError`."""
    return tuple(map(_decision, json.loads(text)))


def _decision(fields: Any) -> Decision:
    if not isinstance(fields, dict):
        raise TypeError(f"{fields!r} is no decision")
    reason, cost = fields.get("reason"), fields.get("cost")
    stage, subject, layer, outcome = (_of_type(fields[name], str) for name in _TEXTS)
    if reason is not None:
        reason = Reason(ReasonCode[reason["code"]], _of_type(reason["detail"], str))
    if cost is not None:
        numbers = {
            name: _of_type(value, str if name == "device" else (int, float))
            for name, value in _of_type(cost, dict).items()
        }
        cost = Cost(**numbers)
    return Decision(stage, subject, layer, outcome, reason, cost=cost)


def _of_type(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is of another type than {kind}")
    return value


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
