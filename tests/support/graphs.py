"""Graphs as the passes meet them (functional ATen, decomposed), made without Inductor's code generation: in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

GraphPass = Callable[[Graph], Any]


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


def backend_with(graph_pass: GraphPass) -> Any:
    """A backend for `torch.compile` that runs the pass where Inductor runs its joint passes, then runs the graph."""

    def run(module: GraphModule, example_inputs: Any) -> Any:
        return make_boxed_func(module.forward)

    def run_inference(module: GraphModule, example_inputs: Any) -> Any:
        return make_boxed_func(applied(graph_pass, module).forward)

    def partition(joint: GraphModule, *args: Any, **options: Any) -> Any:
        return min_cut_rematerialization_partition(applied(graph_pass, joint), *args, **options)

    return aot_autograd(
        fw_compiler=run,
        bw_compiler=run,
        inference_compiler=run_inference,
        partition_fn=partition,
        decompositions=select_decomp_table,
    )


def calls(graph: Graph, *targets: Any) -> list[Node]:
    """The nodes that call one of these overloads, in order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def no_pass(graph: Graph) -> Graph:
    """The pass that does nothing, for the other side of a comparison."""
    return graph
