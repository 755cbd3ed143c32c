"""Exchanges between ranks in the order of the program, whatever else a compiler knows of a rank's tensors.

Inductor orders calls by their data alone. Where a rank has no tokens, nothing of a layer is data for the next one; and
of layers that do not depend on one another, it may order those of each rank by their sizes. Ranks that exchange in
different orders wait for one another for good, or take one exchange's data for the other's.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

from ..ops._library import FOLLOWING_OPS
from .dataflow import backward_nodes, outputs, place_of


def order_pass(graph: Graph) -> Graph:
    """Have each op of `FOLLOWING_OPS` follow the one before it in the graph, by its argument `follows`; in place.

    A joint graph has two chains, as its halves become graphs of their own.
    """
    exchanges = [node for node in graph.nodes if _takes_part(node)]
    if not exchanges:
        return graph
    of_gradients = backward_nodes(graph)
    tangent = next((node for node in graph.nodes if node in of_gradients), None)
    ahead: dict[bool, Node] = {}
    for node in exchanges:
        returns = node in of_gradients or node.meta.get("partitioner_tag") == "is_backward"
        if returns and node not in of_gradients and tangent is not None:
            # it exchanges zeros, whatever the gradients are, and belongs to the backward all the same
            ahead.setdefault(returns, tangent)
        if returns in ahead:
            node.kwargs = node.kwargs | {"follows": ahead[returns]}
        ahead[returns] = _last_output(graph, node)
    graph.lint()
    return graph


def _takes_part(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.name in FOLLOWING_OPS


def _last_output(graph: Graph, node: Node) -> Node:
    index = len(node.meta["val"]) - 1
    for output in outputs(node, index):
        return output
    with graph.inserting_after(node):
        output = graph.call_function(operator.getitem, (node, index))
    output.meta = place_of(node) | {"val": node.meta["val"][index]}
    return output
