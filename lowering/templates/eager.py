"""CUDA kernels of the ops outside a compiled graph: the same templates, launched by the standalone host.

The schedule comes from the cost model with the call's own token count, or is one for any number where results may not
depend on the batch; nothing here waits for the device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..activation import IDENTITY, canonical, intermediate_size, is_gated
from ..errors import MoEUnsupportedError, Reason, ReasonCode
from ..report import record
from ..schedule.device import device_spec
from ..schedule.plan import invariant_plan, schedule_for
from ..schedule.schedule import (
    MOST_PIECES,
    SPECIALIZED_EXPERTS,
    SPECIALIZED_ROWS,
    SPLIT_DEPTH,
    TMA_ALIGNMENT,
    GemmShape,
    Schedule,
    schedule_of,
    tma_refusal,
)
from ..state import is_batch_invariant
from . import standalone
from .descriptors import host_descriptors
from .render import ExpertGemmVariant, GradWeightVariant, template_text


def dot_precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: tf32 only where torch allows it for its own matmuls."""
    # not `allow_tf32`: reading that raises once the newer setting was written
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def up_variant(
    dtype: torch.dtype, *, act: str, bias: bool, interleaved: bool = False, shared: bool = False
) -> ExpertGemmVariant:
    """The kernel of the up stage over operands of this dtype, before it is scheduled."""
    return ExpertGemmVariant(
        gather=True,
        scatter=False,
        bias=bias,
        act=act,
        interleaved=interleaved,
        precision=dot_precision(dtype),
        shared=shared,
    )


def down_variant(dtype: torch.dtype, *, bias: bool, shared: bool = False) -> ExpertGemmVariant:
    """The kernel of the down stage over operands of this dtype, before it is scheduled."""
    return ExpertGemmVariant(gather=False, scatter=True, bias=bias, precision=dot_precision(dtype), shared=shared)


def power_of_two(number: int) -> int:
    """The smallest power of two >= number, at least 2: block sizes of index vectors."""
    return max(2, 1 << (number - 1).bit_length())


def index_type(*tensors: Tensor) -> str:
    """Index type for flat offsets into tensors of any shape [N, H] and dtype."""
    return "tl.int64" if any(t.numel() >= 2**31 for t in tensors) else "tl.int32"


def index_constants(tensors: Mapping[str, Tensor], schedule: Schedule) -> dict[str, standalone.Constant]:
    """The constexprs that say how an expert GEMM counts elements of A and OUT, of any shape [N, H] and dtype."""
    if schedule.loop.specialized:
        a = tensors["A"]
        wide = (a.shape[0] - 1) * a.stride(0) + a.shape[1] >= 2**31  # of a part of wider rows, too
        return {"ROW_OFFSET": "gl.int64" if wide else "gl.int32"}
    return {"INDEX_DTYPE": index_type(tensors["OUT"])}


def gemm_grid(rows: int, width: int, *, num_experts: int, schedule: Schedule) -> int:
    """Programs of one expert GEMM: an upper bound without knowing the routing; surplus programs leave at once."""
    row_tiles = min(rows, -(-rows // schedule.block_m) + num_experts + 1)
    return row_tiles * -(-width // schedule.block_n)


def _expert_gemm(
    variant: ExpertGemmVariant, tensors: dict[str, Tensor], top_k: int, schedule: Schedule | None = None
) -> None:
    weight_EYX, out_NY = tensors["W"], tensors["OUT"]
    index = ("IDS",) if "IDS" in tensors else ("ORDER", "OFFSETS")
    tensors |= {name: tensors[name].contiguous() for name in index}  # the text reads them unit by unit
    num_experts, _, depth = weight_EYX.shape
    rows, width = out_NY.shape
    if schedule is None:
        schedule = _planned(variant, tensors)
    elif (reason := _refusal(variant, tensors, schedule)) is not None:
        raise MoEUnsupportedError.of(
            variant.stage,
            expected=f"operands that the schedule {schedule} is for",
            got=str(reason),
            hint="Pass schedule.without_tma() or, where that is the reason, schedule.without_specialized(), or None to "
            "have one planned.",
        )
    variant = dataclasses.replace(variant, by_slot="IDS" in tensors)
    variant = variant.scheduled(schedule, depth=depth, strides=weight_EYX.stride())
    constants = gemm_constants(num_experts, top_k, width=width, schedule=schedule)
    constants |= index_constants(tensors, schedule)
    grid = gemm_grid(rows, width, num_experts=num_experts, schedule=schedule)
    if schedule.loop.tma:
        grid *= MOST_PIECES if schedule.loop.split_k else 1
        grid = min(grid, device_spec(out_NY.device.index or 0).num_sms)
    if schedule.loop.specialized and grid:  # there is no descriptor of nothing
        tensors |= specialized_arguments(tensors, schedule, gather=variant.gather, programs=grid)
    standalone.launch(
        variant.source(),
        tensors,
        name=variant.name,
        constants=constants,
        grid=(grid,),
        num_warps=schedule.launched_warps,
        num_stages=schedule.num_stages,
    )


def specialized_arguments(
    tensors: Mapping[str, Any], schedule: Schedule, *, gather: bool, programs: int
) -> dict[str, Any]:
    """What kernels with specialised warps take besides A, W and OFFSETS, of any shapes [N, D], [E, J, D] and [E+1]:
    descriptors, and memory that so many programs share.
    """
    like, split_k = tensors["OFFSETS"], schedule.loop.split_k
    found: dict[str, Any] = host_descriptors(tensors, block_k=schedule.block_k, gather=gather)
    # a program has one piece at most, and those of a tile are two at least; parts of them have 64 rows
    counts = SPECIALIZED_ROWS // 64 * (programs // 2) if split_k else 0
    found["TAKEN"] = like.new_zeros(1 + counts, dtype=torch.int32)
    if split_k:
        found["PARTIALS"] = like.new_empty(programs * SPECIALIZED_ROWS * 256, dtype=torch.float32)
    return found


def _pieces_refusal(tensors: Mapping[str, Tensor], schedule: Schedule) -> Reason | None:
    """Why sums of these tensors are not cut in the pieces of a schedule, or None: far rows leave no shared memory."""
    if not schedule.loop.split_k or index_constants(tensors, schedule)["ROW_OFFSET"] == "gl.int32":
        return None
    return Reason(ReasonCode.SHAPE, "rows begin beyond 2^31 elements, and their sums are not cut in pieces")


def _cut_if_near(variant: ExpertGemmVariant, tensors: Mapping[str, Tensor], schedule: Schedule) -> Schedule:
    """A planned schedule, without pieces where there can be none."""
    reason = _pieces_refusal(tensors, schedule)
    if reason is None:
        return schedule
    record("plan", variant.stage, layer="", outcome="sums in one piece", reason=reason)
    return schedule.without_split_k()


def _planned(variant: ExpertGemmVariant, tensors: dict[str, Tensor]) -> Schedule:
    """The schedule for these tensors; addresses and strides are looked at where descriptors would read them."""
    rows, shape = tensors["OUT"].shape[0], dataclasses.replace(_shape_of(variant, tensors), descriptors=True)
    device = device_spec(tensors["W"].device.index or 0)
    if is_batch_invariant():
        (schedule,) = invariant_plan((shape,), device).schedules
    else:
        schedule = schedule_for(rows, shape, device=device)
    schedule = _cut_if_near(variant, tensors, schedule)
    reason = _refusal(variant, tensors, schedule)
    if reason is not None and schedule.loop.specialized:
        record("plan", variant.stage, layer="", outcome="no specialised warps", reason=reason)
        schedule = schedule.without_specialized()
        reason = _refusal(variant, tensors, schedule)
    if reason is not None:
        if is_batch_invariant():  # the same tiles: an address may be that of a part of a batch
            schedule = schedule.without_tma()
        else:
            schedule = schedule_for(rows, dataclasses.replace(shape, descriptors=False), device=device)
        record("plan", variant.stage, layer="", outcome="operands by pointers", reason=reason)
    return schedule


def _refusal(variant: ExpertGemmVariant, tensors: dict[str, Tensor], schedule: Schedule) -> Reason | None:
    """Why a schedule is not for these tensors, or None."""
    if not schedule.loop.tma:
        return None
    capability = device_spec(tensors["W"].device.index or 0).capability
    if capability < (9, 0):
        return Reason(ReasonCode.CAPABILITY, "tensor descriptors need sm_90 or newer")
    if schedule.loop.specialized and capability[0] != 9:
        return Reason(ReasonCode.CAPABILITY, "specialised warps multiply as sm_90 alone does")
    variant = variant.scheduled(schedule, depth=tensors["W"].shape[-1], strides=tensors["W"].stride())
    if schedule.loop.specialized:
        reason = _warps_refusal(variant, tensors, schedule)
        if reason is not None:
            return reason
    for name in variant.described:
        tensor = tensors[name]
        if tensor.data_ptr() % TMA_ALIGNMENT:
            return Reason(ReasonCode.ALIGNMENT, f"{name} does not begin at a multiple of {TMA_ALIGNMENT} bytes")
        sizes, strides = tuple(tensor.shape), tuple(tensor.stride())
        reason = tma_refusal(name, sizes, strides=strides, element_size=tensor.element_size())
        if reason is not None:
            return reason
    return None


def _warps_refusal(variant: ExpertGemmVariant, tensors: dict[str, Tensor], schedule: Schedule) -> Reason | None:
    """Why specialised warps have no such schedule for these tensors, or None."""
    shape, rows = _shape_of(variant, tensors), tensors["OUT"].shape[0]
    known = Schedule.specialized(gated=shape.gated, split_k=schedule.loop.split_k)
    reason = specialized_refusal(variant, shape)
    if reason is not None:
        return reason
    if dataclasses.replace(schedule, group_m=known.group_m) != known:
        return Reason(ReasonCode.SCHEDULE, f"specialised warps have {known}, and other groups of row tiles alone")
    if (rows // known.block_m + shape.num_experts) * SPECIALIZED_EXPERTS >= 2**31:
        return Reason(ReasonCode.SHAPE, f"{rows} rows are more than specialised warps count")
    if known.loop.split_k and shape.depth < SPLIT_DEPTH:
        return Reason(ReasonCode.SHAPE, f"sums over {shape.depth} columns, below {SPLIT_DEPTH}, are not cut in pieces")
    return _pieces_refusal(tensors, schedule)


def specialized_refusal(variant: ExpertGemmVariant, shape: GemmShape) -> Reason | None:
    """Why no kernel with specialised warps is of a scheduled variant of this shape, or None."""
    kinds = (*variant.unlike_specialized(), *shape.unlike_specialized())
    if kinds:
        return Reason(ReasonCode.SHAPE, f"specialised warps multiply nothing {' or '.join(kinds)}")
    return standalone.gluon_refusal()


def _shape_of(variant: ExpertGemmVariant, tensors: dict[str, Tensor]) -> GemmShape:
    weight_EYX, gated = tensors["W"], is_gated(variant.act)
    sizes, strides, element_size = tuple(weight_EYX.shape), weight_EYX.stride(), weight_EYX.element_size()
    return GemmShape.of_weight(sizes, strides, gated=gated, element_size=element_size)


def gemm_constants(num_experts: int, top_k: int, *, width: int, schedule: Schedule) -> dict[str, standalone.Constant]:
    """The constexprs of the expert GEMMs."""
    loop: dict[str, standalone.Constant] = {}
    if schedule.loop.grouped or schedule.loop.tma:
        loop["GROUP_M"] = schedule.group_m
    if schedule.loop.tma and not schedule.loop.specialized:
        loop["STORE_N"] = schedule.block_n // schedule.loop.subtiles
    if schedule.loop.specialized:
        loop["NUM_STAGES"] = schedule.num_stages
    return {
        "NUM_EXPERTS": num_experts,
        # a warp has 32 lanes: fewer experts are found by code that ptxas takes for divergent, main loop and all
        "E_POW2": max(32, power_of_two(num_experts)),
        "TOP_K": top_k,
        "WIDTH_N": width,
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "BLOCK_K": schedule.block_k,
        **loop,
    }


def _index(order_N: Tensor, offsets_E1: Tensor | None) -> dict[str, Tensor]:
    return {"IDS": order_N} if offsets_E1 is None else {"ORDER": order_N, "OFFSETS": offsets_E1}


def moe_expert_up(
    hidden_TH: Tensor,
    w13_EJH: Tensor,
    b13_EJ: Tensor | None,
    order_N: Tensor,
    offsets_E1: Tensor | None,
    *,
    act: str = IDENTITY,
    interleaved: bool = False,
    schedule: Schedule | None = None,
) -> Tensor:
    """CUDA kernel of `diffulex::moe_expert_up`: act_NI [N, I] in the dtype of hidden (fp32, fp16 or bf16).

    Without offsets, `order_N` are the ids [1, K] of one token, whose slots stay as they are, by a schedule given.
    """
    act = canonical(act)
    rows = order_N.numel()
    top_k = rows // max(1, hidden_TH.shape[0])
    out_NI = hidden_TH.new_empty(rows, intermediate_size(act, w13_EJH.shape[1]))
    variant = up_variant(hidden_TH.dtype, act=act, bias=b13_EJ is not None, interleaved=interleaved)
    tensors = {"A": hidden_TH, "W": w13_EJH, "OUT": out_NI, **_index(order_N, offsets_E1)}
    if b13_EJ is not None:
        tensors["BIAS"] = b13_EJ
    _expert_gemm(variant, tensors, max(1, top_k), schedule)
    return out_NI


def moe_expert_down(
    act_NI: Tensor,
    w2_EHI: Tensor,
    b2_EH: Tensor | None,
    order_N: Tensor,
    offsets_E1: Tensor | None,
    *,
    schedule: Schedule | None = None,
) -> Tensor:
    """CUDA kernel of `diffulex::moe_expert_down`: slots_NH [N, H] in the dtype of act (fp32, fp16 or bf16).

    Without offsets, `order_N` are the ids [1, K] of one token, whose slots stay as they are, by a schedule given.
    """
    out_NH = act_NI.new_empty(act_NI.shape[0], w2_EHI.shape[1])
    variant = down_variant(act_NI.dtype, bias=b2_EH is not None)
    tensors = {"A": act_NI, "W": w2_EHI, "OUT": out_NH, **_index(order_N, offsets_E1)}
    if b2_EH is not None:
        tensors["BIAS"] = b2_EH
    _expert_gemm(variant, tensors, 1, schedule)
    return out_NH


def expert_gemm_specialized(
    a: Tensor,
    weight_EYX: Tensor,
    order_N: Tensor,
    offsets_E1: Tensor,
    *,
    act: str,
    up: bool,
    unread: bool,
    schedule: Sequence[int],
) -> Tensor:
    """CUDA kernel of `diffulex::_expert_gemm_specialized`: `moe_expert_up` of a [T, H] or `moe_expert_down` of
    a [N, I], fp16 or bf16, by the numbers of a schedule; with `unread` rows of no expert are left as they are.
    """
    rows = order_N.numel()
    variant = up_variant(a.dtype, act=canonical(act), bias=False) if up else down_variant(a.dtype, bias=False)
    width = intermediate_size(variant.act, weight_EYX.shape[1]) if up else weight_EYX.shape[1]
    out_NY = a.new_empty(rows, width)
    tensors = {"A": a, "W": weight_EYX, "OUT": out_NY, "ORDER": order_N, "OFFSETS": offsets_E1}
    top_k = max(1, rows // max(1, a.shape[0])) if up else 1
    planned = _cut_if_near(variant, tensors, schedule_of(schedule))
    _expert_gemm(dataclasses.replace(variant, unread=unread), tensors, top_k, planned)
    return out_NY


def moe_expert_grad_weight(
    left: Tensor,
    right: Tensor,
    left_index_N: Tensor | None,
    right_index_N: Tensor | None,
    offsets_E1: Tensor,
) -> Tensor:
    """CUDA kernel of `diffulex::moe_expert_grad_weight`: [E, L, R] in the dtype of left (fp32, fp16 or bf16)."""
    num_experts, width_l, width_r = offsets_E1.shape[0] - 1, left.shape[1], right.shape[1]
    out_ELR = left.new_empty(num_experts, width_l, width_r)
    variant = GradWeightVariant(left_index_N is not None, right_index_N is not None, dot_precision(left.dtype))
    tensors = {"LEFT": left, "RIGHT": right, "OFFSETS": offsets_E1.contiguous(), "OUT": out_ELR}
    for name, index_N in (("LEFT_INDEX", left_index_N), ("RIGHT_INDEX", right_index_N)):
        if index_N is not None:
            tensors[name] = index_N.contiguous()
    block = 128 if left.element_size() == 2 else 64
    block_r = max(16, min(block, power_of_two(width_r)))
    standalone.launch(
        variant.source(),
        tensors,
        name=variant.name,
        constants={"BLOCK_L": block, "BLOCK_R": block_r, "BLOCK_K": 32, "INDEX_DTYPE": index_type(out_ELR)},
        grid=(num_experts * -(-width_l // block) * -(-width_r // block_r),),
        num_warps=8 if block == 128 else 4,
        num_stages=3,
    )
    return out_ELR


def rows_of_ranks(rows: Tensor, places_N: Tensor, addresses_R: Tensor, *, own: int) -> Tensor:
    """Rows [N, X] of any dtype out of the memory of all ranks, zeros for -1, as `moe_rows_of_ranks.jinja` finds them.

    rows [S, X] are this rank's own, places [N] int64, addresses [R] int64 where each rank's rows [S, X] begin.
    """
    rows = rows.contiguous()
    out_NX = rows.new_empty(places_N.shape[0], rows.shape[1])
    aligned = math.gcd(rows.shape[1] * rows.element_size(), rows.data_ptr(), 16)
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[min(aligned, 8)]
    tensors = {"ROWS": rows.view(word), "PLACES": places_N.contiguous(), "BASES": addresses_R, "OUT": out_NX.view(word)}
    block = min(1024, power_of_two(tensors["OUT"].shape[1]))
    standalone.launch(
        template_text("moe_rows_of_ranks"),
        tensors,
        name="moe_rows_of_ranks",
        constants={"RANKS": addresses_R.shape[0], "OWN": own, "BLOCK": block, "ALIGNED": aligned == 16},
        grid=(places_N.shape[0], -(-tensors["OUT"].shape[1] // block)),
        num_warps=4,
        num_stages=1,
    )
    return out_NX
