"""Runs the tiny model of one family eagerly, in float64 and under `torch.compile`, and writes down what came of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowering.report import Decision, collect
from lowering.state import disabled

from ..cli.accuracy import ErrorRatio, Oracle, error_ratio
from ..cli.measure import DynamoCounts, dynamo_counts, reset_dynamo
from ..explanation import LayerReport, find_experts, make_report
from .build import build_model, inputs_of, is_installed, output_of
from .catalogue import Family

COUNTS = (1, 2, 3, 7, 16, 33, 64, 128, 129, 255, 512)
QUICK_COUNTS = (1, 33)
MOST_GRAPHS = 3
_UP = ("lower", "moe_expert_up")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One module of experts: the ops it runs (none where it is not captured), why it is not captured, and what became
    of its router.
    """

    name: str
    ops: tuple[str, ...]
    reason: str = ""
    router: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of one family.

    adapted  whether `diffulex.adapt` changed the model
    error    against float64 as a multiple of eager's, None where the model could not be run
    stock    graphs and breaks without diffulex, counted where a graph breaks or there are many
    problem  what was raised, where there are no figures; `stock_fails`: by the stock model in eager mode
    seconds  of this process's CPUs
    """

    family: Family
    counts: tuple[int, ...]
    adapted: bool = False
    error: ErrorRatio | None = None
    dynamo: DynamoCounts | None = None
    stock: DynamoCounts | None = None
    layers: tuple[Layer, ...] = ()
    installed: bool = True
    problem: str = ""
    stock_fails: bool = False
    seconds: float = 0.0


def splits(dynamo: DynamoCounts) -> int:
    """In how many places a model was split: graph breaks, and frames that Dynamo gave up."""
    return max(dynamo.breaks, dynamo.pieces - 1)


def measure(family: Family, counts: Sequence[int] = COUNTS, *, codegen: bool = False) -> Row:
    """The row of a family. `codegen`: let Inductor generate code, instead of running the rewritten graphs."""
    if not is_installed(family):
        return Row(family, tuple(counts), installed=False)
    row, started = Row(family, tuple(counts)), time.process_time()
    model, problem = _attempt(lambda: build_model(family))
    if problem:
        return dataclasses.replace(row, problem=f"the model cannot be built: {problem}")
    stock, problem = _attempt(lambda: _run_stock(model, family, counts=counts))
    if problem:
        return dataclasses.replace(row, problem=f"stock eager fails: {problem}", stock_fails=True)
    measured, problem = _attempt(lambda: _measured(row, stock, codegen=codegen))
    reset_dynamo()
    if problem:
        return dataclasses.replace(row, problem=problem)
    return dataclasses.replace(measured, seconds=round(time.process_time() - started, 1))


def _attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """(what it returns, "") or (None, what it raised): a table has a row for that, and goes on."""
    try:
        result, problem = function(), ""
    except Exception as error:
        result, problem = None, " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return result, problem


@dataclasses.dataclass(frozen=True)
class _Stock:
    """A model, what it is called with, and its outputs in eager mode and in float64."""

    model: Any
    inputs: list[dict[str, Any]]
    eager: list[Tensor]
    exact: list[Tensor]


def _run_stock(model: Any, family: Family, *, counts: Sequence[int]) -> _Stock:
    inputs = [inputs_of(family, model, count=count) for count in counts]
    oracle = Oracle(model)
    exact = [oracle(lambda given: output_of(oracle.model(**given)), given) for given in inputs]
    return _Stock(model, inputs, _run(model, inputs), exact)


def _measured(row: Row, stock: _Stock, *, codegen: bool) -> Row:
    from .. import adapt

    model, refused = stock.model, {}
    if row.family.adapt:
        report = adapt(model)
        row = dataclasses.replace(row, adapted=bool(report.adapted))
        refused = {layer.name: str(layer.reason) for layer in report.refused}
    ours = _compile(model, stock.inputs, codegen=codegen)
    row = dataclasses.replace(
        row,
        error=error_ratio(ours.outputs, stock.eager, oracle=stock.exact),
        dynamo=ours.dynamo,
        layers=_layers(model, ours, refused),
    )
    if not splits(ours.dynamo) and ours.dynamo.graphs <= MOST_GRAPHS:
        return row
    adapt(model, undo=True)
    with disabled():
        return dataclasses.replace(row, stock=_compile(model, stock.inputs, codegen=codegen).dynamo)


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """What a compiled model returned, what was decided of each graph, and up projections that a run went through."""

    outputs: list[Tensor]
    dynamo: DynamoCounts
    graphs: list[list[Decision]]
    ups: int


def _run(model: Any, inputs: Sequence[dict[str, Any]]) -> list[Tensor]:
    with torch.no_grad():
        return [output_of(model(**given)) for given in inputs]


def _compile(model: Any, inputs: Sequence[dict[str, Any]], *, codegen: bool) -> _Compiled:
    """Run the compiled model on all inputs, and keep what was decided about each graph."""
    from torch._inductor.compile_fx import compile_fx

    from lowering.inductor.interpret import backend_with, rewrite

    inner = compile_fx if codegen else backend_with(rewrite)
    graphs: list[list[Decision]] = []
    passed = 0

    def backend(graph: Any, example_inputs: Any) -> Any:
        with collect() as decisions:
            compiled = inner(graph, example_inputs)
        graphs.append(decisions)
        ups = sum((decision.stage, decision.subject) == _UP for decision in decisions)

        def run(*args: Any) -> Any:
            nonlocal passed
            passed += ups
            return compiled(*args)

        return run

    reset_dynamo()
    compiled, outputs, runs = torch.compile(model, backend=backend), [], []
    for given in inputs:
        before = passed
        outputs += _run(compiled, [given])
        runs.append(passed - before)
    return _Compiled(outputs, dynamo_counts(), graphs, min(runs))


def _layers(model: nn.Module, compiled: _Compiled, refused: dict[str, str]) -> tuple[Layer, ...]:
    """The modules of experts, each with what it runs in all graphs; where none breaks, it has to run in every graph.

    Frames behind breaks do not know the names of their modules, and serve all alike. There it counts whether each run
    went through as many up projections as there are modules.
    """
    known, broken = find_experts(model), splits(compiled.dynamo)
    whole = _by_name(model, [decision for decisions in compiled.graphs for decision in decisions])
    graphs = [_by_name(model, decisions) for decisions in compiled.graphs]
    nameless = {op for name, layer in whole.items() if name not in known for op in layer.stages}
    found = []
    for name, layer in whole.items():
        ops, reason = set(layer.stages), "" if layer.captured else refused.get(name, layer.reason or "")
        missing = sum(name not in graph or not graph[name].captured for graph in graphs)
        if broken and name not in known:
            continue
        if broken and compiled.ups >= len(known):
            ops, reason = ops | nameless, ""
        elif layer.captured and missing and not broken:
            reason = f"not captured in {missing} of {len(graphs)} graphs"
        found.append(Layer(name, () if reason else tuple(sorted(ops)), reason, layer.router))
    names = {layer.name for layer in found}
    return (*found, *(Layer(name, (), reason) for name, reason in refused.items() if name not in names))


def _by_name(model: nn.Module, decisions: list[Decision]) -> dict[str, LayerReport]:
    return {layer.name: layer for layer in make_report(model, decisions, graphs=0, breaks=0).layers}
