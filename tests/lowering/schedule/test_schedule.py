"""A schedule's own arithmetic, against sums written out by hand."""

import dataclasses

import pytest

from lowering.errors import ReasonCode
from lowering.schedule.schedule import GemmShape, Loop, RowRange, Schedule, tma_refusal

S = Schedule(64, 128, 32, 8, 3)


@pytest.mark.parametrize(
    ("gated", "element_size", "wanted"),
    [(False, 2, (64 * 32 + 128 * 32) * 2 * 3), (True, 2, (64 * 32 + 2 * 128 * 32) * 2 * 3), (True, 4, 122_880)],
)
def test_shared_memory_holds_one_tile_of_rows_and_one_or_two_of_weights_per_stage(gated, element_size, wanted):
    assert S.shared_memory(gated=gated, element_size=element_size) == wanted


def test_a_flattened_loop_stores_a_tile_beside_the_next_ones_operands():
    flat = dataclasses.replace(S, loop=Loop(tma=True, flatten=True, subtiles=2))
    more = flat.shared_memory(gated=False, element_size=2) - S.shared_memory(gated=False, element_size=2)
    assert more == 64 * 128 // 2 * 2


def test_accumulators_are_spread_over_the_threads():
    assert S.accumulators_per_thread(gated=False) == 64 * 128 // 256
    assert S.accumulators_per_thread(gated=True) == 2 * 64 * 128 // 256


def test_texts():
    assert str(S) == "64x128x32 w8 s3"
    assert str(RowRange(90, (S, S))) == "up to 90 rows: 64x128x32 w8 s3 and 64x128x32 w8 s3"
    assert str(RowRange(None, (S,))) == "more rows: 64x128x32 w8 s3"


@pytest.mark.parametrize("value", [S, GemmShape(8, 64, 32, True), RowRange(8, (S,))], ids=lambda v: type(v).__name__)
def test_values_are_keys(value):
    """Plans are cached by them."""
    field = dataclasses.fields(value)[0].name
    assert hash(value) == hash(dataclasses.replace(value))
    assert value != dataclasses.replace(value, **{field: 7})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, 1)


def test_a_loop_shows_in_the_text_and_can_do_without_descriptors():
    schedule = dataclasses.replace(S, loop=Loop(tma=True, flatten=True, subtiles=2))
    assert str(schedule) == "64x128x32 w8 s3 tma flatten /2 g8"
    assert str(schedule.without_tma()) == "64x128x32 w8 s3 grouped g8"
    assert str(dataclasses.replace(S, loop=Loop(grouped=True), group_m=4)) == "64x128x32 w8 s3 grouped g4"


@pytest.mark.parametrize(
    ("strides", "code"),
    [
        ((512, 16, 1), None),
        ((512, 8, 1), None),
        ((1, 512, 16), ReasonCode.LAYOUT),
        ((512, 0, 1), ReasonCode.LAYOUT),
        ((512, 12, 1), ReasonCode.ALIGNMENT),
        ((100, 16, 1), ReasonCode.ALIGNMENT),
        ((512, None, 1), ReasonCode.ALIGNMENT),
        ((512, 16, None), ReasonCode.LAYOUT),
    ],
)
def test_what_descriptors_take(strides, code):
    reason = tma_refusal("W", (4, 32, 16), strides=strides, element_size=2)
    assert (reason and reason.code) == code
    assert reason is None or "of W" in reason.detail


def test_a_single_row_needs_no_stride():
    assert tma_refusal("W", (4, 1, 16), strides=(16, 0, 1), element_size=2) is None
    assert tma_refusal("W", (4, None, 16), strides=(16, 0, 1), element_size=2).code is ReasonCode.LAYOUT
