"""From shape and device to a few token ranges, each with one schedule: the cost model decides, nothing is timed."""

from __future__ import annotations

import functools
import itertools
import math

from .cost_model import predict
from .device import DeviceSpec
from .schedule import GemmShape, Schedule, TokenRange

MAX_RANGES = 4
_TOKEN_GRID = tuple(2**power for power in range(17))


def candidates(shape: GemmShape, device: DeviceSpec) -> list[Schedule]:
    """Schedules that fit the device's shared memory and registers."""
    found = []
    for block_m, block_n, block_k in itertools.product((16, 32, 64, 128), (32, 64, 128, 256), (64, 128, 256)):
        for num_warps, num_stages in itertools.product((4, 8), (3, 4)):
            schedule = Schedule(block_m, block_n, block_k, num_warps, num_stages)
            shared = schedule.shared_memory(gated=shape.gated, element_size=shape.element_size)
            registers = schedule.accumulators_per_thread(gated=shape.gated)
            narrow = block_m < 64 and num_warps == 8
            narrow = narrow or (block_k == 256 and block_m > 16)  # deep tiles only pay where rows are few
            if shared <= device.shared_memory - 2048 and 4 <= registers <= 128 and not narrow:
                found.append(schedule)
    return found


@functools.lru_cache(maxsize=256)
def plan(shape: GemmShape, device: DeviceSpec, max_ranges: int = MAX_RANGES) -> tuple[TokenRange, ...]:
    """Token ranges in ascending order; the last one is open. At most `max_ranges`, chosen for the least total loss."""
    schedules = candidates(shape, device)
    times = [[predict(tokens, shape, schedule, device) for tokens in _TOKEN_GRID] for schedule in schedules]
    best = [min(column) for column in zip(*times, strict=True)]
    loss = [[math.log(t / b) for t, b in zip(row, best, strict=True)] for row in times]
    segments = _segments(loss, max_ranges)
    return tuple(
        TokenRange(None if last == len(_TOKEN_GRID) - 1 else _TOKEN_GRID[last], schedules[choice])
        for last, choice in segments
    )


def _segments(loss: list[list[float]], max_ranges: int) -> list[tuple[int, int]]:
    """Split the token grid into <= max_ranges runs with one schedule each, least summed loss; [(last index, schedule)]."""
    points = len(loss[0])

    @functools.cache
    def one(start: int, stop: int) -> tuple[float, int]:
        return min((sum(row[start:stop]), index) for index, row in enumerate(loss))

    @functools.cache
    def split(start: int, ranges: int) -> tuple[float, tuple[tuple[int, int], ...]]:
        total, choice = one(start, points)
        answer = (total, ((points - 1, choice),))
        if ranges > 1:
            for stop in range(start + 1, points):
                head, head_choice = one(start, stop)
                rest, tail = split(stop, ranges - 1)
                # another range has to earn its recompilation
                answer = min(answer, (head + rest + 0.02, ((stop - 1, head_choice), *tail)))
        return answer

    return list(split(0, max_ranges)[1])


def schedule_for(tokens: int, shape: GemmShape, device: DeviceSpec) -> Schedule:
    """The schedule of the range that holds `tokens`."""
    for token_range in plan(shape, device):
        if token_range.max_tokens is None or tokens <= token_range.max_tokens:
            return token_range.schedule
    raise AssertionError("the last range is open")
