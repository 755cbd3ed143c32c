"""From shape and device to a few row ranges with a schedule each: the cost model decides, and where the GEMM was tuned
on the device, the times that were measured then.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from . import tuned as tuned_times
from .device import DeviceSpec
from .schedule import PLAIN, GemmShape, Loop, RowRange, Schedule

MAX_RANGES = 4
_ROW_GRID = tuple(2**power for power in range(3, 21))
_RANGE_COST = 0.05  # summed log loss that another range, so another compilation, has to save


def candidates(shape: GemmShape, device: DeviceSpec) -> list[Schedule]:
    """Schedules that fit the device's shared memory and registers."""
    # before sm_90, products take their operands from registers too
    most_accumulators = 128 if device.capability >= (9, 0) else 64
    return [
        schedule
        for schedule in (*_pointer_schedules(), *_descriptor_schedules(shape, device))
        if schedule.shared_memory(gated=shape.gated, element_size=shape.element_size) <= device.shared_memory - 2048
        and 4 <= schedule.accumulators_per_thread(gated=shape.gated) <= min(shape.accumulators, most_accumulators)
    ]


def _pointer_schedules() -> Iterator[Schedule]:
    for block_m, block_n, block_k in itertools.product((16, 32, 64, 128), (32, 64, 128, 256), (64, 128, 256)):
        if (block_k == 256 and block_m > 16) or (block_n == 256 and block_m < 64):
            continue  # deep tiles only pay where rows are few, wide ones where they are many
        # an expert has several tiles of rows only where there are many: then their order matters
        loops = (PLAIN,) if block_m == 16 else (PLAIN, Loop(grouped=True))
        warps = (4,) if block_m < 64 else (4, 8)
        for num_warps, num_stages, loop in itertools.product(warps, (3, 4), loops):
            yield Schedule(block_m, block_n, block_k, num_warps, num_stages, loop)


def _descriptor_schedules(shape: GemmShape, device: DeviceSpec) -> Iterator[Schedule]:
    if device.capability < (9, 0) or shape.element_size != 2 or not shape.descriptors:
        return
    for block_m, block_n in ((64, 64), (64, 128), (64, 256), (128, 128), (128, 256)):
        for block_k, num_stages, flatten in itertools.product((64, 128), (3, 4), (False, True)):
            # the stored tile and the next one's operands have to fit side by side in a flattened loop
            loop = Loop(tma=True, flatten=flatten, subtiles=2 if flatten and block_n == 256 else 1)
            group_m = 16 if shape.gated else 8  # with halves twice as wide, a wave's square has twice the row tiles
            yield Schedule(block_m, block_n, block_k, block_m // 16, num_stages, loop, group_m)
    if device.capability[0] == 9 and not shape.unlike_specialized():  # products of sm_90 alone
        yield shape.specialized


@functools.lru_cache(maxsize=256)
def _times(shape: GemmShape, device: DeviceSpec, *, tuned: bool = True) -> tuple[list[Schedule], tuned_times.Times]:
    """(schedules, their times by the row count)."""
    schedules = candidates(shape, device)
    return schedules, tuned_times.Times(shape, device, schedules=schedules, tuned=tuned)


@functools.lru_cache(maxsize=256)
def _losses(
    shape: GemmShape, device: DeviceSpec, *, grid: tuple[int, ...] = _ROW_GRID, tuned: bool = True
) -> tuple[list[Schedule], list[list[float]]]:
    """(schedules, log of time over the best time at each point of the grid)."""
    schedules, time = _times(shape, device, tuned=tuned)
    times = [[time(rows, schedule) for rows in grid] for schedule in schedules]
    best = [min(column) for column in zip(*times, strict=True)]
    return schedules, [[math.log(t / b) for t, b in zip(row, best, strict=True)] for row in times]


@functools.lru_cache(maxsize=256)
def plan(
    shapes: tuple[GemmShape, ...], device: DeviceSpec, *, max_ranges: int = MAX_RANGES, tuned: bool = True
) -> tuple[RowRange, ...]:
    """Row ranges in ascending order, the last one open, for GEMMs that share one routing: least summed loss.

    tuned: times that were measured on the device count, where there are some; else it is the model's own plan.
    """
    rows_measured = {rows for shape in shapes for rows in _times(shape, device, tuned=tuned)[1].rows}
    grid = tuple(sorted({*_ROW_GRID, *rows_measured}))
    losses = [_losses(shape, device, grid=grid, tuned=tuned) for shape in shapes]
    points = len(grid)

    @functools.cache
    def one(start: int, stop: int) -> tuple[float, tuple[int, ...]]:
        picks = [min((sum(row[start:stop]), index) for index, row in enumerate(loss)) for _, loss in losses]
        return sum(value for value, _ in picks), tuple(index for _, index in picks)

    @functools.cache
    def split(start: int, ranges: int) -> tuple[float, tuple[tuple[int, tuple[int, ...]], ...]]:
        total, picks = one(start, points)
        answer: tuple[float, tuple[tuple[int, tuple[int, ...]], ...]] = (total, ((points - 1, picks),))
        if ranges > 1:
            for stop in range(start + 1, points):
                head, head_picks = one(start, stop)
                rest, tail = split(stop, ranges - 1)
                answer = min(answer, (head + rest + _RANGE_COST, ((stop - 1, head_picks), *tail)))
        return answer

    return tuple(
        RowRange(
            # the bound lies between two points of the grid, in the geometric middle
            None if last == points - 1 else math.isqrt(grid[last] * grid[last + 1]),
            tuple(schedules[pick] for (schedules, _), pick in zip(losses, picks, strict=True)),
        )
        for last, picks in split(0, max_ranges)[1]
    )


@functools.lru_cache(maxsize=256)
def invariant_plan(shapes: tuple[GemmShape, ...], device: DeviceSpec) -> RowRange:
    """One range for any number of rows, whose schedules sum a row in an order that no other row bears upon."""
    (found,) = plan(shapes, device, max_ranges=1)
    return dataclasses.replace(found, schedules=tuple(each.without_split_k() for each in found.schedules))


@functools.lru_cache(maxsize=1024)
def exact_schedule(rows: int, shape: GemmShape, *, device: DeviceSpec, tuned: bool = True) -> Schedule:
    """The schedule for one GEMM that will only ever have `rows` rows, 0 too.

    It may sum in other steps than `schedule_for` the same rows: graphs for one row count and for many agree by the
    error of the dtype, not bitwise.
    """
    rows = max(1, rows)
    schedules, time = _times(shape, device, tuned=tuned)
    return min(schedules, key=lambda found: time(rows, found))


def schedule_for(rows: int, shape: GemmShape, *, device: DeviceSpec) -> Schedule:
    """The schedule for one GEMM over `rows` rows, out of the few that all row counts share."""
    return range_of(rows, plan((shape,), device)).schedules[0]


def range_of(rows: int | None, ranges: tuple[RowRange, ...]) -> RowRange:
    """The range that so many rows are in, the last one for None."""
    return next(found for found in ranges if found.max_rows is None or (rows is not None and rows <= found.max_rows))


def refresh() -> None:
    """Plan anew, with tuned times as they are on disk now. What is compiled stays as it is."""
    tuned_times.forget()
    for cached in (_times, _losses, plan, invariant_plan, exact_schedule):
        cached.cache_clear()
