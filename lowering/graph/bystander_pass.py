"""What only graphs of `torch.export` hold: nodes that read a value without using it, which the passes need not see."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .dataflow import aten


def bystander_pass(graph: Graph) -> Graph:
    """Erase checks of a cast's metadata, which Inductor lowers to nothing, and read each symbolic size in one place.

    Both count as users: with them behind it no value of the router or of a shared expert would be the MoE block's own.
    """
    for check in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(check)
    places = {node: place for place, node in enumerate(graph.nodes)}
    first: dict[Any, Node] = {}
    for node in sorted(graph.find_nodes(op="call_function", target=aten.sym_size.int), key=places.__getitem__):
        size = node.meta.get("val")
        if not isinstance(size, torch.SymInt):
            continue
        earlier = first.setdefault(size.node.expr, node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)
    return graph
