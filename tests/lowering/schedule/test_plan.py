"""Plans: few ranges, fitting schedules, and the least loss any ranges could have."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowering.schedule import plan as module_under_test
from lowering.schedule.cost_model import score
from lowering.schedule.device import H100, DeviceSpec
from lowering.schedule.plan import MAX_RANGES, candidates, exact_schedule, plan, schedule_for
from lowering.schedule.schedule import GemmShape

GRID = module_under_test._ROW_GRID
A10 = DeviceSpec("A10", (8, 6), 72, 6.0e11, 1.25e14, 101_376, 6 << 20)
UP, DOWN = GemmShape(128, 2048, 768, True), GemmShape(128, 768, 2048, False)

shapes = st.builds(
    GemmShape,
    num_experts=st.sampled_from([1, 2, 8, 60, 128, 512]),
    depth=st.sampled_from([16, 63, 768, 2048, 7168]),
    width=st.sampled_from([1, 32, 768, 2880, 14336]),
    gated=st.booleans(),
    element_size=st.sampled_from([2, 4]),
)


@given(st.lists(shapes, min_size=1, max_size=3, unique=True), st.sampled_from([H100, A10]))
def test_ranges_cover_all_rows_with_schedules_that_fit(shapes, device):
    ranges = plan(tuple(shapes), device)
    bounds = [found.max_rows for found in ranges]
    assert 1 <= len(ranges) <= MAX_RANGES
    assert bounds[-1] is None
    assert bounds[:-1] == sorted(set(bounds[:-1]))
    for found in ranges:
        assert len(found.schedules) == len(shapes)
        for schedule, shape in zip(found.schedules, shapes, strict=True):
            shared = schedule.shared_memory(gated=shape.gated, element_size=shape.element_size)
            assert shared < device.shared_memory
            assert 4 <= schedule.accumulators_per_thread(gated=shape.gated) <= 128


@given(shapes, st.sampled_from([H100, A10]))
def test_every_shape_has_candidates(shape, device):
    found = candidates(shape, device)
    assert found
    assert len(set(found)) == len(found)


def loss(shapes, device, schedules, points):
    """Summed log of time over the best time at some row counts."""
    total = 0.0
    for shape, schedule in zip(shapes, schedules, strict=True):
        for rows in points:
            best = min(score(rows, shape, schedule=c, device=device) for c in candidates(shape, device))
            total += math.log(score(rows, shape, schedule=schedule, device=device) / best)
    return total


def objective(shapes, device, ranges):
    """The loss over the grid, and the price of the ranges."""
    starts = [0] + [sum(rows <= found.max_rows for rows in GRID) for found in ranges[:-1]]
    parts = zip(ranges, itertools.pairwise([*starts, len(GRID)]), strict=True)
    cost = sum(loss(shapes, device, found.schedules, GRID[start:stop]) for found, (start, stop) in parts)
    return cost + module_under_test._RANGE_COST * (len(ranges) - 1)


def brute_force(shapes, device, max_ranges):
    """The least objective over all ways to cut the grid."""
    losses = [module_under_test._losses(shape, device)[1] for shape in shapes]
    best = math.inf
    for count in range(max_ranges):
        for cuts in itertools.combinations(range(1, len(GRID)), count):
            cost = module_under_test._RANGE_COST * count
            for start, stop in itertools.pairwise([0, *cuts, len(GRID)]):
                cost += sum(min(sum(row[start:stop]) for row in table) for table in losses)
            best = min(best, cost)
    return best


@pytest.mark.parametrize("max_ranges", [1, 2, 3])
@pytest.mark.parametrize("wanted", [(UP,), (UP, DOWN)], ids=["one", "two"])
def test_no_other_ranges_lose_less(wanted, max_ranges):
    ranges = plan(wanted, H100, max_ranges=max_ranges)
    assert len(ranges) <= max_ranges
    assert objective(wanted, H100, ranges) == pytest.approx(brute_force(wanted, H100, max_ranges))


def test_a_range_must_pay_for_itself(monkeypatch):
    plan.cache_clear()
    many = plan((UP, DOWN), H100)
    monkeypatch.setattr(module_under_test, "_RANGE_COST", 1e6)
    plan.cache_clear()
    assert len(plan((UP, DOWN), H100)) == 1 < len(many)
    plan.cache_clear()


def test_bounds_lie_between_points_of_the_grid():
    for found in plan((UP, DOWN), H100)[:-1]:
        below = max(rows for rows in GRID if rows <= found.max_rows)
        assert below < found.max_rows < 2 * below


def test_one_range_for_any_number_of_rows():
    (only,) = plan((UP,), H100, max_ranges=1)
    assert only.max_rows is None
    assert plan((UP, DOWN), H100, max_ranges=1)[0].schedules[0] == only.schedules[0], "whatever is planned beside"


def test_no_row_count_is_far_from_its_best_schedule():
    """The figure behind "the model alone must already be close", by the model itself."""
    for shape in (UP, DOWN):
        for rows in (8, 100, 512, 3000, 32768, 1 << 20):
            chosen = score(rows, shape, schedule=schedule_for(rows, shape, device=H100), device=H100)
            best = min(score(rows, shape, schedule=c, device=H100) for c in candidates(shape, H100))
            assert chosen <= 1.25 * best, (shape, rows)


@pytest.mark.parametrize("rows", [0, 1, 100, 32768])
def test_rows_that_are_known_get_the_best_schedule(rows):
    best = min(candidates(UP, H100), key=lambda found: score(max(1, rows), UP, schedule=found, device=H100))
    assert exact_schedule(rows, UP, device=H100) == best


def test_a_bound_belongs_to_its_range():
    ranges = plan((UP,), H100)
    assert len(ranges) > 1
    for found, following in itertools.pairwise(ranges):
        assert schedule_for(found.max_rows, UP, device=H100) == found.schedules[0]
        assert schedule_for(found.max_rows + 1, UP, device=H100) == following.schedules[0]
    assert schedule_for(0, UP, device=H100) == ranges[0].schedules[0]
    assert schedule_for(1 << 40, UP, device=H100) == ranges[-1].schedules[0]


def test_few_rows_get_small_tiles_and_many_rows_large_ones():
    first, last = plan((UP,), H100)[0].schedules[0], plan((UP,), H100)[-1].schedules[0]
    assert first.block_m < last.block_m
