"""What of a MoE block is not covered where results may not depend on the batch: products that stay a library's.

A library chooses its kernel by the number of rows, so the order in which a row is summed may follow from it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from ..errors import Reason
from ..ops import UP_OPS, moe_route
from ..report import layer_of, record
from ..state import is_batch_invariant
from .dataflow import aten, is_op
from .route_linear_pass import source_of_logits

_PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv)
_EXPERTS = "experts"  # what the module is called in whose parent the router and shared experts are


def note_uncovered(what: str, reason: Reason, *, layer: str) -> None:
    """Record that `what`, a part of a block, may depend on the batch where nothing should."""
    if is_batch_invariant():
        record("plan", "batch_invariance", layer=layer, outcome=what, reason=reason)


def library_products(graph: Graph) -> Iterator[Node]:
    """Products in the modules of MoE blocks, but for those of routers; none of blocks whose module is not known."""
    blocks = {_block_of(layer_of(node)) for node in graph.nodes if is_op(node, *UP_OPS)} - {None}
    routers = {source_of_logits(route) for route in graph.find_nodes(op="call_function", target=moe_route)}
    for node in graph.nodes:
        if (
            node not in routers
            and is_op(node, *_PRODUCTS)
            and any(_is_inside(layer_of(node), block) for block in blocks)
        ):
            yield node


def _block_of(layer: str) -> str | None:
    """The module around experts called `experts`, else the module itself; None where it is not known."""
    outer, _, name = layer.rpartition(".")
    return outer if name == _EXPERTS else layer or None


def _is_inside(layer: str, block: str | None) -> bool:
    return not block or f"{layer}.".startswith(f"{block}.")
