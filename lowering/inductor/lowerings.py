"""Inductor lowerings of the ops: generated Triton on CUDA, the op's own kernel as an extern call elsewhere.

Importing this module registers them. A refusal is recorded with its reason; nothing falls back in silence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch

from .. import ops  # noqa: F401  the ops have to exist
from ..activation import IDENTITY, canonical, intermediate_size, is_gated
from ..errors import Reason, ReasonCode
from ..graph.uncovered import note_uncovered
from ..report import OWN_KERNEL, Cost, layer_of, record
from ..schedule.cost_model import cost, predict, vector_cost
from ..schedule.device import DeviceSpec, device_spec
from ..schedule.schedule import PLAIN, TMA_ALIGNMENT, GemmShape, Schedule, tma_refusal
from ..state import is_batch_invariant
from ..templates.eager import dot_precision, down_variant, gemm_constants, power_of_two, up_variant
from ..templates.render import ExpertGemmVariant, GradWeightVariant
from . import _compat
from .early import begins_early, gemm_begins_early, told
from .gemm_plan import KERNEL_DTYPES, pointers_reason, schedule_of, usual_schedule
from .specialized import lower_specialized, refuses_specialized
from .unread import rest_unread
from .unsorted_slots import Unsorted, take_unsorted
from .vectors import lower_vectors, summed_slots

_OPS = torch.ops.diffulex
_SHARED_ACCUMULATORS = 64  # with 128, gated GEMMs spill


def refusal(node: Any, dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES) -> Reason | None:
    """Why an IR node (any shape [N, H]) gets no generated kernel, or None."""
    device = node.get_device()
    if device.type != "cuda":
        return Reason(ReasonCode.NOT_CUDA, f"device {device.type}")
    if node.get_dtype() not in dtypes:
        return Reason(ReasonCode.DTYPE, f"{node.get_dtype()}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return Reason(ReasonCode.CAPABILITY, f"sm_{capability[0]}{capability[1]}")
    return None


def note(op: str, outcome: str, *, reason: Reason | None = None, cost: Cost | None = None) -> None:
    """Record what became of the op being lowered."""
    node = _compat.current_fx_node()
    record("lower", op, layer=layer_of(node) if node is not None else "", outcome=outcome, reason=reason, cost=cost)


def fallback_noted(op: Any, reason: Reason, *args: Any) -> Any:
    """The op's own kernel, recorded with the reason."""
    name = op._schema.name.removeprefix("diffulex::")
    note(name, OWN_KERNEL, reason=reason)
    if reason.code is ReasonCode.DTYPE:  # what runs on a CUDA device then is made of a library's kernels
        node = _compat.current_fx_node()
        note_uncovered(name, reason, layer=layer_of(node) if node is not None else "")
    return _compat.fallback(op, *args)


@functools.cache
def _template(name: str, source: str, grid: Any) -> Any:
    return _compat.TritonTemplate(name=name, grid=grid, source=source)


@_compat.SymbolicGridFn
def _gemm_grid(
    rows: Any,
    width: Any,
    meta: dict[str, Any],
    *,
    cdiv: Any,
    min: Any,  # noqa: A002  the name is how Inductor knows what to pass
) -> tuple[Any, Any, Any]:
    row_tiles = min(rows, cdiv(rows, meta["BLOCK_M"]) + meta["NUM_EXPERTS"] + 1)
    tiles = row_tiles * cdiv(width, meta["BLOCK_N"])
    if "SHARED_N" in meta:
        tiles += cdiv(rows // meta["SLOTS"], meta["BLOCK_M"]) * cdiv(meta["SHARED_N"], meta["BLOCK_N"])
    return (min(tiles, meta["PROGRAMS"]) if "PROGRAMS" in meta else tiles, 1, 1)


def _tma_refusal(variant: ExpertGemmVariant, operands: dict[str, Any]) -> Reason | None:
    if not _compat.lends_scratch():
        return Reason(ReasonCode.WRAPPER, "the C++ wrapper of this torch has no memory for every program's descriptors")
    for name in variant.described:
        node = operands[name]
        # what is computed here could still be laid out otherwise than the kernel's text says
        _compat.freeze_layout(node)
        if not _compat.is_aligned(node, TMA_ALIGNMENT):
            return Reason(ReasonCode.ALIGNMENT, f"{name} is not known to begin at a multiple of {TMA_ALIGNMENT} bytes")
        element_size = node.get_dtype().itemsize
        sizes = tuple(map(_compat.known_size, node.get_size()))
        strides = tuple(_compat.known_stride(stride, TMA_ALIGNMENT // element_size) for stride in node.get_stride())
        reason = tma_refusal(name, sizes, strides=strides, element_size=element_size)
        if reason is not None:
            return reason
    return None


@dataclasses.dataclass(frozen=True)
class SharedTiles:
    """What an expert GEMM needs to take a shared expert's tiles along: A [T, D], weights [S, D] (gated: two), T * slots
    rows in all.
    """

    hidden: Any
    weights: tuple[Any, ...]
    slots: int

    @property
    def width(self) -> int:
        """S."""
        return _compat.static_size(self.weights[0].get_size()[0])

    @property
    def depth(self) -> int:
        """D."""
        return _compat.static_size(self.weights[0].get_size()[1])

    def empty_result(self) -> Any:
        """A buffer [T, S] in the dtype of the weights."""
        size, weight = [self.hidden.get_size()[0], self.width], self.weights[0]
        out = _compat.empty_strided(size, None, dtype=weight.get_dtype(), device=weight.get_device())
        out.realize()
        return out


def _weight_shape(weight: Any, act: str) -> tuple[tuple[int, ...], tuple[int, ...], GemmShape]:
    """(sizes, strides, the shape of the GEMM) of weights [E, J, H]."""
    sizes, strides = (tuple(map(_compat.static_size, values)) for values in (weight.get_size(), weight.get_stride()))
    element_size = weight.get_dtype().itemsize
    return sizes, strides, GemmShape.of_weight(sizes, strides, gated=is_gated(act), element_size=element_size)


def gemm_schedule(weight: Any, rows: Any, *, act: str, with_shared: bool = False) -> tuple[Schedule, int | None]:
    """The schedule of an expert GEMM over `rows` rows of weights [E, J, H], and the most rows its graph is for.

    with_shared: one that can take a shared expert's tiles along, by pointers, whose choice costs registers.
    """
    _, _, shape = _weight_shape(weight, act)
    if with_shared:
        shape = dataclasses.replace(shape, descriptors=False, accumulators=_SHARED_ACCUMULATORS)
    return schedule_of(rows, shape, device=weight.get_device())


def _fitted(
    schedule: Schedule,
    variant: ExpertGemmVariant,
    operands: dict[str, Any],
    *,
    shape: GemmShape,
    rows: Any,
    by_slot: bool,
) -> tuple[Schedule, Reason | None]:
    """The schedule, or the nearest one that these operands [N, D] and [E, J, D] are for and why it is that."""
    weight = operands["W"]
    if by_slot and schedule.loop != PLAIN:
        return schedule.ungrouped(), Reason(ReasonCode.SCHEDULE, f"{schedule} is for rows that are sorted")
    sizes, strides = (tuple(map(_compat.static_size, values)) for values in (weight.get_size(), weight.get_stride()))
    told = None
    if schedule.loop.specialized:
        given = variant.scheduled(schedule, depth=shape.depth, strides=strides)
        told = refuses_specialized(given, shape) or _tma_refusal(given, operands)
        schedule = schedule if told is None else schedule.without_specialized()
    if schedule.loop.tma:
        reason = _tma_refusal(variant, operands)
        return (schedule, told) if reason is None else (schedule.without_tma(), reason)
    refused = tma_refusal("W", sizes, strides=strides, element_size=shape.element_size)
    return schedule, pointers_reason(rows, shape, refused=refused, device=weight.get_device())


def _call_specialized(
    op: str, variant: ExpertGemmVariant, inputs: list[Any], schedule: Schedule, predicted: Cost | None
) -> Any:
    variant = dataclasses.replace(variant, unread=rest_unread(_compat.current_fx_node()))
    note(op, f"gluon {variant.name} {schedule}", cost=predicted)
    return lower_specialized(inputs, variant=variant, schedule=schedule)


def _by_vectors(
    op: str, variant: ExpertGemmVariant, inputs: list[Any], unsorted: Unsorted | None, shared: SharedTiles | None
) -> Any | None:
    """An expert GEMM over one token's slots that stay in their place, as products with vectors, or None."""
    if unsorted is None or not unsorted.by_slot:
        return None
    found = lower_vectors(variant, inputs, ids=unsorted.ids, shared=shared)
    if found is None:
        return None
    _, _, shape = _weight_shape(inputs[1], variant.act)
    device = device_spec(inputs[1].get_device().index or 0)
    result, told_of_it = found
    note(op, told_of_it, cost=vector_cost(_compat.static_size(unsorted.ids.get_size()[1]), shape, device=device))
    return result


def expert_gemm(
    op: str,
    variant: ExpertGemmVariant,
    *,
    inputs: list[Any],
    top_k: int,
    width: int,
    schedule: Schedule | None = None,
    shared: SharedTiles | None = None,
) -> Any:
    """Lower one of the two expert GEMMs; `inputs` stand in the order of the template's `def_kernel`.

    Rows of no expert that nobody reads are left as they are. One token's slots may come added up (`vectors`).
    With `shared`, which takes a schedule without descriptors, the result is a pair: [N, W], and the shared one [T, S].
    """
    inputs = _compat.realize_inputs(*inputs)
    weight = inputs[1]
    _compat.freeze_layout(weight)  # what is computed here could still be laid out otherwise than the kernel's text says
    written = inputs[-2:]  # by whoever sorts
    rows = written[0].get_size()[0]
    unsorted = take_unsorted(written[0])
    by_slot = unsorted is not None and unsorted.by_slot
    if (found := _by_vectors(op, variant, inputs, unsorted, shared)) is not None:
        return found
    sizes, strides, shape = _weight_shape(weight, variant.act)
    num_experts, _, depth = sizes
    schedule = schedule or gemm_schedule(weight, rows, act=variant.act)[0]
    operands = {"A": inputs[0], "W": weight}
    schedule, reason = _fitted(schedule, variant, operands, shape=shape, rows=rows, by_slot=by_slot)
    device = device_spec(weight.get_device().index or 0)
    predicted = _predicted(rows, shape, schedule=schedule, device=device)
    if schedule.loop.specialized:
        assert unsorted is None and shared is None, "these are for few rows"
        variant = variant.scheduled(schedule, depth=depth, strides=strides)
        return _call_specialized(op, variant, [*inputs[:2], *written], schedule, predicted)
    constants = gemm_constants(num_experts, top_k, width=width, schedule=schedule)
    if schedule.loop.tma:
        constants["PROGRAMS"] = device.num_sms
    mutated: list[Any] = []
    out = None
    if unsorted is not None:
        inputs = [*(inputs[:-2] if by_slot else inputs), unsorted.ids]
        mutated += [] if by_slot else written
        constants["SLOTS_POW2"] = unsorted.slots_pow2
        variant = dataclasses.replace(variant, sorts=not by_slot, by_slot=by_slot)
    elif shared is None:
        variant = dataclasses.replace(variant, unread=rest_unread(_compat.current_fx_node()))
    if shared is not None:
        depth = math.gcd(depth, shared.depth)
        constants |= {"SHARED_N": shared.width, "SLOTS": shared.slots}
        out = shared.empty_result()
        inputs += _compat.realize_inputs(shared.hidden, *shared.weights, out)
        mutated += inputs[-1:]
    variant = variant.scheduled(schedule, depth=depth, strides=strides)
    template = _template(variant.name, variant.source(), _gemm_grid)
    early = gemm_begins_early(schedule, weight.get_device())
    result = _compat.run_template(
        template,
        inputs,
        _compat.fixed_layout(inputs[0], inputs[0].get_dtype(), [rows, width]),
        num_warps=schedule.num_warps,
        num_stages=schedule.num_stages,
        constants=constants,
        mutated_inputs=mutated or None,
        early=early,
    )
    slots = "" if unsorted is None else f", {unsorted}"
    note(op, f"triton {template.name} {schedule}{slots}{told(early)}", reason=reason, cost=predicted)
    return result if out is None else (result, out)


def _predicted(rows: Any, shape: GemmShape, *, schedule: Schedule, device: DeviceSpec) -> Cost | None:
    """What the cost model says of a GEMM at the rows that are compiled for."""
    hint = _compat.size_hint(rows)
    predicted = None if hint is None else cost(hint, shape, schedule=schedule, device=device)
    if hint is None or predicted is None:
        return None
    usual = usual_schedule(hint, shape, device=device, known=_compat.known_size(rows) is not None)
    if usual is None:
        return predicted
    return dataclasses.replace(predicted, usual_us=predict(hint, shape, schedule=usual, device=device) * 1e6)


@_compat.register_lowering(_OPS.moe_expert_up.default, type_promotion_kind=None)
def _moe_expert_up(
    hidden: Any,
    w13: Any,
    b13: Any,
    order: Any,
    offsets: Any,
    top_k: int,
    act: str = IDENTITY,
    interleaved: bool = False,
) -> Any:
    reason = refusal(hidden)
    if reason is not None:
        return fallback_noted(
            _OPS.moe_expert_up.default, reason, hidden, w13, b13, order, offsets, top_k, act, interleaved
        )
    act = canonical(act)
    width = intermediate_size(act, _compat.static_size(w13.get_size()[1]))
    variant = up_variant(hidden.get_dtype(), act=act, bias=b13 is not None, interleaved=interleaved)
    inputs = [hidden, w13, *([] if b13 is None else [b13]), order, offsets]
    return expert_gemm("moe_expert_up", variant, inputs=inputs, top_k=top_k, width=width)


@_compat.register_lowering(_OPS.moe_expert_down.default, type_promotion_kind=None)
def _moe_expert_down(act: Any, w2: Any, b2: Any, order: Any, offsets: Any) -> Any:
    reason = refusal(act)
    if reason is not None:
        return fallback_noted(_OPS.moe_expert_down.default, reason, act, w2, b2, order, offsets)
    variant = down_variant(act.get_dtype(), bias=b2 is not None)
    inputs = [act, w2, *([] if b2 is None else [b2]), order, offsets]
    width = _compat.static_size(w2.get_size()[1])
    return expert_gemm("moe_expert_down", variant, inputs=inputs, top_k=1, width=width)


@_compat.SymbolicGridFn
def _grad_weight_grid(experts: Any, left: Any, right: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (experts * cdiv(left, meta["BLOCK_L"]) * cdiv(right, meta["BLOCK_R"]), 1, 1)


@_compat.register_lowering(_OPS.moe_expert_grad_weight.default, type_promotion_kind=None)
def _moe_expert_grad_weight(left: Any, right: Any, left_index: Any, right_index: Any, offsets: Any) -> Any:
    reason = refusal(left)
    if reason is not None:
        return fallback_noted(
            _OPS.moe_expert_grad_weight.default, reason, left, right, left_index, right_index, offsets
        )
    variant = GradWeightVariant(left_index is not None, right_index is not None, dot_precision(left.get_dtype()))
    inputs = [left, right, *(index for index in (left_index, right_index) if index is not None), offsets]
    inputs = _compat.realize_inputs(*inputs)
    num_experts = _compat.static_size(offsets.get_size()[0]) - 1
    width_l, width_r = (_compat.static_size(node.get_size()[1]) for node in (left, right))
    block = 128 if left.get_dtype().itemsize == 2 else 64
    template = _template(variant.name, variant.source(), _grad_weight_grid)
    early = begins_early(left.get_device())
    result = _compat.run_template(
        template,
        inputs,
        _compat.fixed_layout(left, left.get_dtype(), [num_experts, width_l, width_r]),
        num_warps=8 if block == 128 else 4,
        num_stages=3,
        constants={"BLOCK_L": block, "BLOCK_R": max(16, min(block, power_of_two(width_r))), "BLOCK_K": 32},
        early=early,
    )
    note("moe_expert_grad_weight", f"triton {template.name}{told(early)}")
    return result


@_compat.register_lowering(_OPS.moe_combine.default, type_promotion_kind=None)
def _moe_combine(slots: Any, weights: Any, ids: Any = None, num_experts: int = 0) -> Any:
    """Inductor IR, so it folds into one kernel with the residual and the next norm; K terms in slot order. One token's
    slots may have been added up before, see `vectors`.

    Each is added as eager mode does it, a product that is not rounded: the same bits whatever the kernel is fused with.
    """
    lower = _compat.lowerings
    aten, prims = torch.ops.aten, torch.ops.prims
    summed = summed_slots(slots)
    if summed is not None:
        where = "in the kernel of moe_expert_down"
        note("moe_combine", f"Inductor IR, its sum {where}" if summed.beside_shared else where)
        return lower[prims.convert_element_type.default](slots, summed.dtype)
    reason = refusal(slots) or refusal(weights)
    if reason is not None:
        return fallback_noted(_OPS.moe_combine.default, reason, slots, weights, ids, num_experts)
    num_tokens, top_k = weights.get_size()
    top_k = _compat.static_size(top_k)
    slots_TKH = lower[aten.view.default](slots, [num_tokens, top_k, slots.get_size()[1]])
    total = None
    for k in range(top_k):  # written out: Inductor would make a second kernel of a reduction over 8 or more
        if ids is None:
            slot = lower[prims.convert_element_type.default](lower[aten.select.int](slots_TKH, 1, k), torch.float32)
        else:
            slot = _compat.slot_of_expert(slots, ids, k, num_experts=num_experts)
        weight = lower[prims.convert_element_type.default](lower[aten.select.int](weights, 1, k), torch.float32)
        weight = lower[aten.expand.default](lower[aten.unsqueeze.default](weight, -1), slot.get_size())
        total = _compat.add_product(total, slot, weight)
    early = _compat.generated_begin_early(_compat.V.graph)
    note("moe_combine", f"Inductor IR, fused with its neighbours{told(early)}")
    if is_batch_invariant():  # else what is fused behind it reads the sum as it is, and fusion may depend on sizes
        return _compat.rounded(total, slots.get_dtype())
    return lower[prims.convert_element_type.default](total, slots.get_dtype())
