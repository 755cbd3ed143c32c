"""Graphs as the passes meet them (functional ATen, decomposed), made without Inductor's code generation: in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from lowering.inductor.interpret import GraphPass, backend_with

__all__ = ["GraphPass", "applied", "backend_with", "calls", "no_pass", "trace"]


def trace(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """The inference graph of a function of tensors, as it stands when the joint passes run."""
    tracer = make_fx(torch.func.functionalize(function), decomposition_table=select_decomp_table(), tracing_mode="fake")
    module = tracer(*inputs)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def applied(graph_pass: GraphPass, module: GraphModule) -> GraphModule:
    """The module after the pass, its graph checked."""
    graph_pass(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def calls(graph: Graph, *targets: Any) -> list[Node]:
    """The nodes that call one of these overloads, in order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def no_pass(graph: Graph) -> Graph:
    """The pass that does nothing, for the other side of a comparison."""
    return graph
