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
from collections.abc import Callable, Sequence
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
    backward_nodes,
    cast_source,
    constant,
    describe,
    has_shape,
    insert_call,
    insert_cast,
    is_op,
    is_output,
    is_rounding,
    origin,
    outputs,
    peel_casts,
    peel_copies,
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


@dataclasses.dataclass(frozen=True)
class _Slots:
    """The sorted slots all parts of a spine share, and what is not its forward: the nodes of the backward."""

    sort: Node
    num_experts: int
    backward: set[Node]

    @property
    def ids(self) -> Node:
        ids: Node = arguments(self.sort)["self"]
        return ids

    def users(self, node: Node) -> list[Node]:
        """The users of a node in the forward."""
        return [user for user in node.users if user not in self.backward]

    def next_user(self, node: Node) -> Node:
        """The one user in the forward."""
        users = self.users(node)
        detail = f"{describe(node)} has {len(users)} users where one was looked for"
        require(len(users) == 1, detail, code=ReasonCode.SHARED_USE)
        return users[0]

    def past_casts(self, node: Node) -> Node:
        """The last of the casts between floats that follow the node in the forward, or the node itself."""
        while cast_source(user := self.next_user(node)) is node:
            dtypes = f"{tensor_of(node).dtype} to {tensor_of(user).dtype}"
            require(is_rounding(node, user), f"rows are cast from {dtypes}", code=ReasonCode.DTYPE)
            node = user
        return node

    def _masks_sentinels(self, node: Any) -> bool:
        """Whether it is `where(sorted ids >= E, 0, value)`: rows of other ranks' experts, which the ops leave zero."""
        if not is_op(node, aten.where) or len(node.args) != 3 or constant(node.args[1]) != 0:
            return False
        mask = peel_views(node.args[0])
        while is_op(mask, aten.expand):
            mask = peel_views(mask.args[0])
        if not is_op(mask, aten.ge) or constant(mask.args[1]) != self.num_experts:
            return False
        return is_output(peel_casts(mask.args[0]), self.sort, index=0)

    def peel_sentinels(self, node: Any) -> Any:
        """The value behind casts and masked sentinels."""
        node = peel_casts(node)
        while self._masks_sentinels(node):
            node = peel_casts(node.args[2])
        return node

    def past_sentinels(self, node: Node) -> Node:
        """The node, or what masks the sentinels in it, where nothing else of the forward reads it."""
        while len(users := self.users(node)) == 1 and self._masks_sentinels(users[0]) and users[0].args[2] is node:
            node = users[0]
        return node


def spine_pass(graph: Graph, *, record: Callable[[SpineRecord], None] | None = None) -> Graph:
    """Rewrite every spine that is understood; tell `record` about each first grouped GEMM, refusals included."""
    backward = backward_nodes(graph)
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


def _operands(node: Node) -> tuple[Node, Node, Node]:
    """(rows [N, X], weight [E, X, Y], offsets [E]) of a grouped GEMM without options."""
    given = arguments(node)
    names = ("self", "mat2", "offs") if is_op(node, aten._grouped_mm) else ("input", "weight", "offs")
    rows, weight, offsets = (given[name] for name in names)
    require(given.get("bias") is None, "the grouped GEMM has a bias of its own")
    ranks = tensor_of(rows).dim(), tensor_of(weight).dim()
    require(ranks == (2, 3), f"a grouped GEMM of operands of ranks {ranks}", code=ReasonCode.SHAPE)
    dtypes = {tensor_of(operand).dtype for operand in (node, rows, weight)}
    require(len(dtypes) == 1, f"a grouped GEMM over the dtypes {dtypes}", code=ReasonCode.DTYPE)
    return rows, weight, offsets


def _match(up: Node, backward: set[Node]) -> _Spine:
    rows, up_weight, offsets = _operands(up)
    slots = _match_offsets(offsets, backward)
    hidden, top_k = _match_gather(rows, slots)
    downs = [user for user in offsets.users if user is not up and user not in backward and _is_grouped_mm(user)]
    require(len(downs) == 1, f"{len(downs)} further grouped GEMMs share the offsets where one was looked for")
    down = downs[0]
    _, down_weight, _ = _operands(down)
    up_bias, up_result = _match_bias(up, slots)
    down_bias, down_result = _match_bias(down, slots)
    shape = (tensor_of(hidden).shape[0], top_k, tensor_of(down).shape[1])
    weights, total = _match_tail(down_result, slots, shape)
    return _Spine(
        slots.sort, slots.ids, slots.num_experts, top_k, hidden, up, up_weight, up_bias, up_result,
        down, down_weight, down_bias, down_result, weights, total,
    )  # fmt: skip


def _match_offsets(offsets: Node, backward: set[Node]) -> _Slots:
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
    ids = tensor_of(arguments(sort)["self"])
    require(ids.dim() == 1, f"the ids are sorted along one of {ids.dim()} dimensions", code=ReasonCode.SHAPE)
    require(ids.dtype in (torch.int32, torch.int64), f"the ids are {ids.dtype}", code=ReasonCode.DTYPE)
    return _Slots(sort, bins, backward)


def _through_cast(node: Any) -> Any:
    """Behind a cast from int to float32 as well: histc takes floats on the CPU, exact for any expert count."""
    node = peel_casts(node)
    source = cast_source(node)
    exact = source is not None and tensor_of(node).dtype in (torch.float32, torch.float64)
    return peel_casts(source) if exact else node


def _is_permutation(node: Any, sort: Node) -> bool:
    return is_output(peel_views(peel_casts(node)), sort, index=1)


def _single_index(node: Node) -> Any:
    """The index tensor of `source[index]` along the first dimension."""
    indices = arguments(node)["indices"]
    require(len(indices) == 1 and indices[0] is not None, f"{describe(node)} indexes more than rows")
    return indices[0]


def _match_gather(rows: Node, slots: _Slots) -> tuple[Node, int]:
    """rows = hidden[permutation // K]; returns (hidden [T, H], K)."""
    rows = slots.peel_sentinels(rows)
    require(is_op(rows, aten.index), f"the first GEMM reads {describe(rows)}, not gathered rows")
    hidden, top_k = arguments(rows)["self"], 1
    index = peel_casts(_single_index(rows))
    if not _is_permutation(index, slots.sort):
        require(is_op(index, aten.div, aten.floor_divide), f"rows are gathered by {describe(index)}")
        given = arguments(index)
        rounds_down = is_op(index, aten.floor_divide) or given.get("rounding_mode") == "floor"
        top_k = given["other"]
        require(rounds_down and isinstance(top_k, int), f"rows are gathered by {describe(index)} of {top_k}")
        require(_is_permutation(given["self"], slots.sort), "rows are not gathered by permutation // K")
    num_tokens = tensor_of(hidden).shape[0]
    require(has_shape(slots.ids, [num_tokens * top_k]), "there are not K ids a token", code=ReasonCode.SHAPE)
    return hidden, top_k


def _match_bias(gemm: Node, slots: _Slots) -> tuple[Node | None, Node]:
    """(bias [E, J] or None, the node with the bias added and sentinels masked) of `gemm + bias[sorted ids]`."""
    users = slots.users(gemm)
    operands = users[0].args[:2] if len(users) == 1 and is_op(users[0], aten.add) else ()
    others = [peel_copies(arg) for arg in operands if arg is not gemm]
    if len(others) != 1 or not is_op(others[0], aten.index):
        return None, slots.past_sentinels(gemm)
    add, gathered = users[0], others[0]
    index, clamped = peel_casts(_single_index(gathered)), False
    while is_op(index, aten.clamp, aten.clamp_min, aten.clamp_max):
        clamped = True
        bounds = arguments(index)
        least, most = bounds.get("min"), bounds.get("max")
        keeps_ids = least in (None, 0) and most in (None, slots.num_experts - 1)
        require(keeps_ids, f"a bias indexed by ids clamped to [{least}, {most}]")
        index = peel_casts(bounds["self"])
    require(is_output(index, slots.sort, index=0), "a bias that is not indexed by the sorted ids")
    require(arguments(add).get("alpha", 1) == 1, "a bias with a factor")
    bias: Any = gathered.args[0]
    shape = [slots.num_experts, tensor_of(gemm).shape[1]]
    require(has_shape(bias, shape), "a bias that is not one row per expert", code=ReasonCode.SHAPE)
    dtypes = {tensor_of(node).dtype for node in (gemm, bias, add)}
    require(len(dtypes) == 1, f"a bias added over the dtypes {dtypes}", code=ReasonCode.DTYPE)
    result = slots.past_sentinels(add)
    # only ids of no expert need the clamp, and their rows are a bias then, which the ops' are not
    masked = result is not add or _masked_product(add, slots)
    require(masked or not clamped, "a bias by clamped ids, in rows that nothing masks afterwards")
    return bias, result


def _masked_product(node: Node, slots: _Slots) -> bool:
    """Whether the rows are only read by a product with the weights, whose sentinels are masked."""
    users = slots.users(node)
    while len(users) == 1 and cast_source(users[0]) is node:
        node, users = users[0], slots.users(users[0])
    return len(users) == 1 and is_op(users[0], aten.mul) and slots.past_sentinels(users[0]) is not users[0]


def _match_tail(result: Node, slots: _Slots, shape: Sequence[Any]) -> tuple[Node, Node]:
    """(weights [T, K] or [N], the sum node) of `sum((result * weights[permutation])[inverse].view(T, K, H), 1)`."""
    node = slots.past_casts(result)
    product = slots.next_user(node)
    require(is_op(product, aten.mul), f"the second GEMM's result goes to {describe(product)}, not to a product")
    scale: list[Any] = [arg for arg in product.args if arg is not node]
    require(len(scale) == 1 and isinstance(scale[0], Node), "the rows are not weighted by a tensor")
    num_slots = tensor_of(slots.ids).shape[0]
    require(has_shape(scale[0], [num_slots, 1]), "the weights are not one per row", code=ReasonCode.SHAPE)
    gathered = slots.peel_sentinels(origin(scale[0]))
    require(is_op(gathered, aten.index), f"rows are weighted by {describe(gathered)}")
    require(_is_permutation(_single_index(gathered), slots.sort), "the weights are not in expert order")
    source = arguments(gathered)["self"]
    per_slot = has_shape(source, [num_slots]) or has_shape(source, [num_slots, 1])
    require(
        per_slot and tensor_of(source).is_floating_point(),
        "the weights are not one number per slot",
        code=ReasonCode.SHAPE,
    )
    node = slots.past_casts(slots.past_sentinels(product))
    ordered = slots.next_user(node)
    require(is_op(ordered, aten.index), f"weighted rows go to {describe(ordered)}, not back to slot order")
    _match_inverse(_single_index(ordered), slots.sort)
    view = slots.next_user(ordered)
    require(is_op(view, *VIEWS) and has_shape(view, shape), "slots are not viewed as [T, K, H]")
    total = slots.next_user(slots.past_casts(view))
    is_sum = is_op(total, aten.sum) and list(arguments(total).get("dim") or ()) == [1]
    require(is_sum, f"slots go to {describe(total)}, not to a sum over K")
    require(not arguments(total)["keepdim"], "the sum keeps the K dimension")
    return origin(source), total


def _match_inverse(inverse: Any, sort: Node) -> None:
    """inverse[permutation] = 0, 1, 2, ..."""
    require(is_op(inverse, aten.index_put), f"slot order comes from {describe(inverse)}")
    put = arguments(inverse)
    require(len(put["indices"]) == 1 and _is_permutation(put["indices"][0], sort), "not the inverse permutation")
    values = peel_casts(put["values"])
    counts = is_op(values, aten.arange.default)
    counts |= is_op(values, torch.ops.prims.iota) and (values.kwargs["start"], values.kwargs["step"]) == (0, 1)
    require(counts and not put["accumulate"], "not the inverse permutation")


def _weight(graph: Graph, weight: Node, *, like: Node) -> Node:
    """The GEMM's weight [E, in, out] as the ops want it, [E, out, in]: strides change, no data moves."""
    if is_op(weight, aten.permute) and arguments(weight)["dims"] == [0, 2, 1]:
        source: Node = arguments(weight)["self"]
        return source
    return insert_call(graph, aten.permute.default, args=(weight, [0, 2, 1]), like=like)


def _rewrite(graph: Graph, spine: _Spine, backward: set[Node]) -> None:
    dtype, total_dtype = tensor_of(spine.up).dtype, tensor_of(spine.total).dtype
    readers = [user for user in spine.total.users if user not in backward]
    narrowed = all(cast_source(user) is spine.total and tensor_of(user).dtype == dtype for user in readers)
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
        args: tuple[Any, ...] = (hidden, weight, spine.up_bias, order, offsets, spine.top_k)
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
