"""The passes in their order, each named, timed, recorded, and possible to leave out."""

from __future__ import annotations

import time
from collections.abc import Collection

from torch.fx import Graph, Node

from ..errors import Reason, ReasonCode
from ..report import layer_of, logger, record
from .activation_pass import ActivationRecord, activation_pass
from .bystander_pass import bystander_pass
from .regions import find_regions
from .route_linear_pass import RouteLinearRecord, route_linear_pass
from .route_pass import RouteRecord, route_pass
from .router_linear_pass import RouterLinearRecord, router_linear_pass
from .shared_expert_pass import SharedExpertRecord, shared_expert_pass
from .spine_pass import SpineRecord, spine_pass
from .uncovered import library_products, note_uncovered


def _note_spine(found: SpineRecord) -> None:
    outcome = "stock grouped GEMM" if found.reason else "stage ops"
    record("recognise", "spine_pass", layer=layer_of(found.node), outcome=outcome, reason=found.reason)


def _note_route(found: RouteRecord) -> None:
    outcome = "stays aten" if found.reason else f"moe_route {found.spec}"
    record("recognise", "route_pass", layer=found.module, outcome=outcome, reason=found.reason)
    if found.reason is not None:
        note_uncovered("the routing", found.reason, layer=found.module)


def _note_router_linear(found: RouterLinearRecord) -> None:
    outcome = "left as it is" if found.reason else "reads 16-bit operands"
    record("recognise", "router_linear_pass", layer=layer_of(found.route), outcome=outcome, reason=found.reason)


def _note_activation(found: ActivationRecord) -> None:
    outcome = "stays aten" if found.reason else f"folded {found.formula}"
    record("recognise", "activation_pass", layer=layer_of(found.down), outcome=outcome, reason=found.reason)


def _note_shared_expert(found: SharedExpertRecord) -> None:
    outcome = "beside the experts" if found.reason else "in the experts' stages"
    record("recognise", "shared_expert_pass", layer=layer_of(found.up), outcome=outcome, reason=found.reason)


def _note_route_linear(found: RouteLinearRecord) -> None:
    outcome = "a product of its own" if found.reason else "with the router"
    record("recognise", "route_linear_pass", layer=layer_of(found.route), outcome=outcome, reason=found.reason)
    if found.reason is not None:
        note_uncovered("the router's product", found.reason, layer=layer_of(found.route))


_PASSES = {
    "bystander_pass": bystander_pass,
    "spine_pass": lambda graph: spine_pass(graph, record=_note_spine),
    "route_pass": lambda graph: route_pass(graph, record=_note_route),
    "router_linear_pass": lambda graph: router_linear_pass(graph, record=_note_router_linear),
    "activation_pass": lambda graph: activation_pass(graph, record=_note_activation),
    "shared_expert_pass": lambda graph: shared_expert_pass(graph, record=_note_shared_expert),
    "route_linear_pass": lambda graph: route_linear_pass(graph, record=_note_route_linear),
}


def _may_be_experts(node: Node) -> bool:
    """Whether the node is one of our ops or a grouped GEMM of any library: every pass starts from one of these."""
    target = node.target
    return getattr(target, "namespace", "") == "diffulex" or "grouped_mm" in getattr(target, "__name__", "")


def run_passes(graph: Graph, *, skip: Collection[str] = ()) -> Graph:
    """Run the passes on a functional aten graph, inference or joint; `skip` names those to leave out.

    A graph without experts is left alone at the cost of one look at each node.
    """
    if not any(_may_be_experts(node) for node in graph.nodes):
        return graph
    for name, function in _PASSES.items():
        if name in skip:
            continue
        start = time.perf_counter()
        function(graph)
        logger.debug("%s took %.1f ms", name, (time.perf_counter() - start) * 1e3)
    graph.lint()
    for product in library_products(graph):
        what, reason = f"{product.target} in {layer_of(product) or 'the graph'}", Reason(ReasonCode.LIBRARY)
        note_uncovered(what, reason, layer=layer_of(product))
    for region in find_regions(graph):
        record("recognise", "region", layer=region.layer, outcome=str(region))
    return graph
