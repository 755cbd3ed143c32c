"""Rewrite MoE routers to `diffulex::moe_route`: one op from the logits to the weights and the expert ids.

The anchor is `diffulex::moe_dispatch`, however it came into the graph: its ids lead back to a top-k, and the weights of
the `moe_combine` that belongs to it lead back to the logits. The formula between is verified (`route_formula`), then
the weights and the indices are replaced. Nothing else is touched: router logits that the model returns, and
probabilities that a loss uses, stay.

Works on inference graphs and on joint training graphs. What the backward does with the top-k's indices it does with the
op's ids, and the top-k's values become a gather at those ids, so that all parts of the graph agree on the choice even
where scores tie; the rest of the backward is untouched. A router is refused where a part of the old choice would stay.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
from collections.abc import Callable

import torch
from torch.fx import Graph, Node

from .. import ops  # noqa: F401  (registers the ops that are looked up below)
from ..errors import Reason, ReasonCode
from ..report import layer_of
from ..spec import RoutingSpec
from .dataflow import (
    MatchError,
    ancestors,
    arguments,
    aten,
    describe,
    has_shape,
    insert_call,
    insert_cast,
    is_op,
    is_output,
    origin,
    outputs,
    refuse,
    require,
    tensor_of,
)
from .route_formula import RouteFormula, match_formula

moe = torch.ops.diffulex


@dataclasses.dataclass(frozen=True)
class RouteRecord:
    """What became of the router of one `moe_dispatch`: either `route` and `spec`, or a `reason`.

    dispatch  name of the moe_dispatch node
    module    dotted name of the module the dispatch was traced in, empty where it is not known
    route     name of the moe_route node that gives the ids
    """

    dispatch: str
    module: str
    route: str | None = None
    spec: RoutingSpec | None = None
    reason: Reason | None = None


def route_pass(graph: Graph, *, record: Callable[[RouteRecord], None] | None = None) -> Graph:
    """Rewrite every router that feeds a `moe_dispatch` and is understood; tell `record` about each, refusals included.

    The op gets the logits [T, E] in the dtype they were computed in; users of the weights [T, K] and of the ids [T, K]
    get them in the dtypes they had.
    """
    combines = _combines(graph)
    rewritten = False
    for dispatch in [node for node in graph.nodes if is_op(node, moe.moe_dispatch)]:
        try:
            route = _existing_route(dispatch)
            if route is None:
                route = _rewrite(graph, _match(dispatch, combines[dispatch]))
                rewritten = True
            _connect(dispatch, route)
            found = RouteRecord(dispatch.name, layer_of(dispatch), route=route.name, spec=_spec(route))
        except MatchError as error:
            found = RouteRecord(dispatch.name, layer_of(dispatch), reason=error.reason)
        if record is not None:
            record(found)
    if rewritten:
        graph.eliminate_dead_code()
    return graph


def _spec(route: Node) -> RoutingSpec:
    return RoutingSpec.of_op(arguments(route))


def _existing_route(dispatch: Node) -> Node | None:
    """The `moe_route` that gives the ids already: the model calls it, or another dispatch of the same ids led to it."""
    ids = origin(arguments(dispatch)["ids"])
    is_routed = is_op(ids, operator.getitem) and ids.args[1] == 1 and is_op(ids.args[0], moe.moe_route)
    return ids.args[0] if is_routed else None


def _match(dispatch: Node, combines: list[Node]) -> RouteFormula:
    ids = origin(arguments(dispatch)["ids"])
    topk = ids.args[0] if is_op(ids, operator.getitem) else None
    if not is_op(topk, aten.topk) or not is_output(ids, topk, index=1):
        refuse(f"the expert ids come from {describe(ids)}, not from a top-k")
    require(bool(combines), "no moe_combine weighs the slots of this dispatch")
    formula, *others = [match_formula(arguments(combine)["weights"], topk) for combine in combines]
    _check_choice_is_replaced(formula)
    require(
        all(other.weights is formula.weights for other in others),
        "the slots are combined more than once, with different weights",
        code=ReasonCode.SHARED_USE,
    )
    return formula


def _check_choice_is_replaced(formula: RouteFormula) -> None:
    """Refuse where the choice of groups has another use than the top-k of the experts, such as a backward through
    masked scores: it could keep other groups than the op where groups tie.
    """
    waiting = [] if formula.group_topk is None else [formula.group_topk]
    seen = {formula.topk, formula.weights, *waiting}
    while waiting:
        node = waiting.pop()
        replaced = node.op != "output" and not node.is_impure()
        require(replaced, "the choice of groups is also used elsewhere", code=ReasonCode.SHARED_USE)
        fresh = [user for user in node.users if user not in seen]
        seen.update(fresh)
        waiting.extend(fresh)


def _combines(graph: Graph) -> dict[Node, list[Node]]:
    """For each dispatch, the `moe_combine`s of slots that were computed in its order, whatever follows the experts."""
    found: dict[Node, list[Node]] = collections.defaultdict(list)
    for combine in [node for node in graph.nodes if is_op(node, moe.moe_combine)]:
        sources = ancestors(arguments(combine)["slots"], stop=_ends_experts)
        orders = {origin(arguments(node)["order"]) for node in sources if is_op(node, moe.moe_expert_down)}
        for order in orders:
            for dispatch in order.all_input_nodes if is_op(order, operator.getitem) else ():
                found[dispatch].append(combine)
    return found


def _ends_experts(node: Node) -> bool:
    return is_op(node, moe.moe_expert_down, moe.moe_combine)


def _rewrite(graph: Graph, formula: RouteFormula) -> Node:
    """Insert the op before the top-k, hand its results to the users of the formula's, and return it."""
    topk, weights = formula.topk, formula.weights
    with graph.inserting_before(topk):
        bias = formula.bias
        if bias is not None and tensor_of(bias).dim() == 2:
            bias = insert_call(graph, aten.reshape.default, args=(bias, [-1]), like=topk)
        args = (formula.logits, bias, None, *formula.spec.op_args())
        try:
            route = insert_call(graph, moe.moe_route.default, args=args, like=topk)
        except MatchError:
            if bias is not None and bias is not formula.bias:
                graph.erase_node(bias)  # a refusal leaves the graph as it was
            raise
        new_weights = insert_call(graph, operator.getitem, args=(route, 0), like=topk)
        new_weights = insert_cast(graph, new_weights, dtype=tensor_of(weights).dtype, like=topk)
        ids = insert_call(graph, operator.getitem, args=(route, 1), like=topk)
        long_ids = insert_cast(graph, ids, dtype=torch.int64, like=topk)
        values = insert_call(graph, aten.gather.default, args=(formula.selected, -1, long_ids), like=topk)
    weights.replace_all_uses_with(new_weights)
    for old, new in ((0, values), (1, long_ids)):
        for output in outputs(topk, old):
            output.replace_all_uses_with(new)
    return route


def _connect(dispatch: Node, route: Node) -> None:
    """Give the dispatch the op's int32 ids [T, K] themselves where only casts and views stand between."""
    given = arguments(dispatch)["ids"]
    for ids in outputs(route, 1)[:1]:
        if has_shape(ids, tensor_of(given).shape):
            dispatch.replace_input_with(given, ids)
