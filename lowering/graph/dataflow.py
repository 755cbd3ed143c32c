"""Questions about the dataflow of an FX graph, shared by the passes: what a node is, what is behind it, who uses it.

Matchers are written against values, never against node names. They raise `MatchError` with a typed `Reason` at the
first thing that is not as it must be; the pass that called them catches it and reports it.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from ..errors import MoEErrorMixin, Reason, ReasonCode

aten = torch.ops.aten
prims = torch.ops.prims

COPIES = (aten.clone, aten.alias, aten.detach, aten.contiguous)
VIEWS = (aten.view.default, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.flatten)
_CASTS = (prims.convert_element_type, aten._to_copy, aten.to)
_CONSTANTS = {aten.zeros: 0, aten.zeros_like: 0, aten.ones: 1, aten.ones_like: 1}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTS = (torch.int32, torch.int64)
# Facts about a node's value, not about its place in the model; a node inserted in its place must not inherit them.
_OWN_META = {"val", "tensor_meta", "example_value", "unbacked_bindings", "eager_input_vals"} | {
    "original_aten",
    "from_node",
    "source_fn_stack",
}
_COMPARED_DEPTH = 8


class MatchError(Exception):
    """A matcher's refusal; `reason` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


def refuse(detail: str, *, code: ReasonCode = ReasonCode.STRUCTURE) -> NoReturn:
    """Raise `MatchError` with a reason of this code."""
    raise MatchError(Reason(code, detail))


def require(condition: bool, detail: str, *, code: ReasonCode = ReasonCode.STRUCTURE) -> None:
    """Raise `MatchError` unless the condition holds."""
    if not condition:
        refuse(detail, code=code)


def is_op(node: object, *ops: Any) -> TypeGuard[Node]:
    """Whether the node calls one of these: overload packets (any overload), single overloads or Python functions."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", node.target)
    return any(op is packet or op is node.target for op in ops)


def describe(node: object) -> str:
    """What a node calls, for the detail of a reason: `aten.mul.Tensor`, `input arg0_1`, `2.5`."""
    if not isinstance(node, Node):
        return repr(node)
    return str(node.target) if node.op == "call_function" else f"{node.op} {node.name}"


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen or custom op by the names of its schema, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    bound = {arg.name: arg.default_value for arg in schema if arg.has_default_value()}
    bound.update(zip((arg.name for arg in schema), node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def tensor_of(node: Node) -> Tensor:
    """The fake tensor [...] a node stands for: its shape, symbolic sizes included, its dtype and device."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        refuse(f"{describe(node)} carries no tensor metadata")
    return value


def _surely_equal(left: Any, right: Any) -> bool:
    return bool(statically_known_true(left == right))


def has_shape(node: Node, shape: Sequence[Any]) -> bool:
    """Whether a node's shape is known to be this one without a guard on a symbolic size."""
    actual = tensor_of(node).shape
    return len(actual) == len(shape) and all(_surely_equal(a, b) for a, b in zip(actual, shape, strict=True))


def has_no_elements(node: Node) -> bool:
    """Whether a node's tensor is known to be empty."""
    return any(_surely_equal(size, 0) for size in tensor_of(node).shape)


def is_last_dim(dim: Any, node: Node) -> bool:
    """Whether a `dim` argument, an int or a list of one, names the last dimension of the node and no other."""
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    return len(dims) == 1 and dims[0] in (-1, tensor_of(node).dim() - 1)


def outputs(node: Node, index: int) -> list[Node]:
    """The nodes that take output `index` of a node with several outputs."""
    return [user for user in node.users if is_op(user, operator.getitem) and user.args[1] == index]


def is_output(node: object, source: Node, *, index: int) -> bool:
    """Whether the node is output `index` of `source`."""
    return is_op(node, operator.getitem) and node.args == (source, index)


def cast_source(node: Any) -> Node | None:
    """The input of a node that changes the dtype and nothing else, or None."""
    source = node.args[0] if is_op(node, *_CASTS) else None
    if not isinstance(source, Node):
        return None
    before, after = tensor_of(source), tensor_of(node)
    return source if before.device == after.device and has_shape(node, before.shape) else None


def peel_copies(node: Any) -> Any:
    """The value behind clones, aliases, detaches and views that keep the shape."""
    while is_op(node, *COPIES, *VIEWS, aten.expand):
        source: Any = node.args[0]
        if not has_shape(node, tensor_of(source).shape):
            break
        node = source
    return node


def peel_casts(node: Any) -> Any:
    """The value behind copies and casts from float to float or from int32/int64 to int32/int64 (rounding allowed)."""
    while True:
        node = peel_copies(node)
        source = cast_source(node)
        if source is None:
            return node
        if not is_rounding(source, node):
            return node
        node = source


def is_rounding(source: Node, node: Node) -> bool:
    """Whether a cast stays among the floats the ops compute in, or among int32 and int64: what loses more is no mere
    change of dtype, as to float8 or to integers.
    """
    dtypes = {tensor_of(source).dtype, tensor_of(node).dtype}
    return dtypes.issubset(_FLOATS) or dtypes.issubset(_INTS)


def peel_views(node: Any) -> Any:
    """The value behind copies and row-major reinterpretations (view, reshape, unsqueeze, ...); no cast, no expand."""
    while is_op(peel_copies(node), *VIEWS):
        node = peel_copies(node).args[0]
    return peel_copies(node)


def origin(node: Any) -> Any:
    """The value behind everything `peel_casts` and `peel_views` pass over."""
    while (behind := peel_views(peel_casts(node))) is not node:
        node = behind
    return node


def peel_widening(node: Any) -> Any:
    """The value behind copies and casts that lose nothing: from float16 or bfloat16 to a wider float."""
    while True:
        node = peel_copies(node)
        source = cast_source(node)
        if source is None or tensor_of(source).dtype not in (torch.float16, torch.bfloat16):
            return node
        if tensor_of(node).dtype not in (torch.float32, torch.float64):
            return node
        node = source


def transposed_source(operand: Any) -> Node | None:
    """The weight [S, D] behind a right operand [D, S], or None."""
    if not is_op(operand, aten.permute, aten.t) or list(arguments(operand).get("dims", [1, 0])) != [1, 0]:
        return None
    weight: Any = operand.args[0]
    return weight


def constant(node: Any) -> float | None:
    """The one number a node is filled with (a Python number, full, zeros, scalar_tensor, expanded or cast), or None."""
    if isinstance(node, bool | int | float):
        return node
    node = peel_casts(node)
    if is_op(node, aten.expand, *VIEWS):
        return constant(node.args[0])
    if is_op(node, *_CONSTANTS):
        return next(fill for op, fill in _CONSTANTS.items() if is_op(node, op))
    if is_op(node, aten.full, aten.full_like):
        fill = node.args[1]
    elif is_op(node, aten.scalar_tensor):
        fill = node.args[0]
    else:
        return None
    return fill if isinstance(fill, bool | int | float) else None


def same_value(left: Any, right: Any) -> bool:
    """Whether two nodes hold the same value: the same node behind copies, or the same pure op on the same values."""
    return _same(left, right, _COMPARED_DEPTH)


def _same(left: Any, right: Any, depth: int) -> bool:
    left, right = peel_copies(left), peel_copies(right)
    if not isinstance(left, Node) or not isinstance(right, Node):
        if isinstance(left, list | tuple) and isinstance(right, list | tuple):
            return len(left) == len(right) and all(_same(a, b, depth) for a, b in zip(left, right, strict=True))
        return type(left) is type(right) and bool(left == right)
    if left is right:
        return True
    if depth == 0 or left.op != "call_function" or left.target != right.target or not is_pure(left):
        return False
    if left.kwargs.keys() != right.kwargs.keys() or len(left.args) != len(right.args):
        return False
    pairs = [*zip(left.args, right.args, strict=True), *((left.kwargs[k], right.kwargs[k]) for k in left.kwargs)]
    return all(_same(a, b, depth - 1) for a, b in pairs)


def is_pure(node: Node) -> bool:
    """Whether two calls with the same arguments give the same value."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags


def may_move(node: Node) -> bool:
    """Whether a node may change places with others that it does not depend on."""
    return is_pure(node) if isinstance(node.target, OpOverload) else not node.is_impure()


def ancestors(node: Node, *, stop: Callable[[Node], bool]) -> Iterator[Node]:
    """A node and everything it is computed from, each once; inputs of a node for which `stop` holds are not visited."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        yield current
        if not stop(current):
            fresh = [source for source in current.all_input_nodes if source not in seen]
            seen.update(fresh)
            waiting.extend(fresh)


def backward_nodes(graph: Graph) -> set[Node]:
    """Everything a joint graph computes from the incoming gradients; empty for an inference graph."""
    found: set[Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and node.name.startswith("tangents")
        if is_tangent or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def place_of(node: Node) -> dict[str, Any]:
    """What the meta of a node says of its place in the model, without what it says of its value."""
    return {key: value for key, value in node.meta.items() if key not in _OWN_META}


def insert_call(graph: Graph, target: Any, *, args: tuple[Any, ...], like: Node) -> Node:
    """Insert a call at the graph's insertion point. Its place in the model (module, stack trace, forward or backward,
    recomputation) is copied from `like`; its fake value, shape and dtype included, is computed from those of `args`.

    Raises `MatchError`, and inserts nothing, where an op of ours does not take them.
    """
    value = _fake_result(target, args)
    node = graph.call_function(target, args)
    node.meta = place_of(like)
    if isinstance(target, OpOverload):
        node.meta["original_aten"] = target  # generated kernels are named after it
    node.meta["val"] = value
    return node


def _fake_result(target: Any, args: tuple[Any, ...]) -> Any:
    fakes = map_arg(args, lambda arg: arg.meta["val"])
    mode = next((fake.fake_mode for fake in _leaves(fakes) if hasattr(fake, "fake_mode")), None)
    try:
        with mode or nullcontext(), enable_python_dispatcher():
            return target(*fakes)
    except (ValueError, TypeError, RuntimeError) as error:
        if not isinstance(error, MoEErrorMixin):
            raise
        raise MatchError(Reason(ReasonCode.OPTION, str(error))) from error


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def insert_cast(graph: Graph, source: Node, *, dtype: torch.dtype, like: Node) -> Node:
    """The node itself where it already has this dtype, else a cast of it at the graph's insertion point; same shape."""
    if tensor_of(source).dtype == dtype:
        return source
    return insert_call(graph, prims.convert_element_type.default, args=(source, dtype), like=like)


def sort_nodes(graph: Graph) -> None:
    """Put every node behind its inputs, and otherwise leave the order as it is."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    missing = {node: len(node.all_input_nodes) for node in graph.nodes}
    ready = [(index, node) for node, index in place.items() if not missing[node]]
    heapq.heapify(ready)
    last, placed = graph._root, 0
    while ready:
        _, node = heapq.heappop(ready)
        last.append(node)
        last, placed = node, placed + 1
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, (place[user], user))
    assert placed == len(place), "a cycle"
