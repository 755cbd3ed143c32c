"""The cost model is one expression over all its symbols, and moves as time moves on hardware."""

import dataclasses
import functools
import math

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from lowering.schedule import cost_model
from lowering.schedule.cost_model import ARGUMENTS, CONSTANTS, cost, gemm_time, predict, score
from lowering.schedule.device import H100, H200
from lowering.schedule.plan import candidates, exact_schedule
from lowering.schedule.schedule import PLAIN, GemmShape, Loop, Schedule

# up stages of models: qwen3-30b-a3b, mixtral, gpt-oss, a tiny one
SHAPES = [
    GemmShape(128, 2048, 768, True),
    GemmShape(8, 4096, 14336, True),
    GemmShape(32, 2880, 2880, False),
    GemmShape(1, 64, 32, False, 4),
]
ROWS = st.integers(1, 1 << 20)


@st.composite
def cases(draw):
    shape = draw(st.sampled_from(SHAPES))
    return draw(ROWS), shape, draw(st.sampled_from(candidates(shape, H100)))


def seconds(rows, shape, schedule, device=H100):
    return predict(rows, shape, schedule=schedule, device=device)


def test_the_expression_names_every_argument_and_every_constant():
    constants = set(cost_model._CONSTANT.values())
    assert gemm_time().free_symbols == set(ARGUMENTS) | constants
    assert {symbol.name for symbol in constants} == set(CONSTANTS)


@functools.cache
def slow_evaluator():
    """The expression with its constants as further arguments, in arbitrary precision."""
    return sympy.lambdify((*ARGUMENTS, *cost_model._CONSTANT.values()), gemm_time(), modules="mpmath")


@given(cases())
def test_prediction_is_the_expression(case):
    rows, shape, schedule = case
    arguments = cost_model.arguments(rows, shape, schedule=schedule, device=H100)
    expected = slow_evaluator()(*arguments, *CONSTANTS.values())
    assert seconds(rows, shape, schedule) == pytest.approx(float(expected), rel=1e-9)


@given(cases())
def test_a_launch_takes_at_least_what_bytes_and_flop_take(case):
    rows, shape, schedule = case
    hit = shape.num_experts * -math.expm1(rows * math.log1p(-1 / shape.num_experts)) if shape.num_experts > 1 else 1
    halves = 2 if shape.gated else 1
    memory = hit * shape.width * halves * shape.depth * shape.element_size / H100.bandwidth
    matrix = 2 * rows * shape.width * halves * shape.depth / H100.matrix_rate
    assert seconds(rows, shape, schedule) >= CONSTANTS["launch"] + max(memory, matrix)


@given(cases(), st.sampled_from(["bandwidth", "matrix_rate"]))
def test_a_faster_device_is_not_slower(case, what):
    faster = dataclasses.replace(H100, **{what: 2 * getattr(H100, what)})
    assert seconds(*case, faster) <= seconds(*case) * (1 + 1e-9)


@given(cases())
def test_more_work_takes_longer(case):
    rows, shape, schedule = case
    time = seconds(rows, shape, schedule)
    assert seconds(rows, dataclasses.replace(shape, depth=2 * shape.depth), schedule) > time
    assert seconds(4 * rows, shape, schedule) >= time * (1 - 1e-9)


def test_where_time_goes():
    """Few rows: the weights of the experts that are hit. Many rows: the matrix units, near their rate."""
    shape, schedule = SHAPES[0], Schedule(16, 128, 128, 4, 4)
    streamed = 128 * 2 * 768 * 2048 * 2 / H100.bandwidth
    assert 1.0 < (seconds(1024, shape, schedule) - CONSTANTS["launch"]) / streamed < 1.6
    wide, rows = Schedule(128, 128, 64, 8, 4), 1 << 18
    ideal = 2 * rows * 2 * 768 * 2048 / H100.matrix_rate
    assert 1.5 < seconds(rows, shape, wide) / ideal < 3.0


def test_small_tiles_for_few_rows_and_large_tiles_for_many():
    shape, small, large = SHAPES[0], Schedule(16, 64, 128, 4, 4), Schedule(128, 128, 64, 8, 4)
    assert seconds(64, shape, small) < seconds(64, shape, large)
    assert seconds(1 << 17, shape, small) > seconds(1 << 17, shape, large)


def test_orders_that_read_weights_once_where_skewed_routing_would_read_them_again():
    """Mixtral's experts exceed L2. Sixteen rows each fit a tile; a popular expert has more. At one token none has."""
    up = SHAPES[1]
    assert exact_schedule(128, up, device=H100, tuned=False).loop.grouped
    assert exact_schedule(2, up, device=H100, tuned=False).loop == PLAIN
    small = SHAPES[0]  # its experts stay in L2 between two row tiles
    assert exact_schedule(512, small, device=H100, tuned=False).loop == PLAIN


def row_tiles(loads, schedule):
    """Row tiles of experts with such loads: what is beside whole ones counts as one half, or a quarter."""
    rest = CONSTANTS["specialized_rest"] if schedule.loop.specialized else 0.5
    return sum(max(1.0, load / schedule.block_m + rest) for load in loads)


def share(rows, experts, schedule):
    """What a Zipf law adds to the row tiles of uniform routing, as a share, by exact sums."""
    total = sum(1 / rank for rank in range(1, experts + 1))
    zipf = row_tiles([rows / total / rank for rank in range(1, experts + 1)], schedule)
    return zipf / row_tiles([rows / experts] * experts, schedule) - 1


@pytest.mark.parametrize(("experts", "rows"), [(8, 64), (64, 256), (64, 512)])
@pytest.mark.parametrize("specialized", [False, True])
def test_skewed_routing_counts_where_waves_are_few(experts, rows, specialized):
    shape = GemmShape(experts, 512, 256, False)  # two columns of tiles, or one: less than two waves
    schedule = Schedule.specialized(gated=False) if specialized else Schedule(16, 128, 128, 4, 4)
    rows *= 12 if specialized else 1  # of tiles of 192 rows
    more = share(rows, experts, schedule)
    assert more > 0.05
    counted = score(rows, shape, schedule=schedule, device=H100) - 3.5e-6 * specialized
    assert counted / seconds(rows, shape, schedule) - 1 == pytest.approx(0.2 * more, rel=0.05)


def test_skewed_routing_fades_as_waves_become_many():
    schedule = Schedule(64, 128, 128, 8, 4)  # one program an SM
    added = []
    for columns in (16, 32, 64, 128):
        shape = GemmShape(8, 512, 128 * columns, False)
        waves = 12 * columns / H100.num_sms  # 64 rows an expert, so one and a half row tiles
        found = score(512, shape, schedule=schedule, device=H100) / seconds(512, shape, schedule) - 1
        added.append((waves, found / (0.2 * share(512, 8, schedule))))
    for waves, found in added:
        assert found == pytest.approx(min(1, 2 / waves) ** 6, rel=0.05)
    assert added[0][1] > 0.9 and 0.05 < added[1][1] < 0.2


@given(cases(), st.sampled_from([H100, dataclasses.replace(H100, capability=(8, 0))]))
def test_a_late_begin_counts_for_many_rows_where_kernels_begin_early(case, device):
    rows, shape, schedule = case
    late = device is H100 and schedule.block_m >= 128 and shape.element_size == 2
    added = score(rows, shape, schedule=schedule, device=device) - seconds(*case, device)
    skew = 0.2 * max(0.0, share(rows, shape.num_experts, schedule) + 0.02) * seconds(*case, device)
    assert 3.5e-6 * late - 1e-12 <= added <= 3.5e-6 * late + skew + 1e-12


def test_programs_that_read_the_same_weights_stream_them_no_faster():
    """Few programs, whose loads under way bound the rate: a second row tile of an expert has its weights from L2."""
    shape, schedule = GemmShape(2, 8192, 128, False), Schedule(16, 128, 64, 4, 3)
    one, two = (seconds(rows, shape, schedule) for rows in (16, 80))
    assert one < two < 1.5 * one


def test_no_schedule_for_which_one_popular_expert_costs_another_wave():
    """Mixtral's down stage: 256 programs of 32 x 128, 288 once an expert has more than 32 of the 128 rows."""
    down, few = GemmShape(8, 14336, 4096, False), Schedule(32, 128, 128, 4, 4, Loop(grouped=True))
    for device in (H100, H200):
        chosen = exact_schedule(128, down, device=device, tuned=False)
        assert seconds(128, down, few, device) < seconds(128, down, chosen, device)
        assert chosen.block_m >= 64


def test_weights_that_are_read_again_cost_time():
    """16 rows an expert, half of which have more than that: tiles of 16 rows took a fifth longer than of 64 (H200)."""
    up, device = GemmShape(64, 7168, 2048, True), H200
    narrow, wide = Schedule(16, 128, 128, 4, 3), Schedule(64, 64, 128, 4, 4, Loop(tma=True, flatten=True))
    assert seconds(512, up, narrow, device) < seconds(512, up, wide, device)  # eight rows each
    assert seconds(1024, up, narrow, device) > seconds(1024, up, wide, device)


@given(cases())
def test_what_a_gemm_is_reported_to_cost(case):
    rows, shape, schedule = case
    told = cost(rows, shape, schedule=schedule, device=H100)
    if shape.element_size != 2:
        assert told is None
        return
    hit = shape.num_experts * -math.expm1(rows * math.log1p(-1 / shape.num_experts)) if shape.num_experts > 1 else 1
    columns = shape.width * (2 if shape.gated else 1)
    weights, activations = hit * columns * shape.depth * 2, rows * (shape.depth + shape.width) * 2
    assert told.bytes == pytest.approx(weights + activations, rel=1e-9)
    assert told.flop == 2 * rows * columns * shape.depth
    assert told.floor_us == pytest.approx(1e6 * max(told.bytes / H100.bandwidth, told.flop / H100.matrix_rate))
    assert told.predicted_us == pytest.approx(1e6 * seconds(*case))
    assert told.floor_us < told.predicted_us
    assert (told.device, told.rows) == ("H100", rows)


def test_nothing_is_reported_without_rows():
    assert cost(0, SHAPES[0], schedule=candidates(SHAPES[0], H100)[0], device=H100) is None


def test_one_token_by_vectors():
    """Both stages of four layers, microseconds on an H200, as README has them."""
    h200 = dataclasses.replace(H100, bandwidth=4.8e12)
    measured = {(8, 2048, 768): 21.0, (8, 2048, 512): 15.1, (2, 4096, 14336): 165, (8, 7168, 2048): 161}
    for (top_k, hidden, width), us in measured.items():
        up, down = GemmShape(64, hidden, width, True), GemmShape(64, width, hidden, False)
        costs = [cost_model.vector_cost(top_k, shape, device=h200) for shape in (up, down)]
        assert sum(found.predicted_us for found in costs) == pytest.approx(us, rel=0.03)
        weights = 2 * top_k * 3 * hidden * width
        assert sum(found.bytes for found in costs) == pytest.approx(weights, rel=0.01)
        assert sum(found.flop for found in costs) == weights
        assert all(found.floor_us == pytest.approx(found.bytes / 4.8e6) for found in costs)
    assert cost_model.vector_cost(8, GemmShape(8, 64, 32, True, 4), device=h200) is None
