"""The experts of one token as products with vectors, where their slots stay as they are (`unsorted_slots`).

Two kernels in place of three: the down stage adds up the slots where nothing but `moe_combine` reads them, and reads
ids and weights before the kernel ahead of it has ended, where these weights are inputs that only expert GEMMs read. The
first GEMM, somewhere before, had waited for whatever wrote them, see `early`.
"""

from __future__ import annotations

import functools
import operator
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx import Node

from .. import ops  # noqa: F401  the ops have to exist
from ..activation import intermediate_size
from ..graph.dataflow import arguments, is_op, outputs
from ..ops import DOWN_OPS, UP_OPS
from ..schedule.device import device_spec
from ..templates.render import ExpertGemmVariant
from ..templates.vectors import VectorSum, VectorUp
from . import _compat
from .early import begins_early, told
from .gemm_plan import KERNEL_DTYPES

if TYPE_CHECKING:
    from .lowerings import SharedTiles

_OPS = torch.ops.diffulex
# by graph: buffers [1, H] that hold the sum of slots, in the place of the slots
_sums: weakref.WeakKeyDictionary[Any, dict[str, Summed]] = weakref.WeakKeyDictionary()


class Summed(NamedTuple):
    """Of slots [K, H] in whose place there is their sum [1, H] fp32: their dtype, and whether the kernel has a shared
    expert's result, too, so that what reads both is another kernel.
    """

    dtype: torch.dtype
    beside_shared: bool


@_compat.SymbolicGridFn
def _programs(_rows: Any, _width: Any, meta: dict[str, Any]) -> tuple[Any, Any, Any]:
    return (meta["PROGRAMS"], 1, 1)


def lower_vectors(
    variant: ExpertGemmVariant, inputs: list[Any], *, ids: Any, shared: SharedTiles | None
) -> tuple[Any, str] | None:
    """What becomes of an expert GEMM over one token's slots, [K, I] or the sum [1, H], and what to tell of it.

    inputs: A and W, realized. With `shared` it is a pair, whose second is the shared expert's, [1, S] or [1, H]. None
    where the weights, their bias or who reads the result are not as the kernels take.
    """
    node = _compat.current_fx_node()
    hidden, weight = inputs[:2]
    sizes, strides = (tuple(map(_compat.static_size, of())) for of in (weight.get_size, weight.get_stride))
    if node is None or variant.bias or strides[2] != 1:
        return None
    top_k = _compat.static_size(ids.get_size()[1])
    num_experts, rows, depth = sizes
    size = weight.get_dtype().itemsize
    if is_op(node, *UP_OPS):
        if shared is not None and shared.depth != depth:
            return None
        width = intermediate_size(variant.act, rows)
        up = VectorUp(
            *(top_k, width, depth, num_experts, size),
            act=variant.act,
            interleaved=variant.interleaved,
            shared_width=0 if shared is None else shared.width,
        )
        return _run(up, [hidden, weight, ids], hidden.get_dtype(), size=[top_k, width], shared=shared)
    combine = _sum_of(node)
    weights = None if combine is None else _compat.V.graph.env.get(arguments(combine)["weights"])
    if weights is None or (shared is not None and shared.width != rows):  # computed later; no column for each program
        return None
    num_sms = device_spec(weight.get_device().index or 0).num_sms
    read = ["w2"] if shared is None else ["w2", "shared_w2"]
    ahead = all(_nobody_writes(arguments(node)[name]) for name in read)
    beside = 0 if shared is None else shared.depth
    total = VectorSum(top_k, rows, depth, num_experts, size, ahead=ahead, num_sms=num_sms, shared_depth=beside)
    inputs = [hidden, weight, ids, _compat.realize_inputs(weights)]
    result, words = _run(total, inputs, torch.float32, size=[1, rows], shared=shared)
    summed = result if shared is None else result[0]
    known = Summed(hidden.get_dtype(), beside_shared=shared is not None)
    _sums.setdefault(_compat.V.graph, {})[summed.get_name()] = known
    return result, f"{words}, adds up the slots"


def summed_slots(slots: Any) -> Summed | None:
    """What is to know where the IR node is the sum of slots, or None: it is the slots."""
    return _sums.get(_compat.V.graph, {}).get(slots.maybe_get_name())  # None of what is no buffer


@functools.cache
def _template(name: str, source: str) -> Any:
    return _compat.TritonTemplate(name=name, grid=_programs, source=source)


def _run(
    kernel: VectorUp | VectorSum, inputs: list[Any], dtype: torch.dtype, *, size: list[int], shared: SharedTiles | None
) -> tuple[Any, str]:
    early = begins_early(inputs[1].get_device())
    out = None if shared is None else shared.empty_result()
    more = [] if shared is None else _compat.realize_inputs(shared.hidden, *shared.weights, out)
    result = _compat.run_template(
        _template(kernel.name, kernel.source()),
        [*inputs, *more],
        _compat.fixed_layout(inputs[1], dtype, size),
        num_warps=kernel.num_warps,
        num_stages=3,
        constants={**kernel.constants, "PROGRAMS": kernel.programs},
        mutated_inputs=more[-1:] or None,
        early=early,
    )
    return result if out is None else (result, out), f"triton {kernel.name}{told(early)}"


def _sum_of(down: Node) -> Node | None:
    """The `moe_combine` that alone reads one token's slots of a down stage, and adds all of them up, or None."""
    if not is_op(down, *DOWN_OPS):
        return None
    found = [down] if is_op(down, _OPS.moe_expert_down) else outputs(down, 0)
    if len(found) != 1 or len(found[0].users) != 1:
        return None
    (slots,) = found
    (combine,) = slots.users
    if not is_op(combine, _OPS.moe_combine):
        return None
    given = arguments(combine)
    weights = given["weights"]
    if given["slots"] is not slots or given["ids"] is not None or weights is slots:
        return None
    value = weights.meta["val"]
    sizes = tuple(map(_compat.known_size, value.shape))
    is_row = sizes == (1, _compat.known_size(slots.meta["val"].shape[0])) and None not in sizes
    return combine if is_row and value.dtype in KERNEL_DTYPES else None


def weights_first(dispatch: Node | None) -> None:
    """Put what computes the weights of the sum ahead of the down stage, where Inductor has put it behind.

    For the slots of a dispatch that stay as they are. Nothing is moved past what writes to memory.
    """
    assert dispatch is not None
    downs = [user for item in dispatch.users for user in item.users if is_op(user, *DOWN_OPS)]
    combine = _sum_of(downs[0]) if downs else None
    if combine is None:
        return
    place = {node: i for i, node in enumerate(dispatch.graph.nodes)}
    (down, *_), pending, late = downs, [arguments(combine)["weights"]], set()
    while pending:
        node = pending.pop()
        if place[node] >= place[down] and node not in late:
            late.add(node)
            pending += node.all_input_nodes
    last = max((place[node] for node in late), default=0)
    between = [node for node in place if place[down] < place[node] <= last]
    if down in late or not all(map(_is_pure, between)):
        return
    _compat.move_before(down, sorted(late, key=place.__getitem__))


def _is_pure(node: Node) -> bool:
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    return node.target is operator.getitem or (schema is not None and not schema.is_mutable)


def _nobody_writes(weight: Any) -> bool:
    """Whether the weights are an input of what is lowered, that only expert GEMMs read."""
    is_input = isinstance(weight, Node) and weight.op in ("placeholder", "get_attr")
    return is_input and all(is_op(user, *UP_OPS, *DOWN_OPS) for user in weight.users)
