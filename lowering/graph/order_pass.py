"""Exchanges between ranks in the order of the program, whatever else a compiler knows of a rank's tensors.

Inductor orders calls by their data alone. Where a rank has no tokens, nothing of a layer is data for the next one; and
of layers that do not depend on one another, it may order those of each rank by their sizes. Ranks that exchange in
different orders wait for one another for good, or take one exchange's data for the other's.
"""

from __future__ import annotations

import operator

from torch._functorch import config as functorch_config
from torch.fx import Graph, GraphModule, Node

from ..errors import MoEUnsupportedError
from ..ops._library import FOLLOWING_OPS
from .dataflow import backward_nodes, outputs, place_of


def order_pass(graph: Graph) -> Graph:
    """Have each op of `FOLLOWING_OPS` follow the one before it in the graph, by its argument `follows`; in place.

    A joint graph has two chains, as its halves become graphs of their own. Raises `MoEUnsupportedError` where a part of
    a graph that is called as a whole exchanges something, and where the backward might make an exchange again.
    """
    exchanges = [node for node in graph.nodes if takes_part(node)]
    _check_parts(graph)
    if not exchanges:
        return graph
    of_gradients = backward_nodes(graph)
    tangent = next((node for node in graph.nodes if node in of_gradients), None)
    if tangent is not None:
        _check_recomputation()
    ahead: dict[bool, Node] = {}
    for node in exchanges:
        returns = node in of_gradients or node.meta.get("partitioner_tag") == "is_backward"
        if returns and node not in of_gradients and tangent is not None:
            # it exchanges zeros, whatever the gradients are, and belongs to the backward all the same
            ahead.setdefault(returns, tangent)
        _follow(node, ahead.get(returns))
        ahead[returns] = _last_output(graph, node)
    graph.lint()
    return graph


def _check_parts(graph: Graph) -> None:
    for node in graph.nodes:
        part = getattr(graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
        if not isinstance(part, GraphModule):
            continue
        graphs = [module.graph for module in part.modules() if isinstance(module, GraphModule)]
        for inner in (inner for inside in graphs for inner in inside.nodes if takes_part(inner)):
            raise MoEUnsupportedError.of(
                "torch.compile",
                expected="exchanges between ranks in the graph itself",
                got=f"{inner.target} in {node.target}, which is called as a whole",
                hint="Call layers of several ranks outside of torch.cond, operators' loops and nested_compile_region.",
            )


def _follow(node: Node, ahead: Node | None) -> None:
    count = len(node.target._schema.arguments) - 1  # type: ignore[union-attr]
    if len(node.args) > count:  # a graph that was ordered and traced again
        node.args = (*node.args[:count], ahead)
    elif ahead is not None:
        node.kwargs = node.kwargs | {"follows": ahead}


def _check_recomputation() -> None:
    """What the backward computes again then depends on a rank's sizes, and so would exchanges that are made again."""
    budget, aggressive = functorch_config.activation_memory_budget, functorch_config.aggressive_recomputation
    if budget < 1 or aggressive:
        raise MoEUnsupportedError.of(
            "torch.compile",
            expected="exchanges between ranks that a backward does not make again",
            got=f"activation_memory_budget={budget}, aggressive_recomputation={aggressive}",
            hint="Leave these options of torch._functorch.config at 1.0 and False for layers of several ranks.",
        )


def takes_part(node: Node) -> bool:
    """Whether a node is a call of one of `FOLLOWING_OPS`."""
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
