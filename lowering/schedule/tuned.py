"""Measured times in the place of predicted ones, for GEMMs that were tuned on a device.

What was measured decides; the model fills in between, by its `score`; a measured time has nothing of what that adds. At
each measured row count it is corrected by a factor, that of the measured time for a schedule that has one; between two
of them the factor changes in proportion to the logarithm of the rows, and beyond the last one it stays. So a schedule
has its own time again where it was measured, and the model's curve, moved, elsewhere. For a schedule that was not
measured at a row count the factor is what the model errs by there for all schedules, times what it errs by for this one
where it was measured; but it is not believed to beat the best that was measured: it was left out because the model
expected less of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from . import storage
from .cost_model import score
from .device import DeviceSpec, device_spec
from .schedule import GemmShape, Schedule

_UNMEASURED = 1.001  # of the best measured time at least: between equals, the one that was measured is taken
Points = list[tuple[float, float]]  # logarithms of rows, in order, and of a factor


@functools.cache
def _table_of(device: DeviceSpec) -> tuple[storage.Table, str]:
    """(times, their digest); read once in a process, until `forget`."""
    table = storage.load(storage.key_of(device))
    return table, storage.digest_of(table)[:16]


def forget() -> None:
    """Have the files read again; see `plan.refresh`."""
    _table_of.cache_clear()


def measured(shape: GemmShape, device: DeviceSpec) -> Mapping[int, Mapping[Schedule, float]]:
    """Rows -> schedule -> seconds of exactly this GEMM on a device of this name; empty where it was not tuned."""
    return _table_of(device)[0].get(shape, {})


def mark() -> str:
    """The digests of all times that plans for the devices of this process come from; empty where there are none.

    Starts no CUDA: where it has not started, no graph for it is being compiled.
    """
    if not torch.cuda.is_initialized():
        return ""
    devices = {device_spec(index) for index in range(torch.cuda.device_count())}
    return "".join(sorted({_table_of(device)[1] for device in devices}))


def told(shapes: Collection[GemmShape], device: DeviceSpec) -> str:
    """Where the schedules of these GEMMs come from, in words."""
    rows = {shape: sorted(measured(shape, device)) for shape in shapes}
    known = [found for found in rows.values() if found]
    if not known:
        return "from the cost model"
    counts = ", ".join(map(str, sorted({count for found in known for count in found})))
    some = "" if len(known) == len(rows) else f" for {len(known)} of {len(rows)} GEMMs, the others from the cost model"
    return f"from times measured on this device at {counts} rows{some}"


class Times:
    """Seconds of one GEMM by rows and schedule, measured or by the corrected model."""

    def __init__(
        self, shape: GemmShape, device: DeviceSpec, *, schedules: Sequence[Schedule], tuned: bool = True
    ) -> None:
        allowed, cells = frozenset(schedules), measured(shape, device) if tuned else {}
        self._shape, self._device = shape, device
        kept = {rows: {s: t for s, t in times.items() if s in allowed} for rows, times in sorted(cells.items())}
        self._cells = {rows: times for rows, times in kept.items() if times}
        self._common: Points = []
        self._own: dict[Schedule, Points] = {}
        for rows, times in self._cells.items():
            factors = {schedule: self._factor(seconds, rows, schedule) for schedule, seconds in times.items()}
            common = sum(factors.values()) / len(factors)
            self._common.append((math.log(rows), common))
            for schedule, factor in factors.items():
                self._own.setdefault(schedule, []).append((math.log(rows), factor - common))
        self._points: dict[Schedule, Points] = {}

    @property
    def rows(self) -> Collection[int]:
        """The row counts with measured times."""
        return self._cells.keys()

    def __call__(self, rows: int, schedule: Schedule) -> float:
        """Seconds over so many rows, at least one: `cost_model.score`, corrected by what was measured."""
        expected = score(rows, self._shape, schedule=schedule, device=self._device)
        if not self._cells:
            return expected
        if schedule not in self._points:
            self._points[schedule] = self._factors(schedule)
        return expected * math.exp(_between(self._points[schedule], math.log(rows)))

    def _factors(self, schedule: Schedule) -> Points:
        """What corrects the model for a schedule at each measured row count, as logarithms."""
        points = []
        for (at, common), (rows, times) in zip(self._common, self._cells.items(), strict=True):
            if schedule in times:
                factor = self._factor(times[schedule], rows, schedule)
            else:
                least = self._factor(_UNMEASURED * min(times.values()), rows, schedule)
                factor = max(least, common + _between(self._own.get(schedule, [(at, 0.0)]), at))
            points.append((at, factor))
        return points

    def _factor(self, seconds: float, rows: int, schedule: Schedule) -> float:
        return math.log(seconds / score(rows, self._shape, schedule=schedule, device=self._device))


def _between(points: Points, at: float) -> float:
    """Linear between the points, and constant beyond them."""
    return float(np.interp(at, [x for x, _ in points], [y for _, y in points]))
