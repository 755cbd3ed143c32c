"""Read a pointwise subgraph as a formula of `lowering.activation`: what stands between the products of an expert."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..activation import MAX_FORMULA_LENGTH, simplify
from ..errors import MoEOptionError, ReasonCode
from .dataflow import (
    VIEWS,
    arguments,
    aten,
    cast_source,
    constant,
    describe,
    is_last_dim,
    is_op,
    peel_casts,
    peel_copies,
    peel_views,
    refuse,
    require,
    tensor_of,
)

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
_CLAMPS = (aten.clamp, aten.clamp_min, aten.clamp_max, aten.hardtanh)


class FormulaReader:
    """Reads values back to leaves, the nodes that `leaf` names "g" or "u"; `inside` are the nodes that were passed.

    views: rows may be split and joined on the way ([B, L, S] against [T, S]), which a pointwise formula does not see.
    """

    def __init__(self, leaf: Callable[[Node], str | None], *, views: bool = False) -> None:
        self.leaf = leaf
        self.views = views
        self.inside: set[Node] = set()
        self._texts: dict[Node, str] = {}

    @staticmethod
    def reads(node: Node) -> bool:
        """Whether a node is a step of a formula: pointwise, a cast, a view or a half of columns."""
        steps = (*_UNARY, *_BINARY, aten.add, aten.sub, aten.rsub, aten.pow, aten.gelu, *_CLAMPS, *VIEWS)
        halves = (aten.split, aten.split_with_sizes, aten.slice, operator.getitem)
        return is_op(node, *steps, *halves) or peel_copies(node) is not node or cast_source(node) is not None

    def text(self, node: Any) -> str:
        """The formula of a node, as it is spelled; raises `MatchError` where there is none."""
        number = constant(node)
        if number is not None:
            return repr(float(number))
        require(isinstance(node, Node), f"{node!r} is not a tensor", code=ReasonCode.NOT_POINTWISE)
        if node not in self._texts:
            text = self.leaf(node) or self._read(node)
            # a value that is read twice is spelled twice
            require(len(text) <= MAX_FORMULA_LENGTH, "the formula is too long", code=ReasonCode.NOT_POINTWISE)
            self._texts[node] = text
        return self._texts[node]

    def require_private(self, result: Node, *leaves: Node) -> None:
        """`MatchError` where something else reads a leaf or a value on the way to `result`."""
        for node in (*leaves, *(self.inside - {result})):
            escaped = [user for user in node.users if user not in self.inside]
            detail = f"{describe(node)} is also read by {[describe(user) for user in escaped]}"
            require(not escaped, detail, code=ReasonCode.SHARED_USE)

    def _read(self, node: Node) -> str:
        self.inside.add(node)
        source = self._behind(node)
        if source is not node:
            self._add_between(node, source)
            return self.text(source)
        return self._operation(node)

    def _behind(self, node: Node) -> Node:
        source: Node = peel_casts(node)
        if self.views and source is node:
            source = peel_views(node)
            columns = tensor_of(node).shape[-1], tensor_of(source).shape[-1]
            require(bool(statically_known_true(columns[0] == columns[1])), "columns are split or joined")
        return source

    def _add_between(self, node: Node, source: Node) -> None:
        while node is not source:
            self.inside.add(node)
            node = node.args[0]  # type: ignore[assignment]  # casts, copies and views read their first argument

    def _operation(self, node: Node) -> str:
        given = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
        for table in (_UNARY, _BINARY):
            for op, template in table.items():
                if is_op(node, op) and "rounding_mode" not in given:
                    operands = [self.text(arg) for arg in node.args[: 1 if table is _UNARY else 2]]
                    return template.format(*operands)
        if is_op(node, aten.add, aten.sub) and given.get("alpha", 1) == 1:
            sign = "+" if is_op(node, aten.add) else "-"
            return f"({self.text(node.args[0])}) {sign} ({self.text(node.args[1])})"
        if is_op(node, aten.rsub) and given.get("alpha", 1) == 1:
            return f"({self.text(node.args[1])}) - ({self.text(node.args[0])})"
        if is_op(node, aten.pow) and constant(node.args[1]) in (2, 3):
            base = self.text(node.args[0])
            return f"square({base})" if constant(node.args[1]) == 2 else f"square({base}) * ({base})"
        if is_op(node, aten.gelu):
            name = "gelu_tanh" if given["approximate"] == "tanh" else "gelu"
            return f"{name}({self.text(node.args[0])})"
        if is_op(node, *_CLAMPS):
            return self._clamp(node, given)
        return refuse(
            f"{describe(node)} is not a pointwise operation of the formula language", code=ReasonCode.NOT_POINTWISE
        )

    def _clamp(self, node: Node, given: dict[str, Any]) -> str:
        text = self.text(node.args[0])
        low, high = given.get("min", given.get("min_val")), given.get("max", given.get("max_val"))
        for name, bound in (("max", low), ("min", high)):
            if bound is not None:
                text = f"{name}({text}, {self.text(bound)})"
        return text


def simplified_formula(text: str) -> str:
    """The formula in one spelling; refuses what the formula language cannot hold: infinities, too deep a tree."""
    try:
        return simplify(text)
    except MoEOptionError as error:
        return refuse(f"{text[:100]!r} is not a formula: {error}", code=ReasonCode.NOT_POINTWISE)


def formula_names(formula: str) -> set[str]:
    """The names that a formula reads: "g", "u" or both."""
    return {node.id for node in ast.walk(ast.parse(formula)) if isinstance(node, ast.Name)}


def half_of(node: Node) -> tuple[Node, str, str, list[Node]] | None:
    """(source, layout, "g" or "u", nodes passed) where the node is one half of the columns of a [..., J] value."""
    if is_op(node, operator.getitem) and is_op(node.args[0], aten.split, aten.split_with_sizes):
        split: Any = node.args[0]
        source, sizes = split.args[0], split.args[1]
        width, half = tensor_of(source).shape[-1], node.args[1]
        halves = sizes == width // 2 if isinstance(sizes, int) else list(sizes) == [width // 2] * 2
        if is_last_dim(arguments(split)["dim"], source) and halves and width % 2 == 0:
            return source, "halves", "gu"[half], [node, split]  # type: ignore[index]
        return None
    if not is_op(node, aten.slice):
        return None
    given = arguments(node)
    source = given["self"]
    width = tensor_of(source).shape[-1]
    if not is_last_dim(given["dim"], source) or width % 2:
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
