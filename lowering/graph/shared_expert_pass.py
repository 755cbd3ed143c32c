"""Take the products of a shared expert into the stages of the routed experts beside it.

`down(act(gate(x), up(x)))`, a dense MLP over the rows that the routed experts gather, becomes the second output of
`moe_expert_up_shared` and `moe_expert_down_shared`, whose lowerings give it programs of the same kernels: three
products and a pointwise kernel less. Only values that nothing else reads are taken, so training graphs stay as they
are, and only on CUDA: elsewhere the stages would be taken apart again.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops  # noqa: F401  (registers the ops that are looked up below)
from ..activation import IDENTITY, is_gated
from ..errors import Reason, ReasonCode
from .dataflow import (
    COPIES,
    VIEWS,
    MatchError,
    ancestors,
    arguments,
    aten,
    describe,
    has_shape,
    insert_call,
    is_op,
    may_move,
    peel_copies,
    peel_views,
    require,
    sort_nodes,
    tensor_of,
    transposed_source,
)
from .gate_formula import FormulaReader, half_of, simplified_formula

moe = torch.ops.diffulex
_PRODUCTS = (aten.mm, aten.addmm)
_MAX_STEPS = 60  # pointwise nodes and views between the products of an MLP


@dataclasses.dataclass(frozen=True)
class SharedExpertRecord:
    """What became of the MLP behind `down`, a product beside the experts of `up`: taken when `reason` is None."""

    up: Node
    down: Node
    reason: Reason | None = None


def shared_expert_pass(graph: Graph, *, record: Callable[[SharedExpertRecord], None] | None = None) -> Graph:
    """Rewrite every MLP over the rows of an up stage; tell `record` about each MLP that was looked at."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    taken = False
    for up in [node for node in order if is_op(node, moe.moe_expert_up)]:
        for mlp in list(_mlps_beside(up)):
            try:
                mlp.take(graph, order)
                found, taken = SharedExpertRecord(up, mlp.down), True
            except MatchError as error:
                found = SharedExpertRecord(up, mlp.down, error.reason)
            if record is not None:
                record(found)
            if found.reason is None:
                break  # the stages hold one shared expert
    if taken:  # once: both look at the whole graph
        sort_nodes(graph)
        graph.eliminate_dead_code()
    return graph


def _roots(up: Node) -> tuple[Node, ...]:
    """What the up stage gathers, and behind a projection of the experts' rows alone what is projected."""
    root = peel_views(arguments(up)["hidden"])
    return (root, peel_views(root.args[0])) if is_op(root, aten.mm) else (root,)


def _products_of(root: Node) -> Iterator[Node]:
    """The products with a row-major view of `root` on the left."""
    waiting = [root]
    while waiting:
        for user in waiting.pop().users:
            if is_op(user, *VIEWS, *COPIES):
                waiting.append(user)
            elif is_op(user, *_PRODUCTS) and _left(user) is root:
                yield user


def _left(product: Node) -> Any:
    return peel_views(product.args[1 if is_op(product, aten.addmm) else 0])


def _mlps_beside(up: Node) -> Iterator[_Mlp]:
    """The products whose left operand is a formula of products of the rows that `up` gathers."""
    for root in _roots(up):
        found: dict[Node, None] = {}
        for first in _products_of(root):
            seen, waiting = {first}, [first]
            while waiting and len(seen) < _MAX_STEPS:
                for user in waiting.pop(0).users:
                    if is_op(user, *_PRODUCTS):
                        found[user] = None
                    elif user not in seen and FormulaReader.reads(user):
                        seen.add(user)
                        waiting.append(user)
        for down in (down for down in found if down.users):
            with contextlib.suppress(_NoMlpError):
                yield _Mlp(up, down, root)


class _NoMlpError(Exception):
    """The product is the last one of no MLP: a projection behind a norm, say."""


class _Mlp:
    """A dense MLP beside the experts of `up`, read back from its last product."""

    def __init__(self, up: Node, down: Node, root: Node) -> None:
        self.up = up
        self.down = down
        self.root = root
        self.given = arguments(up)
        self.leaves: dict[Node, str] = {}
        self.layouts: set[str] = set()
        self.reader = FormulaReader(self._leaf, views=True)
        self.result: Node = down.args[1 if is_op(down, aten.addmm) else 0]  # type: ignore[assignment]
        try:
            self.text = self.reader.text(self.result)
        except MatchError as error:
            raise _NoMlpError from error
        if self.text in ("g", "u") or not self.leaves:  # nothing between two products, or no first one
            raise _NoMlpError

    def take(self, graph: Graph, order: dict[Node, int]) -> None:
        """Rewrite, but for the order of the nodes; raises `MatchError` before anything is changed."""
        act = simplified_formula(self.given["act"])
        require(tensor_of(self.up).device.type == "cuda", "not a CUDA device", code=ReasonCode.NOT_CUDA)
        require(act != IDENTITY, "the activation of the experts is not folded", code=ReasonCode.NOT_POINTWISE)
        routed_down = self._routed_down()
        biased = [product for product in (*self.leaves, self.down) if is_op(product, aten.addmm)]
        require(not biased, "it has biases", code=ReasonCode.OPTION)
        formula = self._formula(act)
        require(formula == act, f"its activation {formula} is not the experts' {act}", code=ReasonCode.OPTION)
        weights = self._weights(gated=is_gated(act))
        tokens, width = tensor_of(self.given["hidden"]).shape[0], tensor_of(weights[1]).shape[0]
        require(has_shape(weights[0], [tokens, *tensor_of(weights[0]).shape[1:]]), "it has other rows than the experts")
        width = width // 2 if self.layouts else width
        require(has_shape(self.result, [tokens, width]), "the activation changes the shape")
        self.reader.require_private(self.result, *self.leaves)
        require(list(self.result.users) == [self.down], "its activation is read elsewhere", code=ReasonCode.SHARED_USE)
        last = transposed_source(self.down.args[1])
        require(last is not None, f"the last product is by {describe(self.down.args[1])}, no transposed weight")
        dtypes = {tensor_of(node).dtype for node in (*weights, last, self.up, self.down)}  # type: ignore[arg-type]
        require(len(dtypes) == 1, f"dtypes {dtypes}", code=ReasonCode.DTYPE)
        own = {self.down, *self.leaves}
        before = ancestors(routed_down, stop=lambda node: node is self.root)  # nothing of it is behind the root
        require(own.isdisjoint(before), "the experts depend on it", code=ReasonCode.SHARED_USE)
        matrices: list[Any] = [*weights[1:], last]
        behind = {source for node in matrices for source in ancestors(node, stop=lambda _: False)}
        require(self.root not in behind, "its weights depend on the tokens", code=ReasonCode.SHARED_USE)
        self._require_movable(order, routed_down, weights, last)
        self._insert(graph, routed_down, weights, last)

    def _formula(self, act: str) -> str:
        """The activation; `act` where the other naming of two products, or the other order of factors, makes it so."""
        formula = simplified_formula(self.text)
        if act not in (formula, _commuted(formula)) and len(self.leaves) == 2:
            self.leaves = dict(zip(self.leaves, reversed(self.leaves.values()), strict=True))
            self.reader = FormulaReader(self._leaf, views=True)
            formula = simplified_formula(self.reader.text(self.result))
        return act if act == _commuted(formula) else formula

    def _require_movable(
        self, order: dict[Node, int], routed_down: Node, weights: tuple[Node, ...], last: Node | None
    ) -> None:
        """What stands between the first and the last node of both paths changes places: all of it has to be pure.

        Inputs of the graph are no part of a path: they are there from the beginning on.
        """
        paths = (self.up, routed_down, self.down, *self.leaves, *weights, last)
        ends = [order[node] for node in paths if node in order and node.op not in ("placeholder", "get_attr")]
        impure = [node for node in list(order)[min(ends) : max(ends)] if not may_move(node)]
        require(not impure, f"{[describe(node) for node in impure]} would change places", code=ReasonCode.SHARED_USE)

    def _routed_down(self) -> Node:
        users = list(self.up.users)
        require(len(users) == 1 and is_op(users[0], moe.moe_expert_down), "the experts have no one down stage")
        return users[0]

    def _leaf(self, node: Node) -> str | None:
        half = half_of(node)
        product = peel_copies(node) if half is None else peel_views(half[0])
        if not is_op(product, *_PRODUCTS) or _left(product) is not self.root:
            return None
        if half is not None:
            self.layouts.add(half[1])
            self.reader.inside.update(half[3])
            self._pass_views(half[0], product)
            self.leaves[product] = "gu"
            return half[2]
        # silu(gate) * up is read from the left: the activated product is the gate
        return self.leaves.setdefault(product, "gu"[min(len(self.leaves), 1)])

    def _pass_views(self, node: Node, product: Node) -> None:
        while node is not product:
            self.reader.inside.add(node)
            node = node.args[0]  # type: ignore[assignment]

    def _weights(self, *, gated: bool) -> tuple[Node, ...]:
        """(rows [T, D], w1 [S, D], w3 [S, D] if gated); w3 and w1 are one node where they are halves of one weight."""
        require(self.layouts <= {"halves"}, "gate and up columns alternate")
        require(gated or not self.layouts, "it leaves half of a product unread")
        wanted = 2 if gated and not self.layouts else 1
        require(len(self.leaves) == wanted, f"it has {len(self.leaves)} first products")
        products = sorted(self.leaves, key=self.leaves.__getitem__)
        rows = [product.args[0] for product in products]
        weights = [transposed_source(product.args[1]) for product in products]
        require(None not in weights, "a first product is by something else than a transposed weight")
        found: list[Any] = weights
        shapes = [tensor_of(weight).shape for weight in found]  # symbolic where weights are inputs of a dynamic graph
        require(all(has_shape(weight, shapes[0]) for weight in found), f"gate and up of shapes {shapes}")
        return rows[0], *found

    def _insert(self, graph: Graph, routed_down: Node, weights: tuple[Node, ...], last: Any) -> None:
        names = ("hidden", "w13", "b13", "order", "offsets")
        inputs = [self.given[name] for name in names]
        rows, *matrices = weights
        like = next(iter(self.leaves))
        with graph.inserting_before(self.up):
            if self.layouts:
                (both,) = matrices
                width = tensor_of(both).shape[0] // 2
                bounds = ((0, width), (width, 2 * width))
                matrices = [
                    insert_call(graph, aten.slice.Tensor, args=(both, 0, *bound), like=like) for bound in bounds
                ]
            w3 = matrices[1] if len(matrices) == 2 else None
            options = (self.given["top_k"], self.given["act"], self.given["interleaved"])
            up = _pair(graph, moe.moe_expert_up_shared.default, (*inputs, rows, matrices[0], w3, *options), self.up)
        given = arguments(routed_down)
        with graph.inserting_before(routed_down):
            args = (
                up[0],
                *(given[name] for name in ("w2", "b2", "order", "offsets")),
                up[1],
                last,
                self.given["top_k"],
            )
            slots, out = _pair(graph, moe.moe_expert_down_shared.default, args, routed_down)
        routed_down.replace_all_uses_with(slots)
        self.down.replace_all_uses_with(out)


def _commuted(formula: str) -> str:
    """The formula with the factors of its last product in the other order: the same value, bit by bit."""
    tree = ast.parse(formula, mode="eval").body
    if not isinstance(tree, ast.BinOp) or not isinstance(tree.op, ast.Mult):
        return formula
    return simplified_formula(ast.unparse(ast.BinOp(tree.right, ast.Mult(), tree.left)))


def _pair(graph: Graph, target: Any, args: tuple[Any, ...], like: Node) -> tuple[Node, Node]:
    node = insert_call(graph, target, args=args, like=like)
    first, second = (insert_call(graph, operator.getitem, args=(node, index), like=like) for index in range(2))
    return first, second
