"""Inductor lowerings of `moe_route` and `moe_dispatch`: generated kernels with several outputs.

A template has one output; the others are buffers it mutates, as Inductor's own attention templates do it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..ops.moe_dispatch import dispatch_schedule
from ..ops.moe_route import ANY_TOKENS, route_constants, route_schedule, split_options
from ..spec import RoutingSpec
from ..state import is_batch_invariant
from ..templates.eager import power_of_two
from ..templates.render import route_text, template_text
from . import _compat
from .early import begins_early, told
from .gemm_plan import rows_bound
from .lowerings import fallback_noted, note, refusal
from .unsorted_slots import Unsorted, leave_unsorted, may_stay_in_place, may_stay_unsorted
from .vectors import weights_first

_OPS = torch.ops.diffulex
_MANY_ROWS = 1 << 17


@functools.cache
def template(name: str, grid: Any) -> Any:
    """The template of a router's or a dispatch's kernel."""
    source = route_text(name) if name in ("moe_route", "moe_route_linear_sum") else template_text(name)
    return _compat.TritonTemplate(name=name, grid=grid, source=source)


@_compat.SymbolicGridFn
def _route_grid(tokens: Any, top_k: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (cdiv(tokens, meta["BLOCK_T"]), 1, 1)


@_compat.SymbolicGridFn
def _experts_grid(bounds: Any, meta: dict[str, Any]) -> tuple[Any, Any, Any]:
    return (bounds, 1, 1)


@_compat.SymbolicGridFn
def _programs_grid(*sizes: Any) -> tuple[Any, Any, Any]:
    return (sizes[-1]["PROGRAMS"], 1, 1)


def empty(like: Any, size: list[Any], *, dtype: torch.dtype) -> Any:
    """A buffer of this size and dtype on the device of the IR node `like`, for a template to write."""
    buffer = _compat.empty_strided(size, None, dtype=dtype, device=like.get_device())
    buffer.realize()
    return buffer


@_compat.register_lowering(_OPS.moe_route.default, type_promotion_kind=None)
def _moe_route(logits: Any, bias: Any, ids: Any, *options: Any) -> Any:
    reason = refusal(logits)
    if reason is not None:
        return fallback_noted(_OPS.moe_route.default, reason, logits, bias, ids, *options)
    options, per_expert_scale = split_options(options)
    spec = RoutingSpec(*options)
    num_tokens, num_columns = logits.get_size()
    num_columns = _compat.static_size(num_columns)
    constants = route_constants(
        spec,
        num_columns,
        logits=logits.get_dtype(),
        bias=None if bias is None else bias.get_dtype(),
        ids=ids is not None,
        per_expert_scale=per_expert_scale is not None,
    )
    known = None if is_batch_invariant() else _compat.known_size(num_tokens)
    schedule, num_warps = route_schedule(ANY_TOKENS if known is None else known, num_columns)
    ids_out = empty(logits, [num_tokens, spec.num_weights], dtype=torch.int32)
    wanted = ((constants["HAS_BIAS"] or constants["BIAS_WEIGHS"], bias), (True, per_expert_scale), (True, ids))
    extra = [tensor for is_read, tensor in wanted if is_read and tensor is not None]
    inputs = _compat.realize_inputs(logits, *extra, ids_out)
    early = begins_early(logits.get_device())
    weights = _compat.run_template(
        template("moe_route", _route_grid),
        inputs,
        _compat.fixed_layout(logits, torch.float32, [num_tokens, spec.num_weights]),
        num_warps=num_warps,
        num_stages=1,
        constants=constants | schedule,
        mutated_inputs=[inputs[-1]],
        early=early,
    )
    note("moe_route", f"triton moe_route {schedule['BLOCK_T']} tokens a program{told(early)}")
    return weights, ids_out


@_compat.register_lowering(_OPS.moe_dispatch.default, type_promotion_kind=None)
def _moe_dispatch(ids: Any, num_experts: int) -> Any:
    reason = refusal(ids, dtypes=(torch.int32, torch.int64))
    if reason is not None:
        return fallback_noted(_OPS.moe_dispatch.default, reason, ids, num_experts)
    node = _compat.current_fx_node()
    num_tokens, top_k = ids.get_size()
    top_k = _compat.static_size(top_k)
    slots = num_tokens * top_k
    bound = rows_bound(slots, node, device=ids.get_device())
    schedule = dispatch_schedule(_MANY_ROWS if bound is None else bound, num_experts, top_k=top_k)
    order, token = (empty(ids, [slots], dtype=torch.int32) for _ in range(2))
    (ids,) = _compat.contiguous_inputs(ids)
    if bound is not None and may_stay_unsorted(node, slots, most_rows=bound, device=ids.get_device()):
        in_place = may_stay_in_place(node, slots, device=ids.get_device())
        if in_place:
            weights_first(node)
        leave_unsorted(order, Unsorted(ids, power_of_two(bound), by_slot=in_place))
        where = "nowhere: a slot is a row tile" if in_place else "in the kernel of moe_expert_up"
        note("moe_dispatch", f"{where}{told(begins_early(ids.get_device()))}")
        return order, token, empty(ids, [num_experts + 1], dtype=torch.int32)
    outputs = _compat.realize_inputs(order, token)
    early = begins_early(ids.get_device())

    def run(name: str, grid: Any, inputs: list[Any], size: list[int], **options: Any) -> Any:
        return _compat.run_template(
            template(name, grid),
            inputs,
            _compat.fixed_layout(ids, torch.int32, size),
            num_warps=schedule.num_warps,
            num_stages=1,
            constants=schedule.constants,
            early=early,
            **options,
        )

    if schedule.programs:
        size = [schedule.programs, int(schedule.constants["BINS"])]
        counts = run("moe_dispatch_count", _programs_grid, [ids], size)
        inputs = [ids, counts, *outputs]
        offsets = run("moe_dispatch_place", _programs_grid, inputs, [num_experts + 1], mutated_inputs=outputs)
        programs = f"moe_dispatch_count, moe_dispatch_place {schedule.programs}"
    else:
        offsets = run("moe_dispatch", _experts_grid, [ids, *outputs], [num_experts + 1], mutated_inputs=outputs)
        programs = f"moe_dispatch {num_experts + 1}"
    note("moe_dispatch", f"triton {programs} programs{told(early)}")
    return order, token, offsets
