"""The loop over cells with made-up times: what is timed, kept and told, and where it stops."""

import csv
import dataclasses
import io
import re

import pytest
import torch

from diffulex.benching.shapes import case_of_shape
from diffulex.tuning.cells import BY_MODEL, NOW, cells_of, to_time
from diffulex.tuning.search import CSV_HEADER, report, report_after, schedule_of_row, table_of, tune, writer_of
from lowering.schedule import plan, storage
from lowering.schedule.device import H100
from lowering.schedule.plan import exact_schedule
from lowering.schedule.schedule import FIELDS, Loop, Schedule
from tests.support.tuned import FakeMeasure, tuned_folder

CELLS = cells_of([case_of_shape(name) for name in ("qwen3", "gpt-oss")], [1, 512], dtype=torch.bfloat16)


def tuned(measure, *, seconds=1e9, best=8, cells=CELLS):
    return list(tune(cells, device=H100, best=best, measure=measure, seconds=seconds, clock=measure.clock))


@pytest.fixture
def results(tmp_path):
    with tuned_folder(tmp_path):
        yield tuned(FakeMeasure(H100))


def test_every_cell_is_timed_with_its_schedules_and_kernels_come_first(tmp_path):
    with tuned_folder(tmp_path):
        measure = FakeMeasure(H100)
        results = tuned(measure)
        assert [result.cell for result in results] == measure.timed == CELLS
        assert [set(result.timing.seconds) for result in results] == [set(to_time(c, H100, best=8)) for c in CELLS]
        assert [{cell.case.name for cell, _ in jobs} for jobs, _ in measure.prepared] == [{"qwen3"}, {"gpt-oss"}]
        assert {deadline for _, deadline in measure.prepared} == {1e9}


@pytest.mark.parametrize(("seconds", "done"), [(0.0, 0), (0.5, 1), (3.0, 3), (4.5, 5), (100.0, 8)])
def test_no_cell_begins_past_the_time(seconds, done, tmp_path):
    with tuned_folder(tmp_path):
        measure = FakeMeasure(H100)
        results = tuned(measure, seconds=seconds)
    assert len(results) == done
    text = report(results, CELLS[done:])
    assert ("not timed: " in text) == (done < 8)
    assert all(str(cell) in text for cell in CELLS)


def test_what_was_kept_decides_the_plans(results, tmp_path):
    before = [exact_schedule(r.cell.rows, r.cell.gemm, device=H100) for r in results]
    assert storage.save(storage.key_of(H100), table_of(results)) is None
    plan.refresh()
    after = [exact_schedule(r.cell.rows, r.cell.gemm, device=H100) for r in results]
    assert after == [result.best for result in results] != before
    far = [float(re.search(r"\+(\S+)% over", text)[1]) for text in (report(results, []).splitlines()[-1],
                                                                      report_after(results, H100))]  # fmt: skip
    assert far[1] < far[0] / 2, "ranges are not the best for each row count, but near it"
    again = tuned(FakeMeasure(H100))
    assert [r.planned[BY_MODEL] for r in again] == [r.planned[BY_MODEL] for r in results]
    assert all(r.planned[NOW] == r.planned[BY_MODEL] for r in results)
    assert any(r.planned[NOW] != r.planned[BY_MODEL] for r in again)


def test_the_report_names_the_best_schedule_as_python(results):
    text = report(results, [])
    pasted = re.findall(r"the best of \d+: (Schedule\(.*\))$", text, re.MULTILINE)
    scope = {"Schedule": Schedule, "Loop": Loop}
    assert [eval(expression, scope) for expression in pasted] == [result.best for result in results]


def test_who_runs_without_a_schedule_is_told():
    """Compiled for one token, experts without a bias whose weights are not transposed."""
    case = CELLS[0].case
    specs = [dataclasses.replace(case.spec, **change) for change in ({}, {"bias": True}, {"transposed": True})]
    cells = [
        dataclasses.replace(cell, case=dataclasses.replace(case, spec=spec)) for spec in specs for cell in CELLS[:4]
    ]
    assert [cell.by_vectors for cell in cells] == [True, True, *[False] * 10]
    found = tuned(FakeMeasure(H100), cells=cells)
    assert ["one token: compiled" in report(some, []) for some in (found[:4], found[4:])] == [True, False]


def test_losses_are_to_the_best_time():
    """All take what the model says, but the planned schedules twice as long."""
    plans = {to_time(cell, H100, best=8)[0] for cell in CELLS[:2]}
    results = tuned(FakeMeasure(H100, factor=lambda s: 2.0 if s in plans else 1.0), cells=CELLS[:2])
    losses = [result.loss(result.planned[BY_MODEL]) for result in results]
    assert min(losses) > 0.5
    mean = ((1 + losses[0]) * (1 + losses[1])) ** 0.5 - 1
    text = report(results, [])
    assert (
        f"the cost model: +{mean:.1%} over the best (geometric mean of 2 of 2 cells), +{max(losses):.1%} at worst"
        in text
    )
    assert f"+{losses[0]:.1%}: the cost model" in text.splitlines()[1]


def test_schedules_without_a_kernel_are_told_and_not_timed():
    first = to_time(CELLS[0], H100, best=8)[0]
    results = tuned(FakeMeasure(H100, problems={first: "too large"}), cells=CELLS[:1])
    assert first not in results[0].timing.seconds and results[0].timing.refused == {first: "too large"}
    text = report(results, [])
    assert f"    no time: {first}, too large" in text and f"{first}, no time" in text
    assert "the cost model: +" not in text, "nothing is known of it"


def test_a_cell_without_memory_has_no_times():
    class Full(FakeMeasure):
        def time(self, cell, schedules):
            if cell == CELLS[0]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.")
            return super().time(cell, schedules)

    results = tuned(Full(H100), cells=CELLS[:2])
    assert [result.best is None for result in results] == [True, False]
    assert "no schedule has a time" in report(results, []) and "CUDA out of memory" in report(results, [])
    assert list(table_of(results)) == [CELLS[1].gemm]


def test_times_are_written_as_the_calibration_reads_them(results):
    stream = io.StringIO()
    write = writer_of(stream)
    for result in results:
        write(result)
    rows = list(csv.DictReader(io.StringIO(stream.getvalue())))
    assert tuple(rows[0]) == CSV_HEADER == ("shape", "stage", "tokens", *FIELDS, "us", "error")
    read = [(r["shape"], r["stage"], int(r["tokens"]), schedule_of_row(r)) for r in rows]
    assert read == [(r.cell.case.name, r.cell.stage, r.cell.tokens, s) for r in results for s in r.timing.seconds]
    assert float(rows[0]["us"]) == pytest.approx(1e6 * next(iter(results[0].timing.seconds.values())), abs=0.01)
