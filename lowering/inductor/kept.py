"""Decisions are kept with the graphs that Inductor's caches hold: on a warm start no pass and no lowering runs.

They are an attribute of Inductor's own record of a compiled graph, as JSON, so they are written, guarded, evicted and
carried to other machines with the code they are about; one cache key may stand for several graphs with guards of
their own, so no file beside the cache could say which it is about. What is loaded is the text alone, no class of ours.

A graph that is the same as another one but for the names of its modules has that one's entry. Where the passes have
run for it, their names are the graph's own and stand for those of the entry; else the entry's are told.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch._logging import trace_structured

from ..report import Decision, decisions_from_json, decisions_to_json, logger, replay, take_decisions

ATTRIBUTE = "_diffulex_decisions"
ARTIFACT = "diffulex_report"  # the name that tlparse shows
_PASS_STAGE = "recognise"


def keep_decisions(module: ModuleType) -> None:
    """Have each compiled graph keep the decisions about it, and tell them again when a cache gives it back.

    `module` is `torch._inductor.output_code`. A graph is made once, where it is compiled, and finished once in every
    process, also where it was loaded. Where this Inductor has another such class, compiling goes on without it.
    """
    graph_class = getattr(module, "CompiledFxGraph", None)
    if graph_class is None or not hasattr(graph_class, "post_compile"):
        logger.warning("this torch keeps its compiled graphs otherwise: on a warm start no decisions are told")
        return
    stock_init, stock_finish = graph_class.__init__, graph_class.post_compile
    made_here: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    @functools.wraps(stock_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        made_here[id(self)] = self
        decisions = take_decisions()
        if decisions:
            setattr(self, ATTRIBUTE, decisions_to_json(decisions))

    @functools.wraps(stock_finish)
    def finish(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock_finish(self, *args, **kwargs)
        text = vars(self).get(ATTRIBUTE)
        if made_here.get(id(self)) is self:
            _trace(text, replayed=False)
        else:
            _replay(text, take_decisions())
        return result

    graph_class.__init__, graph_class.post_compile = init, finish


def _trace(text: str | None, *, replayed: bool) -> None:
    if text is None:
        return
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": ARTIFACT, "encoding": "json"},
        payload_fn=lambda: f'{{"replayed": {json.dumps(replayed)}, "decisions": {text}}}',
    )


def _replay(text: Any, seen: Sequence[Decision]) -> None:
    """Tell what a loaded graph says; `seen` is what the passes decided for it in this process, if they ran."""
    if text is None:
        return
    try:
        kept = decisions_from_json(text)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        _warn_once(f"{type(error).__name__}: {error}")
        return
    _trace(text, replayed=True)
    if seen:  # these were told when they were made
        kept = tuple(decision for decision in _renamed(kept, seen) if decision.stage != _PASS_STAGE)
    replay(kept)


def _renamed(kept: Sequence[Decision], seen: Sequence[Decision]) -> Sequence[Decision]:
    """`kept` with the names of the modules that were seen, where both say the same of them one by one."""
    before = [decision for decision in kept if decision.stage == _PASS_STAGE]
    if [(d.subject, d.outcome, d.reason) for d in before] != [(d.subject, d.outcome, d.reason) for d in seen]:
        return kept
    names = {old.layer: new.layer for old, new in zip(before, seen, strict=True)}
    return [dataclasses.replace(decision, layer=names.get(decision.layer, decision.layer)) for decision in kept]


@functools.cache
def _warn_once(problem: str) -> None:
    logger.warning("decisions of a compiled graph in the cache are not told, they cannot be read: %s", problem)
