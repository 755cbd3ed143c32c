"""Read the MoE regions off a graph whose blocks are stage ops already."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..activation import intermediate_size, is_gated
from ..ops import DOWN_OPS, ROUTE_OPS, UP_OPS
from ..region import MoERegion
from ..report import layer_of
from ..spec import ExpertSpec, RoutingSpec
from .dataflow import VIEWS, arguments, cast_source, is_op, origin, outputs, tensor_of

moe = torch.ops.diffulex


def find_regions(graph: Graph) -> tuple[MoERegion, ...]:
    """One region for each `moe_dispatch` whose slots go through an up and a down stage, in graph order."""
    dispatches = [node for node in graph.nodes if is_op(node, moe.moe_dispatch)]
    return tuple(region for region in map(_region, dispatches) if region is not None)


def _users_of(values: list[Node], ops: tuple[Any, ...]) -> list[Node]:
    return list(dict.fromkeys(user for value in values for user in value.users if is_op(user, *ops)))


def _region(dispatch: Node) -> MoERegion | None:
    offsets = outputs(dispatch, 2)
    ups, downs = _users_of(offsets, UP_OPS), _users_of(offsets, DOWN_OPS)
    if not ups or not downs:
        return None
    up, down = ups[0], downs[0]
    given = arguments(up)
    w13, w2 = tensor_of(given["w13"]), tensor_of(arguments(down)["w2"])
    tokens, top_k = tensor_of(arguments(dispatch)["ids"]).shape
    experts = ExpertSpec(
        num_experts=int(w13.shape[0]),
        hidden_size=int(w13.shape[2]),
        intermediate_size=int(w2.shape[2]),
        act=given["act"],
        gated=is_gated(given["act"]) or intermediate_size(given["act"], w13.shape[1]) == 2 * w2.shape[2],
        bias=given["b13"] is not None,
        interleaved=given["interleaved"],
        transposed=bool(statically_known_true(w13.stride(1) == 1) and statically_known_true(w13.stride(2) != 1)),
        dtype=str(w13.dtype).removeprefix("torch."),
    )
    return MoERegion(
        layer=layer_of(dispatch),
        experts=experts,
        routing=_routing(dispatch),
        tokens=_expression(tokens),
        top_k=int(top_k),
        neighbours=_neighbours(down),
    )


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _routing(dispatch: Node) -> RoutingSpec | None:
    ids = origin(arguments(dispatch)["ids"])
    if not is_op(ids, operator.getitem) or not is_op(ids.args[0], *ROUTE_OPS):
        return None
    return RoutingSpec.of_op(arguments(ids.args[0]))


def _short_name(node: Node) -> str:
    """`add` of `aten.add.Tensor`."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _neighbours(down: Node) -> tuple[str, ...]:
    """Names of what reads the combined output, behind casts and views."""
    slots = [down] if is_op(down, moe.moe_expert_down) else outputs(down, 0)
    waiting = [user for value in slots for user in value.users if is_op(user, moe.moe_combine)]
    found: dict[str, None] = {}
    while waiting:
        for user in waiting.pop().users:
            if is_op(user, *VIEWS) or cast_source(user) is not None:
                waiting.append(user)
            elif user.op == "call_function":
                found[_short_name(user)] = None
    return tuple(found)
