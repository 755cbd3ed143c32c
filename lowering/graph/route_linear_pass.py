"""Take the product in front of `moe_route` into it: `moe_route(mm(x, w.T))` -> `moe_route_linear(x, w)`.

Its lowering has kernels of its own for few tokens, and leaves the product to the library for many. The logits are
rounded as the product rounds them, and whatever else reads them reads an output of the op. Only on CUDA, and not where
a backward reads the logits.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import ops  # noqa: F401  (registers the ops that are looked up below)
from ..errors import Reason, ReasonCode
from ..ops.moe_route import route_columns
from ..spec import RoutingSpec
from .dataflow import (
    MatchError,
    ancestors,
    arguments,
    aten,
    backward_nodes,
    describe,
    has_shape,
    insert_call,
    is_op,
    may_move,
    peel_views,
    peel_widening,
    require,
    sort_nodes,
    tensor_of,
    transposed_source,
)

moe = torch.ops.diffulex
_NARROW = (torch.float16, torch.bfloat16)
_PRODUCTS = (aten.mm.default, aten.mm.dtype, aten.addmm.default)
_MOST_COLUMNS = 256  # of one program's tile of logits


@dataclasses.dataclass(frozen=True)
class RouteLinearRecord:
    """What became of the product behind one `moe_route`: taken into it when `reason` is None."""

    route: Node
    reason: Reason | None = None


def route_linear_pass(graph: Graph, *, record: Callable[[RouteLinearRecord], None] | None = None) -> Graph:
    """Rewrite every router behind a product of 16-bit operands; tell `record` about each `moe_route`."""
    backward, nodes = backward_nodes(graph), list(graph.nodes)
    unordered = False
    for route in [node for node in nodes if is_op(node, moe.moe_route)]:
        try:
            router = _Router(route, backward)
            router.check(nodes)
            found = RouteLinearRecord(router.take(graph))
            unordered |= router.has_readers
        except MatchError as error:
            found = RouteLinearRecord(route, error.reason)
        if record is not None:
            record(found)
    if unordered:  # what reads the logits may stand before the router
        sort_nodes(graph)
    return graph


class _Router:
    """A `moe_route`, the product its logits come from, and what stands between."""

    def __init__(self, route: Node, backward: set[Node]) -> None:
        self.route = route
        self.backward = backward
        self.given = arguments(route)
        # views and casts, from the route to the product
        *self.between, self.product = _back_to_source(self.given["logits"])
        self.has_readers = False  # of the logits, besides the router

    def check(self, nodes: list[Node]) -> None:
        """Raises `MatchError` where the product stays; `nodes` are those of the graph, in order."""
        product, logits = self.product, tensor_of(self.given["logits"])
        known = isinstance(product, Node) and product.op == "call_function" and product.target in _PRODUCTS
        require(known, f"the logits come from {describe(product)}, not from a product")
        require(has_shape(product, logits.shape), "the logits are not all of the product", code=ReasonCode.SHAPE)
        require(logits.device.type == "cuda", "not a CUDA device", code=ReasonCode.NOT_CUDA)
        self.inputs = self._operands()
        self._check_operands(*self.inputs)
        self._check_routing(num_experts=tensor_of(self.inputs[1]).shape[0])
        readers = {user for node in (product, *self.between) for user in node.users}
        require(readers.isdisjoint(self.backward), "a backward reads the logits", code=ReasonCode.SHARED_USE)
        passed = nodes[nodes.index(product) : nodes.index(self.route)]
        impure = [describe(node) for node in passed if node.op != "placeholder" and not may_move(node)]
        require(not impure, f"{impure} would change places", code=ReasonCode.SHARED_USE)

    def _operands(self) -> tuple[Node, Node, Node | None]:
        """(hidden [T, H], weight [E, H], bias [E] of the product or None)."""
        given = arguments(self.product)
        biased = is_op(self.product, aten.addmm)
        require(given.get("alpha", 1) == given.get("beta", 1) == 1, "the product is scaled", code=ReasonCode.OPTION)
        weight = transposed_source(given["mat2"])
        require(weight is not None, f"the product is by {describe(given['mat2'])}, no transposed weight")
        assert weight is not None
        return given["mat1" if biased else "self"], weight, given["self"] if biased else None

    def _check_operands(self, hidden: Node, weight: Node, linear_bias: Node | None) -> None:
        tensors = [tensor_of(node) for node in (hidden, weight, linear_bias) if node is not None]
        dtypes = {tensor.dtype for tensor in tensors}
        narrow = len(dtypes) == 1 and dtypes.issubset(_NARROW)
        require(narrow, f"operands of {', '.join(map(str, dtypes))}, not of one 16-bit dtype", code=ReasonCode.DTYPE)
        static = all(isinstance(size, int) for size in tensors[1].shape)
        require(static, "a symbolic number of experts or width", code=ReasonCode.SHAPE)
        rows = all(map(_has_consecutive_rows, tensors[:2]))
        require(rows, "rows of hidden or weight are not consecutive in memory", code=ReasonCode.LAYOUT)
        ranks = linear_bias is None or tensors[2].dim() == 1
        require(ranks, "the bias of the product is no [E]", code=ReasonCode.SHAPE)

    def _check_routing(self, *, num_experts: int) -> None:
        spec = RoutingSpec.of_op(self.given)
        require(self.given["ids"] is None, "the ids are given", code=ReasonCode.OPTION)
        require(spec.n_shared == 0, "shared experts have logits, too", code=ReasonCode.OPTION)
        dtype = tensor_of(self.given["logits"]).dtype
        require(dtype in (*_NARROW, torch.float32), f"logits in {dtype}", code=ReasonCode.DTYPE)
        columns = route_columns(spec, num_experts)
        require(columns <= _MOST_COLUMNS, f"{columns} columns, at most {_MOST_COLUMNS}", code=ReasonCode.SHAPE)
        for name in ("bias", "per_expert_scale"):
            node = self.given[name]
            before = set() if node is None else set(ancestors(node, stop=lambda _: False))
            require(self.product not in before, f"{name} depends on the logits", code=ReasonCode.SHARED_USE)

    def take(self, graph: Graph) -> Node:
        """Rewrite what was checked, but for the order of the nodes, and return the new one."""
        dtypes = (tensor_of(self.product).dtype, tensor_of(self.given["logits"]).dtype)
        names = [argument.name for argument in moe.moe_route.default._schema.arguments]
        options = [self.given[name] for name in names if name not in ("logits", "bias", "ids")]
        with graph.inserting_before(self.route):
            args = (*self.inputs, self.given["bias"], *dtypes, *options)
            new = insert_call(graph, moe.moe_route_linear.default, args=args, like=self.route)
        self.route.replace_all_uses_with(new)
        for node in (self.route, *self.between, self.product):
            if not node.users:
                graph.erase_node(node)
        if self.product.users:
            with graph.inserting_after(new):
                logits = insert_call(graph, operator.getitem, args=(new, 2), like=self.product)
            self.product.replace_all_uses_with(logits)
            graph.erase_node(self.product)
            self.has_readers = True
        return new


def source_of_logits(route: Node) -> Any:
    """What a `moe_route` reads, behind views and widening casts: the router's product, if there is one."""
    return _back_to_source(arguments(route)["logits"])[-1]


def _back_to_source(node: Any) -> list[Any]:
    path = [node]
    while (behind := _behind(path[-1])) is not path[-1]:
        path.append(behind)
    return path


def _behind(node: Any) -> Any:
    """One step back through a copy, a row-major view or a widening cast; the node itself where there is none."""
    if peel_views(peel_widening(node)) is node:
        return node
    return node.args[0]


def _has_consecutive_rows(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and bool(statically_known_true(tensor.stride(1) == 1))
