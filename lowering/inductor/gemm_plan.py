"""Which schedule an expert GEMM of a graph gets: all GEMMs that share a routing are planned together.

They share one set of row ranges, so a model recompiles at most once per range and not once per GEMM and bound.

Where results may not depend on the batch there is one range, and so one schedule for each GEMM: the order in which a
row is summed follows from its tiles, none of which is cut in pieces. What a GEMM gets then depends on its own shape
alone, and no guard is needed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..activation import is_gated
from ..errors import Reason
from ..graph.dataflow import arguments, is_op
from ..ops import DOWN_OPS, UP_OPS
from ..report import layer_of, record
from ..schedule.device import DeviceSpec, device_spec
from ..schedule.plan import exact_schedule, invariant_plan, plan, range_of, schedule_for
from ..schedule.schedule import GemmShape, RowRange, Schedule
from ..schedule.tuned import told
from ..state import is_batch_invariant
from . import _compat

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of what generated kernels multiply


def _shape_of(node: torch.fx.Node) -> GemmShape | None:
    """The GEMM an FX node of an expert op stands for; None while a size is symbolic."""
    given = arguments(node)
    is_up = is_op(node, *UP_OPS)
    value = given["w13" if is_up else "w2"].meta.get("val")
    if value is None or not all(isinstance(size, int) for size in (*value.shape, *value.stride())):
        return None
    gated, element_size = is_up and is_gated(given["act"]), value.element_size()
    return GemmShape.of_weight(tuple(value.shape), tuple(value.stride()), gated=gated, element_size=element_size)


def _siblings(offsets: torch.fx.Node) -> tuple[GemmShape, ...]:
    """Shapes of all expert GEMMs that read `offsets`, without repeats, in graph order."""
    gemms = [user for user in offsets.users if is_op(user, *UP_OPS, *DOWN_OPS)]
    shapes = [_shape_of(user) for user in gemms]
    return tuple(dict.fromkeys(shape for shape in shapes if shape is not None))


def _ranges(shapes: tuple[GemmShape, ...], device: DeviceSpec) -> tuple[RowRange, ...]:
    return (invariant_plan(shapes, device),) if is_batch_invariant() else plan(shapes, device)


def row_range(rows: Any, shapes: tuple[GemmShape, ...], *, device: DeviceSpec) -> RowRange:
    """The range that holds `rows`, of its own where they are an int; a symbolic expression is guarded on.

    Where it may not be, and is not known to be within a range, the schedules for the rows compiled for, or for many,
    are taken for any number of rows.
    """
    known = _compat.known_size(rows)
    if is_batch_invariant():
        return dataclasses.replace(*_ranges(shapes, device), max_rows=known)
    if known is not None:
        return RowRange(known, tuple(exact_schedule(known, shape, device=device) for shape in shapes))
    ranges, guarded = _ranges(shapes, device), _compat.may_guard(rows)
    within = _compat.guard_less_equal if guarded else _compat.known_less_equal
    for candidate in ranges:
        if candidate.max_rows is not None and within(rows, candidate.max_rows):
            return candidate
    return ranges[-1] if guarded else dataclasses.replace(range_of(_compat.size_hint(rows), ranges), max_rows=None)


def _planned_with(shape: GemmShape, node: torch.fx.Node | None) -> tuple[GemmShape, ...]:
    """The shapes that the GEMM of a node is planned with, its own among them."""
    offsets = arguments(node)["offsets"] if node is not None else None
    shapes = _siblings(offsets) if isinstance(offsets, torch.fx.Node) else ()
    return shapes if shape in shapes else (shape,)


def pointers_reason(rows: Any, shape: GemmShape, *, refused: Reason | None, device: torch.device) -> Reason | None:
    """`refused`, why no descriptor reads the weight of the node being lowered, if the plan wants one."""
    if refused is None:
        return None
    shapes, spec = _planned_with(shape, _compat.current_fx_node()), device_spec(device.index or 0)
    could = tuple(dataclasses.replace(other, descriptors=True) for other in shapes)
    if _compat.known_size(rows) is not None:
        wanted = row_range(rows, could, device=spec)
    else:  # at the most rows that this graph is for: no further guard
        most = row_range(rows, shapes, device=spec).max_rows if _compat.may_guard(rows) else _compat.size_hint(rows)
        wanted = range_of(most, _ranges(could, spec))
    return refused if wanted.schedules[shapes.index(shape)].loop.tma else None


def schedule_of(rows: Any, shape: GemmShape, *, device: torch.device) -> tuple[Schedule, int | None]:
    """The schedule for the GEMM of the node being lowered, planned with its siblings, and the most rows it is for."""
    node = _compat.current_fx_node()
    shapes, spec = _planned_with(shape, node), device_spec(device.index or 0)
    chosen = row_range(rows, shapes, device=spec)
    if is_batch_invariant():
        outcome = f"any number of rows: {' and '.join(map(str, chosen.schedules))}"
    elif _compat.known_size(rows) is None:
        outcome = "; ".join(map(str, _ranges(shapes, spec)))
    else:
        outcome = f"{rows} rows: {' and '.join(map(str, chosen.schedules))}"
    layer = layer_of(node) if node is not None else ""
    record("plan", "row_ranges", layer=layer, outcome=outcome)
    record("plan", "schedules", layer=layer, outcome=told(shapes, spec))
    return chosen.schedules[shapes.index(shape)], chosen.max_rows


def usual_schedule(rows: int, shape: GemmShape, *, device: DeviceSpec, known: bool) -> Schedule | None:
    """The schedule for so many rows where results may depend on the batch, `known` to the compiler or one of a range.

    None where it is not another one: they may.
    """
    if not is_batch_invariant():
        return None
    choose = exact_schedule if known else schedule_for
    return choose(rows, shape, device=device)


def planned_schedule(rows: Any, node: torch.fx.Node, *, device: torch.device) -> Schedule | None:
    """The schedule that the GEMM of an FX node will get; None while a size of its weight is symbolic."""
    shape = _shape_of(node)
    if shape is None:
        return None
    shapes = _planned_with(shape, node)
    return row_range(rows, shapes, device=device_spec(device.index or 0)).schedules[shapes.index(shape)]


def rows_bound(rows: Any, dispatch: torch.fx.Node | None, *, device: torch.device) -> int | None:
    """The largest row count the graph being lowered is for, where its expert GEMMs bound it; for `moe_dispatch`."""
    known = _compat.known_size(rows)
    if known is not None:
        return known
    for item in dispatch.users if dispatch is not None else ():
        if item.args[1:] == (2,):  # offsets
            shapes = _siblings(item)
            return row_range(rows, shapes, device=device_spec(device.index or 0)).max_rows if shapes else None
    return None
