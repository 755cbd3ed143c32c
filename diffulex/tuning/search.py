"""Cell by cell: what is timed, how far the planned schedules are from the best one, and what of it is kept."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lowering.schedule.device import DeviceSpec
from lowering.schedule.schedule import FIELDS, Schedule, numbers_of, schedule_of
from lowering.schedule.storage import Table

from .cells import BY_MODEL, BY_MODEL_FOR_ROWS, NOW, Cell, planned, to_time
from .measure import Measure, Timing

_NOT_COMPILED = "one token: compiled experts multiply vectors there, whatever was timed; eager calls go by it"
CSV_HEADER = ("shape", "stage", "tokens", *FIELDS, "us", "error")


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one cell: its times, and the schedules that are or would be planned, by who chose them."""

    cell: Cell
    timing: Timing
    planned: dict[str, Schedule]

    @property
    def best(self) -> Schedule | None:
        """The fastest schedule; None without any."""
        seconds = self.timing.seconds
        return min(seconds, key=lambda schedule: seconds[schedule]) if seconds else None

    def loss(self, schedule: Schedule) -> float | None:
        """The part of the best time that a schedule takes longer; None without a time of it."""
        seconds = self.timing.seconds
        return seconds[schedule] / min(seconds.values()) - 1 if schedule in seconds else None


def tune(
    cells: Sequence[Cell],
    *,
    device: DeviceSpec,
    best: int,
    measure: Measure,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Result]:
    """Time the cells in order, layer by layer, and stop before the first one that begins past `seconds`.

    A cell that runs out of memory has no times.
    """
    deadline = clock() + seconds
    for _, group in itertools.groupby(cells, key=lambda cell: cell.case):
        if clock() >= deadline:
            return
        wanted = {cell: to_time(cell, device, best=best) for cell in group}
        jobs = [(cell, schedule) for cell, schedules in wanted.items() for schedule in schedules]
        problems = measure.prepare(jobs, deadline=deadline)
        for cell, schedules in wanted.items():
            if clock() >= deadline:
                return
            refused = {schedule: problems[cell, schedule] for schedule in schedules if (cell, schedule) in problems}
            try:
                timing = measure.time(cell, [schedule for schedule in schedules if schedule not in refused])
            except torch.OutOfMemoryError as error:
                timing = Timing({}, {}, dict.fromkeys(schedules, str(error).split(". ")[0]))
            timing = dataclasses.replace(timing, refused=refused | timing.refused)
            yield Result(cell, timing, planned(cell, device))


def table_of(results: Iterable[Result]) -> Table:
    """What is kept: the times of each GEMM and row count."""
    table: dict[Any, dict[int, Mapping[Schedule, float]]] = {}
    for result in results:
        if result.timing.seconds:
            table.setdefault(result.cell.gemm, {})[result.cell.rows] = result.timing.seconds
    return table


def csv_rows(result: Result) -> list[list[Any]]:
    """The columns of `CSV_HEADER`, a row for each schedule with a time."""
    cell, timing = result.cell, result.timing
    head = [cell.case.name, cell.stage, cell.tokens]
    return [
        [*head, *numbers_of(schedule), f"{seconds * 1e6:.2f}", f"{timing.errors[schedule]:.1e}"]
        for schedule, seconds in timing.seconds.items()
    ]


def schedule_of_row(row: Mapping[str, str]) -> Schedule:
    """The schedule of a row that `csv.DictReader` read."""
    return schedule_of([int(row[name]) for name in FIELDS])


def writer_of(stream: Any) -> Callable[[Result], None]:
    """What writes the rows of a result to a text stream, at once, below a header that this writes."""
    writer = csv.writer(stream)
    writer.writerow(CSV_HEADER)

    def write(result: Result) -> None:
        writer.writerows(csv_rows(result))
        stream.flush()

    return write


def report(results: Sequence[Result], left: Sequence[Cell]) -> str:
    """The best schedule of each cell, as Python, how far the planned ones are from it, and what has no times."""
    lines = [line for result in results for line in _lines(result)]
    lines += [_NOT_COMPILED] if any(result.cell.by_vectors for result in results) else []
    for name in (BY_MODEL, BY_MODEL_FOR_ROWS, NOW):
        lines += _summary(name, [(result.cell, result.loss(result.planned[name])) for result in results])
    lines += [f"not timed: {', '.join(map(str, left))}"] if left else []
    return "\n".join(lines)


def report_after(results: Iterable[Result], device: DeviceSpec) -> str:
    """How far what is planned now, with the times in it, is from the best."""
    losses = [(result.cell, result.loss(planned(result.cell, device)[NOW])) for result in results]
    return "\n".join(_summary("planned from now on", losses))


def _lines(result: Result) -> list[str]:
    timing, best = result.timing, result.best
    cell = f"{result.cell} ({result.cell.rows} rows)"
    refused = [f"    no time: {schedule}, {why}" for schedule, why in timing.refused.items()]
    if best is None:
        return [f"{cell}: no schedule has a time", *refused]
    told = [f"{cell}: {timing.seconds[best] * 1e6:.2f} us, the best of {len(timing.seconds)}: {best!r}"]
    names: dict[Schedule, list[str]] = {}
    for name, schedule in result.planned.items():
        names.setdefault(schedule, []).append(name)
    for schedule, known_as in names.items():
        loss = result.loss(schedule)
        far = "no time" if loss is None else f"{timing.seconds[schedule] * 1e6:.2f} us, +{loss:.1%}"
        told.append(f"    {schedule}, {far}: {', '.join(known_as)}")
    return told + refused


def _summary(name: str, losses: Sequence[tuple[Cell, float | None]]) -> list[str]:
    known = [(loss, str(cell)) for cell, loss in losses if loss is not None]
    if not known:
        return []
    mean = math.exp(sum(math.log1p(loss) for loss, _ in known) / len(known)) - 1
    worst, where = max(known)
    cells = f"{len(known)} of {len(losses)} cells"  # in the others that schedule has no time
    return [f"{name}: +{mean:.1%} over the best (geometric mean of {cells}), +{worst:.1%} at worst ({where})"]
