"""Fold the pointwise gate between `moe_expert_up(act="identity")` and `moe_expert_down` into the up stage.

The subgraph becomes a formula of `lowering.activation`, evaluated on the GEMM's fp32 accumulators: the [N, J]
pre-activation is never stored. Only values that nothing else reads are folded, so training graphs, whose backward
reads them, stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.fx import Graph, Node

from .. import ops  # noqa: F401  (registers the ops that are looked up below)
from ..activation import IDENTITY
from ..errors import Reason, ReasonCode
from .dataflow import MatchError, arguments, has_shape, insert_call, is_op, require, tensor_of
from .gate_formula import FormulaReader, formula_names, half_of, simplified_formula

moe = torch.ops.diffulex

_MAX_STEPS = 200


@dataclasses.dataclass(frozen=True)
class ActivationRecord:
    """What became of the gate of one down stage: `formula` when it was folded, else `reason`."""

    down: Node
    formula: str | None = None
    reason: Reason | None = None


def activation_pass(graph: Graph, *, record: Callable[[ActivationRecord], None] | None = None) -> Graph:
    """Fold every gate that is a formula of gate and up; tell `record` about each down stage behind an identity up."""
    for down in [node for node in graph.nodes if is_op(node, moe.moe_expert_down)]:
        try:
            builder = _Builder(down)
            if builder.up is None:
                continue
            formula = builder.formula()
            _fold(graph, builder, formula)
            found = ActivationRecord(down, formula=formula)
        except MatchError as error:
            found = ActivationRecord(down, reason=error.reason)
        if record is not None:
            record(found)
    return graph


class _Builder:
    """Reads the subgraph that a down stage reads back to the identity up stage of the same slots."""

    def __init__(self, down: Node) -> None:
        self.result: Node = arguments(down)["act"]
        self.reader = FormulaReader(self._leaf)
        self.layouts: set[str] = set()
        self.up = _up_behind(self.result, offsets=arguments(down)["offsets"])

    def formula(self) -> str:
        """The formula, in canonical spelling; raises `MatchError` where there is none."""
        assert self.up is not None
        require(self.result is not self.up, "the up stage has no activation", code=ReasonCode.NOT_POINTWISE)
        text = self.reader.text(self.result)
        require(len(self.layouts) == 1, f"gate and up are split in {len(self.layouts)} ways")
        require(tensor_of(self.result).dtype == tensor_of(self.up).dtype, "the activation changes the dtype")
        rows, width_J = tensor_of(self.up).shape
        width_I = width_J if self.layouts == {"whole"} else width_J // 2
        require(has_shape(self.result, [rows, width_I]), "the activation changes the width")
        self.reader.require_private(self.result, self.up)
        formula = simplified_formula(text)
        gated = self.layouts != {"whole"}
        require(
            gated == ("u" in formula_names(formula)), "gate and up are not both used", code=ReasonCode.NOT_POINTWISE
        )
        return formula

    def _leaf(self, node: Node) -> str | None:
        """`g` or `u` where the node is the gate or the up half of the pre-activation, or all of it."""
        if node is self.up:
            self.layouts.add("whole")
            return "g"
        half = half_of(node)
        if half is None or half[0] is not self.up:
            return None
        _, layout, name, between = half
        self.layouts.add(layout)
        self.reader.inside.update(between)
        return name


def _up_behind(result: Node, *, offsets: Node) -> Node | None:
    """The identity up stage over the same offsets that the value is computed from through few steps, or None."""
    seen, waiting = {result}, [result]
    while waiting and len(seen) < _MAX_STEPS:
        node = waiting.pop(0)
        if is_op(node, moe.moe_expert_up):
            if arguments(node)["offsets"] is offsets:
                return node if arguments(node)["act"] == IDENTITY else None
            continue
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
    return None


def _fold(graph: Graph, builder: _Builder, formula: str) -> None:
    up = builder.up
    assert up is not None
    given = arguments(up)
    inputs = [given[name] for name in ("hidden", "w13", "b13", "order", "offsets", "top_k")]
    with graph.inserting_before(builder.result):
        args = (*inputs, formula, builder.layouts == {"interleaved"})
        folded = insert_call(graph, moe.moe_expert_up.default, args=args, like=up)
    builder.result.replace_all_uses_with(folded)
    graph.eliminate_dead_code()
