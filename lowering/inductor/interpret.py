"""A backend for `torch.compile` that rewrites graphs as Inductor would and then runs them, without generating code.

Seconds where Inductor takes a minute, and no C++ compiler: for questions about what is captured and whether it computes
the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, GraphModule

from ..errors import Reason, ReasonCode
from ..report import layer_of, record
from ..state import is_enabled

GraphPass = Callable[[Graph], Any]
_NAMESPACE = "diffulex::"


def backend_with(graph_pass: GraphPass, *, before_run: Callable[[GraphModule, Any], None] | None = None) -> Any:
    """A backend that runs the pass where Inductor runs its joint passes, then runs the graph.

    before_run: is given each graph that will run, and its example inputs.
    """
    from torch._dynamo.backends.common import aot_autograd  # these load Inductor
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def applied(module: GraphModule) -> GraphModule:
        graph_pass(module.graph)
        module.graph.lint()
        module.recompile()
        return module

    def run(module: GraphModule, example_inputs: Any) -> Any:
        if before_run is not None:
            before_run(module, example_inputs)
        return make_boxed_func(module.forward)

    def run_inference(module: GraphModule, example_inputs: Any) -> Any:
        return run(applied(module), example_inputs)

    def partition(joint: GraphModule, *args: Any, **options: Any) -> Any:
        return min_cut_rematerialization_partition(applied(joint), *args, **options)

    return aot_autograd(
        fw_compiler=run,
        bw_compiler=run,
        inference_compiler=run_inference,
        partition_fn=partition,
        decompositions=select_decomp_table,
    )


def rewrite(graph: Graph) -> None:
    """All passes of diffulex on a functional aten graph, where they are switched on, and a record of its ops."""
    from ..graph.pipeline import run_passes

    if not is_enabled():
        return
    run_passes(graph)
    reason = Reason(ReasonCode.NO_CODE)
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.name.startswith(_NAMESPACE):
            op = schema.name.removeprefix(_NAMESPACE)
            record("lower", op, layer=layer_of(node), outcome="the op's own kernel", reason=reason)
