"""Tables and checks as text."""

import pytest

from diffulex.cli.table import Check, format_bytes, format_table


def test_columns_are_as_wide_as_their_widest_cell():
    lines = format_table(("tokens", "ms"), [("1", "12.50"), ("512", "-")]).splitlines()
    assert lines == ["tokens     ms", "------  -----", "1       12.50", "512         -"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        format_table(("a", "b"), [("1", "2", "3")])


@pytest.mark.parametrize(("size", "shown"), [(0, "0 B"), (999, "999 B"), (2_300_000, "2.3 MB"), (5e12, "5000.0 GB")])
def test_sizes(size, shown):
    assert format_bytes(size) == shown


def test_a_check_says_what_broke_it():
    assert str(Check("weights equal")).startswith("ok")
    assert str(Check("weights equal", "2 differ")) == "FAILED  weights equal: 2 differ"
