"""Fold the pointwise gate between `moe_expert_up(act="identity")` and `moe_expert_down` into the up stage.

The subgraph becomes a formula of `lowering.activation`, evaluated on the GEMM's fp32 accumulators: the [N, J]
pre-activation is never stored. Only values that nothing else reads are folded, so training graphs, whose backward
reads them, stay as they are.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops  # noqa: F401  (registers the ops that are looked up below)
from ..activation import IDENTITY, MAX_FORMULA_LENGTH, simplify
from ..errors import MoEOptionError, Reason, ReasonCode
from .dataflow import (
    MatchError,
    arguments,
    aten,
    constant,
    describe,
    has_shape,
    insert_call,
    is_op,
    peel_casts,
    refuse,
    require,
    tensor_of,
)

moe = torch.ops.diffulex

_UNARY = {
    aten.sigmoid: "sigmoid({0})",
    aten.silu: "silu({0})",
    aten.relu: "relu({0})",
    aten.tanh: "tanh({0})",
    aten.exp: "exp({0})",
    aten.log: "log({0})",
    aten.log1p: "log1p({0})",
    aten.erf: "erf({0})",
    aten.sqrt: "sqrt({0})",
    aten.abs: "abs({0})",
    aten.neg: "-({0})",
    aten.reciprocal: "1.0 / ({0})",
    aten.square: "square({0})",
}
_BINARY = {
    aten.mul: "({0}) * ({1})",
    aten.div: "({0}) / ({1})",
    aten.maximum: "max({0}, {1})",
    aten.minimum: "min({0}, {1})",
}
_MAX_STEPS = 200
_CLAMPS = (aten.clamp, aten.clamp_min, aten.clamp_max, aten.hardtanh)


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
        self.inside: set[Node] = set()
        self.layouts: set[str] = set()
        self.texts: dict[Node, str] = {}
        self.up = _up_behind(self.result, offsets=arguments(down)["offsets"])

    def formula(self) -> str:
        """The formula, in canonical spelling; raises `MatchError` where there is none."""
        assert self.up is not None
        require(self.result is not self.up, "the up stage has no activation", code=ReasonCode.NOT_POINTWISE)
        text = self._text(self.result)
        require(len(self.layouts) == 1, f"gate and up are split in {len(self.layouts)} ways")
        require(tensor_of(self.result).dtype == tensor_of(self.up).dtype, "the activation changes the dtype")
        rows, width_J = tensor_of(self.up).shape
        width_I = width_J if self.layouts == {"whole"} else width_J // 2
        require(has_shape(self.result, [rows, width_I]), "the activation changes the width")
        for node in (self.up, *(self.inside - {self.result})):
            escaped = [user for user in node.users if user not in self.inside]
            detail = f"{describe(node)} is also read by {[describe(user) for user in escaped]}"
            require(not escaped, detail, code=ReasonCode.SHARED_USE)
        formula = _simplified(text)
        gated = self.layouts != {"whole"}
        require(gated == ("u" in _names(formula)), "gate and up are not both used", code=ReasonCode.NOT_POINTWISE)
        return formula

    def _text(self, node: Any) -> str:
        number = constant(node)
        if number is not None:
            return repr(float(number))
        require(isinstance(node, Node), f"{node!r} is not a tensor", code=ReasonCode.NOT_POINTWISE)
        if node not in self.texts:
            text = self._leaf(node) or self._read(node)
            # a value that is read twice is spelled twice
            require(len(text) <= MAX_FORMULA_LENGTH, "the formula is too long", code=ReasonCode.NOT_POINTWISE)
            self.texts[node] = text
        return self.texts[node]

    def _read(self, node: Node) -> str:
        self.inside.add(node)
        source = peel_casts(node)
        if source is not node:
            self._add_between(node, source)
            return self._text(source)
        return self._operation(node)

    def _add_between(self, node: Node, source: Node) -> None:
        while node is not source:
            self.inside.add(node)
            node = node.args[0]  # type: ignore[assignment]  # casts and copies read their first argument

    def _operation(self, node: Node) -> str:
        given = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
        for table in (_UNARY, _BINARY):
            for op, template in table.items():
                if is_op(node, op) and "rounding_mode" not in given:
                    operands = [self._text(arg) for arg in node.args[: 1 if table is _UNARY else 2]]
                    return template.format(*operands)
        if is_op(node, aten.add, aten.sub) and given.get("alpha", 1) == 1:
            sign = "+" if is_op(node, aten.add) else "-"
            return f"({self._text(node.args[0])}) {sign} ({self._text(node.args[1])})"
        if is_op(node, aten.rsub) and given.get("alpha", 1) == 1:
            return f"({self._text(node.args[1])}) - ({self._text(node.args[0])})"
        if is_op(node, aten.pow) and constant(node.args[1]) in (2, 3):
            base = self._text(node.args[0])
            return f"square({base})" if constant(node.args[1]) == 2 else f"square({base}) * ({base})"
        if is_op(node, aten.gelu):
            name = "gelu_tanh" if given["approximate"] == "tanh" else "gelu"
            return f"{name}({self._text(node.args[0])})"
        if is_op(node, *_CLAMPS):
            return self._clamp(node, given)
        return refuse(
            f"{describe(node)} is not a pointwise operation of the formula language", code=ReasonCode.NOT_POINTWISE
        )

    def _clamp(self, node: Node, given: dict[str, Any]) -> str:
        text = self._text(node.args[0])
        low, high = given.get("min", given.get("min_val")), given.get("max", given.get("max_val"))
        for name, bound in (("max", low), ("min", high)):
            if bound is not None:
                text = f"{name}({text}, {self._text(bound)})"
        return text

    def _leaf(self, node: Node) -> str | None:
        """`g` or `u` where the node is the gate or the up half of the pre-activation, or all of it."""
        if node is self.up:
            self.layouts.add("whole")
            return "g"
        half = _half_of(node)
        if half is None or half[0] is not self.up:
            return None
        _, layout, name, between = half
        self.layouts.add(layout)
        self.inside.update(between)
        return name


def _simplified(text: str) -> str:
    """The formula in one spelling; refuses what the formula language cannot hold: infinities, too deep a tree."""
    try:
        return simplify(text)
    except MoEOptionError as error:
        return refuse(f"{text[:100]!r} is not a formula: {error}", code=ReasonCode.NOT_POINTWISE)


def _names(formula: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(formula)) if isinstance(node, ast.Name)}


def _half_of(node: Node) -> tuple[Node, str, str, list[Node]] | None:
    """(source, layout, "g" or "u", nodes passed) where the node is one half of the columns of a [N, J] value."""
    if is_op(node, operator.getitem) and is_op(node.args[0], aten.split, aten.split_with_sizes):
        split: Any = node.args[0]
        source, sizes = split.args[0], split.args[1]
        if tensor_of(source).dim() != 2:
            return None
        width, half = tensor_of(source).shape[1], node.args[1]
        halves = sizes == width // 2 if isinstance(sizes, int) else list(sizes) == [width // 2] * 2
        if arguments(split)["dim"] in (1, -1) and halves and width % 2 == 0:
            return source, "halves", "gu"[half], [node, split]  # type: ignore[index]
        return None
    if not is_op(node, aten.slice):
        return None
    given = arguments(node)
    source = given["self"]
    if tensor_of(source).dim() != 2 or given["dim"] not in (1, -1):
        return None
    width = tensor_of(source).shape[1]
    if width % 2:
        return None
    start, end, step = given["start"] or 0, min(given["end"] or width, width), given["step"]
    layouts = {
        (0, width // 2, 1): ("halves", "g"),
        (width // 2, width, 1): ("halves", "u"),
        (0, width, 2): ("interleaved", "g"),
        (1, width, 2): ("interleaved", "u"),
    }
    found = layouts.get((start, end, step))
    return None if found is None else (source, *found, [node])


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
