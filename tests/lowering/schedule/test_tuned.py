"""Plans by measured times: what was measured decides, the model fills in between, and without any all is as it was."""

import dataclasses
import itertools
import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowering.inductor import identity
from lowering.inductor.passes import MoEPasses
from lowering.schedule import plan as plans
from lowering.schedule import storage, tuned
from lowering.schedule.device import H100, H200
from lowering.schedule.plan import MAX_RANGES, candidates, exact_schedule, plan, schedule_for
from lowering.schedule.schedule import GemmShape, Schedule
from tests.support.tuned import keep, model_times, some_factor, tuned_folder

UP, DOWN = GemmShape(128, 2048, 768, True), GemmShape(128, 768, 2048, False)
ROWS = (8, 64, 512, 4096, 32768)
GRID = plans._ROW_GRID


@pytest.fixture
def folder(tmp_path):
    with tuned_folder(tmp_path) as folder:
        yield folder


@pytest.fixture
def table(folder):
    """Both GEMMs, on an H100, the model's times but for a factor."""
    table = {s: {rows: model_times(s, H100, rows, factor=some_factor) for rows in ROWS} for s in (UP, DOWN)}
    keep(H100, table)
    return table


def fastest(times):
    return min(times, key=lambda schedule: times[schedule])


@pytest.mark.parametrize("shape", [UP, DOWN], ids=["up", "down"])
@pytest.mark.parametrize("rows", ROWS)
def test_the_best_measured_schedule_is_taken_at_the_rows_it_was_measured_at(table, shape, rows):
    assert exact_schedule(rows, shape, device=H100) == fastest(table[shape][rows])
    assert {exact_schedule(rows, shape, device=H100, tuned=False)} <= set(table[shape][rows])


def test_tuning_changed_something(table):
    """Else the test above says nothing."""
    assert sum(exact_schedule(r, UP, device=H100) != exact_schedule(r, UP, device=H100, tuned=False) for r in ROWS) > 1


factors = st.dictionaries(st.integers(0, 11), st.floats(0.3, 3.0), max_size=12)


@given(st.dictionaries(st.sampled_from([2, 6, 8, 48, 100, 512, 4096, 131072, 1 << 22]), factors, max_size=4))
def test_ranges_are_few_and_in_order_whatever_was_measured(measured):
    table = {UP: {}}
    for rows, chosen in measured.items():
        times = model_times(UP, H100, rows)
        table[UP][rows] = {s: t * chosen.get(index, 1.0) for index, (s, t) in enumerate(times.items())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned, "_table_of", lambda device: (table, "x"))
        for cached in (plans._times, plans._losses, plan, exact_schedule):
            cached.cache_clear()
        ranges = plan((UP, DOWN), H100)
        bounds = [found.max_rows for found in ranges]
        assert 1 <= len(ranges) <= MAX_RANGES and bounds[-1] is None
        assert bounds[:-1] == sorted(set(bounds[:-1]))
        for rows, times in table[UP].items():
            assert exact_schedule(rows, UP, device=H100) == fastest(times)
            assert schedule_for(rows, UP, device=H100) in candidates(UP, H100)
    plans.refresh()


def test_a_schedule_that_is_far_better_is_the_one_of_its_range(folder):
    """Rows that are no power of two, so that they are points of the grid of their own."""
    winner = {rows: list(model_times(UP, H100, rows))[7] for rows in (48, 6000)}
    factor = {rows: lambda s, best=best: 0.1 if s == best else 1.0 for rows, best in winner.items()}
    keep(H100, {UP: {rows: model_times(UP, H100, rows, factor=factor[rows]) for rows in winner}})
    for rows, best in winner.items():
        assert schedule_for(rows, UP, device=H100) == best
        assert plans.range_of(rows, plan((UP, DOWN), H100)).schedules[0] == best


def test_rows_fewer_than_plans_look_at_otherwise_count_where_they_were_measured(folder):
    """Two rows, one token of a model with two experts a token; the schedule that is best there is slow from 8 on."""
    some = list(model_times(UP, H100, 8))
    factor = {2: lambda s: 0.1 if s == some[5] else 1.0, 8: lambda s: 10.0 if s == some[5] else 1.0}
    keep(H100, {UP: {rows: model_times(UP, H100, rows, count=40, factor=factor[rows]) for rows in factor}})
    assert schedule_for(2, UP, device=H100) == some[5] != schedule_for(8, UP, device=H100)
    assert plan((UP,), H100)[0].max_rows == 4, "in the geometric middle"


def test_what_was_not_measured_is_not_believed_to_be_better(folder):
    """All that was measured took ten times as long as predicted; the model would have the others win."""
    keep(H100, {UP: {512: model_times(UP, H100, 512, count=3, factor=lambda s: 10.0)}})
    times = model_times(UP, H100, 512, count=3)
    assert exact_schedule(512, UP, device=H100) in times
    time = plans._times(UP, H100)[1]
    others = [s for s in candidates(UP, H100) if s not in times]
    assert min(time(512, s) for s in others) > 10 * min(times.values())


def test_nor_between_two_row_counts_that_it_was_measured_at_neither_of(folder):
    """A schedule that did better than the model says, elsewhere, and is expected to lose a little here."""
    near = list(model_times(UP, H100, 8192, count=30))
    first, late = near[0], near[29]
    cells = {
        rows: {s: t for s, t in model_times(UP, H100, rows, count=10).items() if s != late} for rows in (4096, 16384)
    }
    cells[64] = model_times(UP, H100, 64, count=len(candidates(UP, H100)), factor=lambda s: 0.5 if s == late else 1.0)
    keep(H100, {UP: cells})
    time, plain = (plans._times(UP, H100, tuned=on)[1] for on in (True, False))
    assert time(64, late) == pytest.approx(plain(64, late) / 2)
    assert all(time(rows, late) > 0.99 * min(time(rows, s) for s in near) for rows in (4096, 6000, 8192, 16384))
    assert 0.5 * plain(8192, late) < plain(8192, first), "the factor alone would have it win"


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_factor_that_all_schedules_have_changes_no_choice(factor, folder):
    keep(H100, {UP: {rows: model_times(UP, H100, rows, factor=lambda s: factor) for rows in ROWS}})
    for rows in (1, *GRID, 100, 777):
        assert exact_schedule(rows, UP, device=H100) == exact_schedule(rows, UP, device=H100, tuned=False)
    assert plan((UP, DOWN), H100) == plan((UP, DOWN), H100, tuned=False)


def test_between_measured_rows_the_model_is_corrected(folder):
    """By what it was off at both sides, each to its part of the way, and beyond the last ones as there."""
    slow = next(iter(model_times(UP, H100, 64)))
    slower = {64: 2.0, 4096: 8.0}
    for rows, by in slower.items():
        times = dict.fromkeys(model_times(UP, H100, rows, count=100), 1.0)
        assert slow in times
        keep(
            H100, {UP: {rows: model_times(UP, H100, rows, count=100, factor=lambda s, by=by: by if s == slow else 1.0)}}
        )
    corrected, plain = (plans._times(UP, H100, tuned=on)[1] for on in (True, False))
    for rows, by in {8: 2.0, 64: 2.0, 512: 4.0, 4096: 8.0, 1 << 20: 8.0}.items():
        assert corrected(rows, slow) / plain(rows, slow) == pytest.approx(by, rel=1e-9), rows


def test_without_times_plans_are_the_models(folder):
    for shapes in ((UP,), (DOWN,), (UP, DOWN)):
        for ranges in (1, MAX_RANGES):
            assert plan(shapes, H100, max_ranges=ranges) == plan(shapes, H100, max_ranges=ranges, tuned=False)


def test_times_are_those_of_exactly_one_gemm_and_one_device(table):
    assert plan((UP,), H100) != plan((UP,), H100, tuned=False)
    others = {"num_experts": 64, "depth": 1024, "width": 512, "gated": False, "element_size": 4, "descriptors": False,
              "accumulators": 64, "rows_follow": False}  # fmt: skip
    assert set(others) == {field.name for field in dataclasses.fields(GemmShape)}
    for name, value in others.items():
        shape = dataclasses.replace(UP, **{name: value})
        assert plan((shape,), H100) == plan((shape,), H100, tuned=False)
    for device in (H200, dataclasses.replace(H100, name="H100 PCIe"), dataclasses.replace(H100, capability=(9, 1))):
        assert plan((UP,), device) == plan((UP,), device, tuned=False)
    assert plan((UP,), dataclasses.replace(H100, name="H100")) == plan((UP,), H100)


def test_a_schedule_that_does_not_fit_is_not_taken_from_a_file(folder):
    foreign = Schedule(512, 512, 512, 4, 8)
    keep(H100, {UP: {512: {foreign: 1e-9, **model_times(UP, H100, 512, count=2)}, 4096: {foreign: 1e-9}}})
    assert exact_schedule(512, UP, device=H100) in model_times(UP, H100, 512, count=2)
    assert plans._times(UP, H100)[1].rows == {512}


def test_a_file_is_read_once_until_asked_for_again(table, monkeypatch):
    reads = []
    stock = storage.load
    monkeypatch.setattr(storage, "load", lambda key: reads.append(key) or stock(key))
    plans.refresh()
    for rows in (1, 7, 100, 5000):
        exact_schedule(rows, UP, device=H100)
        schedule_for(rows, DOWN, device=H100)
        tuned.told((UP, DOWN), H100)
    assert len(reads) == 1
    plans.refresh()
    plan((UP,), H100)
    assert len(reads) == 2


def test_a_damaged_file_is_said_once_and_plans_are_the_models(table, folder, caplog):
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    plans.refresh()
    with caplog.at_level(logging.WARNING, logger="diffulex"):
        for shapes in ((UP,), (UP, DOWN)):
            assert plan(shapes, H100) == plan(shapes, H100, tuned=False)
        tuned.told((UP,), H100)
    assert len(caplog.records) == 1


def test_where_schedules_come_from_is_told(folder):
    assert tuned.told((UP, DOWN), H100) == "from the cost model"
    keep(H100, {UP: {rows: model_times(UP, H100, rows, count=2) for rows in (512, 8)}})
    assert tuned.told((UP,), H100) == "from times measured on this device at 8, 512 rows"
    assert tuned.told((UP, DOWN), H100).endswith(" rows for 1 of 2 GEMMs, the others from the cost model")
    assert tuned.told((UP, DOWN), H200) == "from the cost model"


# What Inductor's caches know code by


@pytest.fixture
def present(monkeypatch):
    """CUDA has started, and there are these devices."""
    devices = [H100]
    monkeypatch.setattr(tuned.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(tuned.torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(tuned, "device_spec", lambda index: devices[index])
    return devices


def test_code_is_known_by_the_times_that_its_schedules_come_from(folder, present):
    before = identity.identity(), MoEPasses().uuid()
    assert before[0] == f"{identity.fingerprint()}-{before[0].rpartition('-')[2]}", "nothing is added without times"
    keep(H200, {UP: {8: model_times(UP, H200, 8)}})
    assert (identity.identity(), MoEPasses().uuid()) == before, "those of a device that is not here do not count"
    seen = {before}
    for rows in (8, 64):
        keep(H100, {UP: {rows: model_times(UP, H100, rows)}})
        seen.add((identity.identity(), MoEPasses().uuid()))
    assert len(seen) == 3 and len({key for key, _ in seen}) == 3 and len({uuid for _, uuid in seen}) == 3
    present[:] = [H200, H100]
    assert (identity.identity(), MoEPasses().uuid()) not in seen


def test_the_tag_follows(folder, present):
    import torch

    with torch.compiler.config.patch(cache_key_tag="mine"):
        identity.tag_caches()
        first = torch.compiler.config.cache_key_tag
        for rows in (8, 64):
            keep(H100, {UP: {rows: model_times(UP, H100, rows)}})
            identity.tag_caches()
            assert torch.compiler.config.cache_key_tag == f"mine+diffulex-{identity.identity()}" != first
        for path in folder.iterdir():
            path.unlink()
        plans.refresh()
        identity.tag_caches()
        assert torch.compiler.config.cache_key_tag == first


def test_asking_for_the_identity_starts_no_cuda(folder, monkeypatch):
    monkeypatch.setattr(tuned.torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(tuned.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(tuned, "device_spec", lambda index: pytest.fail("asked for a device"))
    assert tuned.mark() == ""


def test_bounds_lie_in_the_geometric_middle():
    """In whole numbers, the same as by the factor between two powers of two."""
    assert [math.isqrt(a * b) for a, b in itertools.pairwise(GRID)] == [int(a * math.sqrt(2)) for a in GRID[:-1]]
