"""Let a router's fp32 product read its 16-bit operands: `mm(x.float(), w.float().T)` -> `mm(x, w.T, out_dtype=fp32)`.

DeepSeek-V3 and its relatives cast hidden states and router weight to fp32 before the product. Products of two 16-bit
floats are exact in fp32; the matrix units sum them in fp32 with a relative error of about 1e-6 (1e-7 on the CUDA
cores), a thousandth of the rounding that made the operands. Two casts, their traffic and their kernels are saved. Only
products that feed `moe_route` are touched, only on CUDA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops  # noqa: F401  (registers the ops that are looked up below)
from ..errors import Reason, ReasonCode
from .dataflow import (
    MatchError,
    arguments,
    aten,
    cast_source,
    describe,
    insert_call,
    is_op,
    peel_copies,
    require,
    tensor_of,
)

moe = torch.ops.diffulex
_NARROW = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class RouterLinearRecord:
    """What became of the product behind one `moe_route`: rewritten when `reason` is None."""

    route: Node
    reason: Reason | None = None


def router_linear_pass(graph: Graph, *, record: Callable[[RouterLinearRecord], None] | None = None) -> Graph:
    """Rewrite every fp32 router product of two cast 16-bit operands; tell `record` about each `moe_route`."""
    rewritten = False
    for route in [node for node in graph.nodes if is_op(node, moe.moe_route)]:
        try:
            _rewrite(graph, peel_copies(arguments(route)["logits"]))
            found, rewritten = RouterLinearRecord(route), True
        except MatchError as error:
            found = RouterLinearRecord(route, error.reason)
        if record is not None:
            record(found)
    if rewritten:
        graph.eliminate_dead_code()
    return graph


def _rewrite(graph: Graph, product: Any) -> None:
    require(is_op(product, aten.mm), f"the logits come from {describe(product)}, not from a product")
    require(product.target is aten.mm.default, "the product names its output dtype already")
    require(tensor_of(product).device.type == "cuda", "not a CUDA device", code=ReasonCode.NOT_CUDA)
    require(tensor_of(product).dtype == torch.float32, "the product is not in fp32", code=ReasonCode.DTYPE)
    left, right = (_narrow(operand) for operand in product.args)
    require(tensor_of(left[0]).dtype == tensor_of(right[0]).dtype, "two 16-bit dtypes", code=ReasonCode.DTYPE)
    with graph.inserting_before(product):
        operands = [
            source
            if permutation is None
            else insert_call(graph, aten.permute.default, args=(source, permutation), like=product)
            for source, permutation in (left, right)
        ]
        narrow = insert_call(graph, aten.mm.dtype, args=(*operands, torch.float32), like=product)
    product.replace_all_uses_with(narrow)


def _narrow(operand: Any) -> tuple[Node, list[int] | None]:
    """(the 16-bit value behind an fp32 operand, the transposition after the cast or None)."""
    permutation = None
    if is_op(operand, aten.permute, aten.t):
        permutation = [1, 0]
        dims = arguments(operand).get("dims", permutation)
        require(list(dims) == permutation, "an operand is permuted in another way")
        operand = operand.args[0]
    source = cast_source(operand)
    narrow = source is not None and tensor_of(source).dtype in _NARROW
    require(narrow, f"{describe(operand)} is no cast of a 16-bit value", code=ReasonCode.DTYPE)
    assert source is not None
    return source, permutation
