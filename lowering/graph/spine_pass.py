"""Rewrite the stock grouped-GEMM spine of transformers (or a copy of it) to the stage ops.

    sort ids -> gather rows -> histogram, cumsum -> grouped GEMM [+ bias] -> activation -> grouped GEMM [+ bias]
    -> times weight -> inverse permutation -> view [T, K, H] -> sum over K

The anchor is the pair of grouped GEMMs that share one `cumsum(histc(sort(ids)))`. Values are compared, never names.
The first GEMM becomes `moe_expert_up(act="identity")`, the activation stays as it is (`activation_pass` folds it), and
what follows the second GEMM becomes `moe_expert_down` and `moe_combine`. In a joint training graph the backward keeps
its own nodes; permutation and GEMM results it reads are replaced by the equal values of the new ops.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops  # noqa: F401  (registers the ops that are looked up below)
from ..errors import Reason, ReasonCode
from .dataflow import (
    VIEWS,
    MatchError,
    arguments,
    aten,
    constant,
    describe,
    insert_call,
    insert_cast,
    is_op,
    is_output,
    only_user,
    origin,
    outputs,
    peel_casts,
    peel_views,
    refuse,
    require,
    tensor_of,
)

moe = torch.ops.diffulex


@dataclasses.dataclass(frozen=True)
class SpineRecord:
    """What became of one grouped GEMM: rewritten when `reason` is None. `node` is its FX node."""

    node: Node
    reason: Reason | None = None


@dataclasses.dataclass(frozen=True)
class _Spine:
    """The values a rewrite needs: inputs of the ops, and the nodes whose users get the ops' results."""

    sort: Node
    ids: Node
    num_experts: int
    top_k: int
    hidden: Node
    up: Node
    up_weight: Node
    up_bias: Node | None
    up_result: Node
    down: Node
    down_weight: Node
    down_bias: Node | None
    down_result: Node
    weights: Node
    total: Node


def spine_pass(graph: Graph, *, record: Callable[[SpineRecord], None] | None = None) -> Graph:
    """Rewrite every spine that is understood; tell `record` about each first grouped GEMM, refusals included."""
    backward = _backward_nodes(graph)
    paired: set[Node] = set()
    for node in [node for node in graph.nodes if _is_grouped_mm(node) and node not in backward]:
        if node in paired:
            continue
        try:
            spine = _match(node, backward)
            paired.add(spine.down)
            _rewrite(graph, spine, backward)
            found = SpineRecord(node)
        except MatchError as error:
            found = SpineRecord(node, error.reason)
        if record is not None:
            record(found)
    return graph


def _fallback_op() -> Any:
    """transformers' grouped GEMM for dtypes `_grouped_mm` does not compile with; exists once transformers is loaded."""
    return getattr(torch.ops.transformers, "grouped_mm_fallback", None)


def _is_grouped_mm(node: Node) -> bool:
    fallback = _fallback_op()
    return is_op(node, aten._grouped_mm) or (fallback is not None and is_op(node, fallback))


def _backward_nodes(graph: Graph) -> set[Node]:
    """Everything a joint graph computes from the incoming gradients; empty for an inference graph."""
    found: set[Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and node.name.startswith("tangents")
        if is_tangent or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _operands(node: Node) -> tuple[Node, Node, Node]:
    """(rows, weight, offsets) of a grouped GEMM without options."""
    given = list(arguments(node).values())
    rows, weight, offsets, *options = given
    require(all(option in (None, False) for option in options[:1]), "the grouped GEMM has a bias of its own")
    require(isinstance(offsets, Node), "the grouped GEMM has no offsets")
    return rows, weight, offsets


def _match(up: Node, backward: set[Node]) -> _Spine:
    rows, up_weight, offsets = _operands(up)
    sort, num_experts = _match_offsets(offsets)
    hidden, top_k = _match_gather(_peel_sentinels(rows), sort)
    downs = [user for user in offsets.users if user is not up and user not in backward and _is_grouped_mm(user)]
    require(len(downs) == 1, f"{len(downs)} further grouped GEMMs share the offsets where one was looked for")
    down = downs[0]
    _, down_weight, _ = _operands(down)
    up_bias, up_result = _match_bias(up, sort, backward)
    down_bias, down_result = _match_bias(down, sort, backward)
    weights, total = _match_tail(down_result, sort, top_k, backward)
    ids = arguments(sort)["self"]
    return _Spine(
        sort, ids, num_experts, top_k, hidden, up, up_weight, up_bias, up_result,
        down, down_weight, down_bias, down_result, weights, total,
    )  # fmt: skip


def _match_offsets(offsets: Node) -> tuple[Node, int]:
    """offsets = cumsum(histc(sorted ids, E bins from 0 to E - 1))."""
    require(is_op(offsets, aten.cumsum), f"offsets come from {describe(offsets)}, not from a cumsum")
    histogram = peel_casts(offsets.args[0])
    require(is_op(histogram, aten.histc), f"offsets sum {describe(histogram)}, not a histogram")
    given = arguments(histogram)
    bins, low, high = given["bins"], given["min"], given["max"]
    require((low, high) == (0, bins - 1), f"the histogram covers [{low}, {high}] with {bins} bins")
    ordered = origin(_through_cast(given["self"]))
    sort = ordered.args[0] if is_op(ordered, operator.getitem) else None
    if not is_op(sort, aten.sort) or not is_output(ordered, sort, index=0):
        refuse(f"the histogram counts {describe(ordered)}, not sorted ids")
    require(not arguments(sort).get("descending"), "the ids are sorted in descending order")
    return sort, bins


def _through_cast(node: Any) -> Any:
    """Behind an int-to-float cast as well: histc takes floats on the CPU, exact for any expert count."""
    node = peel_casts(node)
    while is_op(node, torch.ops.prims.convert_element_type, aten._to_copy):
        node = peel_casts(node.args[0])
    return node


def _is_permutation(node: Any, sort: Node) -> bool:
    return is_output(peel_views(peel_casts(node)), sort, index=1)


def _single_index(node: Node) -> Any:
    """The index tensor of `source[index]` along the first dimension."""
    indices = arguments(node)["indices"]
    require(len(indices) == 1 and indices[0] is not None, f"{describe(node)} indexes more than rows")
    return indices[0]


def _match_gather(rows: Node, sort: Node) -> tuple[Node, int]:
    """rows = hidden[permutation // K]; returns (hidden [T, H], K)."""
    rows = _peel_sentinels(peel_casts(rows))
    require(is_op(rows, aten.index), f"the first GEMM reads {describe(rows)}, not gathered rows")
    index = peel_casts(_single_index(rows))
    if _is_permutation(index, sort):
        return rows.args[0], 1
    require(is_op(index, aten.div, aten.floor_divide), f"rows are gathered by {describe(index)}")
    numerator, top_k = index.args[0], constant(index.args[1])
    require(is_op(index, aten.floor_divide) or index.kwargs.get("rounding_mode") == "floor", "a division that rounds")
    require(_is_permutation(numerator, sort) and isinstance(top_k, int), "rows are not gathered by permutation // K")
    assert isinstance(top_k, int)
    return rows.args[0], top_k


def _peel_sentinels(node: Any) -> Any:
    """The value behind `where(ids >= E, 0, value)`: rows of other ranks' experts, which the ops leave zero themselves."""
    node = peel_casts(node)
    while is_op(node, aten.where):
        condition, chosen, other = node.args
        mask = peel_views(condition)
        while is_op(mask, aten.expand):
            mask = peel_views(mask.args[0])
        if not is_op(mask, aten.ge) or constant(chosen) != 0:
            break
        node = peel_casts(other)
    return node


def _match_bias(gemm: Node, sort: Node, backward: set[Node]) -> tuple[Node | None, Node]:
    """(bias [E, J] or None, the node with the bias added) of `gemm + bias[sorted ids]`."""
    users = [user for user in gemm.users if user not in backward]
    if len(users) != 1 or not is_op(users[0], aten.add):
        return None, gemm
    add = users[0]
    other = next(arg for arg in add.args if arg is not gemm)
    if not is_op(peel_casts(other), aten.index):
        return None, gemm
    gathered = peel_casts(other)
    index = peel_casts(_single_index(gathered))
    if is_op(index, aten.clamp, aten.clamp_max, aten.minimum):
        index = peel_casts(index.args[0])
    require(is_output(index, sort, index=0), "a bias that is not indexed by the sorted ids")
    require(arguments(add).get("alpha", 1) == 1, "a bias with a factor")
    bias: Any = gathered.args[0]
    return bias, add


def _match_tail(result: Node, sort: Node, top_k: int, backward: set[Node]) -> tuple[Node, Node]:
    """(weights [T, K] or [N], the sum node) of `sum((result * weights[permutation])[inverse].view(T, K, H), 1)`."""
    node = result
    user = _next_user(node, backward)
    while is_op(user, aten.where, torch.ops.prims.convert_element_type, aten._to_copy):
        node, user = user, _next_user(user, backward)
    require(is_op(user, aten.mul), f"the second GEMM's result goes to {describe(user)}, not to a product")
    scale = [arg for arg in user.args if arg is not node]
    require(len(scale) == 1, "the second GEMM's result is squared")
    gathered = _peel_sentinels(origin(scale[0]))
    require(is_op(gathered, aten.index), f"rows are weighted by {describe(gathered)}")
    require(_is_permutation(_single_index(gathered), sort), "the weights are not in expert order")
    weights = origin(gathered.args[0])
    node, user = user, _next_user(user, backward)
    while is_op(user, aten.where, torch.ops.prims.convert_element_type, aten._to_copy):
        node, user = user, _next_user(user, backward)
    require(is_op(user, aten.index), f"weighted rows go to {describe(user)}, not back to slot order")
    inverse = _single_index(user)
    require(is_op(inverse, aten.index_put), f"slot order comes from {describe(inverse)}")
    put = arguments(inverse)
    require(len(put["indices"]) == 1 and _is_permutation(put["indices"][0], sort), "not the inverse permutation")
    require(is_op(peel_casts(put["values"]), torch.ops.prims.iota, aten.arange), "not the inverse permutation")
    require(not put["accumulate"], "not the inverse permutation")
    view = _next_user(user, backward)
    require(is_op(view, *VIEWS) and tensor_of(view).shape[1:2] == (top_k,), "slots are not viewed as [T, K, H]")
    total = _next_user(view, backward)
    while is_op(total, torch.ops.prims.convert_element_type):
        total = _next_user(total, backward)
    require(is_op(total, aten.sum) and list(arguments(total)["dim"]) == [1], "slots are not summed over K")
    require(not arguments(total).get("keepdim"), "the sum keeps the K dimension")
    return weights, total


def _next_user(node: Node, backward: set[Node]) -> Node:
    users = [user for user in node.users if user not in backward]
    return users[0] if len(users) == 1 else only_user(node)


def _weight(graph: Graph, weight: Node, *, like: Node) -> Node:
    """The GEMM's weight [E, in, out] as the ops want it, [E, out, in]: strides change, no data moves."""
    if is_op(weight, aten.permute) and list(weight.args[1]) == [0, 2, 1]:
        source: Node = weight.args[0]
        return source
    if is_op(weight, aten.transpose) and {d % 3 for d in weight.args[1:]} == {1, 2}:
        source = weight.args[0]
        return source
    return insert_call(graph, aten.permute.default, args=(weight, [0, 2, 1]), like=like)


def _rewrite(graph: Graph, spine: _Spine, backward: set[Node]) -> None:
    dtype, total_dtype = tensor_of(spine.up).dtype, tensor_of(spine.total).dtype
    narrowed = all(tensor_of(user).dtype == dtype for user in spine.total.users if user not in backward)
    # a sum that stays in a wider dtype would be rounded by the op's result
    require(total_dtype == dtype or narrowed, f"the sum over K stays in {total_dtype}", code=ReasonCode.DTYPE)
    up, down, total = spine.up, spine.down, spine.total
    with graph.inserting_before(spine.sort):
        ids = insert_call(graph, aten.reshape.default, args=(spine.ids, [-1, spine.top_k]), like=up)
        dispatch = insert_call(graph, moe.moe_dispatch.default, args=(ids, spine.num_experts), like=up)
        items = [insert_call(graph, operator.getitem, args=(dispatch, index), like=up) for index in range(3)]
        order, _, offsets = items
        # a backward that reads the stock permutation gets ours, so that forward and backward agree on it
        long_order = insert_cast(graph, order, dtype=torch.int64, like=spine.sort)
        sorted_ids = insert_call(graph, aten.index.Tensor, args=(spine.ids, [long_order]), like=spine.sort)
    for index, new in ((0, sorted_ids), (1, long_order)):
        for output in outputs(spine.sort, index):
            output.replace_all_uses_with(new)
    with graph.inserting_before(spine.up_result):
        hidden = insert_cast(graph, spine.hidden, dtype=dtype, like=up)
        weight = _weight(graph, spine.up_weight, like=up)
        args = (hidden, weight, spine.up_bias, order, offsets, spine.top_k)
        spine.up_result.replace_all_uses_with(insert_call(graph, moe.moe_expert_up.default, args=args, like=up))
    with graph.inserting_before(spine.down_result):
        activation = insert_cast(graph, _operands(down)[0], dtype=dtype, like=down)
        weight = _weight(graph, spine.down_weight, like=down)
        args = (activation, weight, spine.down_bias, order, offsets)
        slots = insert_call(graph, moe.moe_expert_down.default, args=args, like=down)
        rows = insert_call(graph, aten.index.Tensor, args=(slots, [long_order]), like=down)
    spine.down_result.replace_all_uses_with(rows)
    with graph.inserting_before(total):
        weights = insert_call(graph, aten.reshape.default, args=(spine.weights, [-1, spine.top_k]), like=total)
        out = insert_call(graph, moe.moe_combine.default, args=(slots, weights), like=total)
        out = insert_cast(graph, out, dtype=total_dtype, like=total)
    total.replace_all_uses_with(out)
    graph.eliminate_dead_code()
