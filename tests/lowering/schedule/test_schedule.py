"""A schedule's own arithmetic, against sums written out by hand."""

import dataclasses

import pytest

from lowering.schedule.schedule import GemmShape, RowRange, Schedule

S = Schedule(64, 128, 32, 8, 3)


@pytest.mark.parametrize(
    ("gated", "element_size", "wanted"),
    [(False, 2, (64 * 32 + 128 * 32) * 2 * 3), (True, 2, (64 * 32 + 2 * 128 * 32) * 2 * 3), (True, 4, 122_880)],
)
def test_shared_memory_holds_one_tile_of_rows_and_one_or_two_of_weights_per_stage(gated, element_size, wanted):
    assert S.shared_memory(gated=gated, element_size=element_size) == wanted


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
