"""Graphs as the passes meet them (functional ATen, decomposed), made without Inductor's code generation: in seconds."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from lowering.graph.pipeline import run_passes
from lowering.inductor.interpret import GraphPass, backend_with
from lowering.inductor.passes import register_lowerings
from lowering.state import is_enabled

__all__ = ["GraphPass", "applied", "backend_with", "calls", "no_pass", "stop_at_lowerings", "trace", "trace_fakes"]


def trace(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """The inference graph of a function of tensors, as it stands when the joint passes run."""
    tracer = make_fx(torch.func.functionalize(function), decomposition_table=select_decomp_table(), tracing_mode="fake")
    module = tracer(*inputs)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def trace_fakes(
    function: Callable[..., Any], make_inputs: Callable[[], tuple[Tensor, Tensor, dict[str, Tensor]]]
) -> GraphModule:
    """The same of a function of two tensors and further ones by name, made under a fake mode: CUDA needs no device.

    Tensors have any shape [T, H] and dtype.
    """
    with FakeTensorMode():
        first, second, others = make_inputs()
        tracer = make_fx(
            lambda first, second, *values: function(first, second, dict(zip(others, values, strict=True))),
            decomposition_table=select_decomp_table(),
        )
        module = tracer(first, second, *others.values())
    module.graph.eliminate_dead_code()  # what decompositions leave behind
    return module


def applied(graph_pass: GraphPass, module: GraphModule) -> GraphModule:
    """The module after the pass, its graph checked."""
    graph_pass(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def _lower(module: GraphModule, example_inputs: Any) -> None:
    """Take the graph through Inductor's lowerings, for what they record; no code is made of it."""
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    register_lowerings()
    view_to_reshape(module)
    mode = detect_fake_mode(example_inputs)
    lowered = GraphLowering(module, example_inputs=example_inputs, shape_env=mode and mode.shape_env)
    with V.set_fake_mode(mode), V.set_graph_handler(lowered), V.set_extern_kernel_nodes([]):
        lowered.run(*example_inputs)


def stop_at_lowerings(monkeypatch: Any) -> None:
    """Until the test ends, Inductor generates nothing: its lowerings run and record, and the graph is interpreted."""
    backend = backend_with(lambda graph: run_passes(graph) if is_enabled() else graph, before_run=_lower)
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda graph, inputs, **options: backend(graph, inputs)
    )


def calls(graph: Graph, *targets: Any) -> list[Node]:
    """The nodes that call one of these overloads, in order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def no_pass(graph: Graph) -> Graph:
    """The pass that does nothing, for the other side of a comparison."""
    return graph


class Captured:
    """A backend that runs the passes, where they are switched on, and what its graphs call: `.graphs`, one a graph.

    A graph is told as op -> calls; a training graph as two, forward and backward.
    """

    def __init__(self) -> None:
        self.graphs: list[dict[str, int]] = []
        self.backend = backend_with(lambda graph: run_passes(graph) if is_enabled() else graph, before_run=self._note)

    def _note(self, module: GraphModule, _inputs: Any) -> None:
        names = [str(node.target) for node in module.graph.nodes]
        ours = (name.split(".")[1] for name in names if name.startswith("diffulex."))
        self.graphs.append(dict(collections.Counter(ours)))
