"""The table says what the tests said: nothing that failed, was skipped or was not run counts as shown."""

import re
from pathlib import Path

import pytest

from tests.reliability.__main__ import DOCUMENT, lines, replaced, table
from tests.reliability.results import Case, Results, read
from tests.reliability.rows import CPU, GPU, Row, every, least, most, passed

ROOT = Path(__file__).resolve().parents[2]
NODE = "tests/test_a.py::test_b"


def results(*cases):
    return Results(tuple(Case(f"{NODE}[{index}]", *case) for index, case in enumerate(cases)))


def measured(row, *cases):
    return row.measured(results(*cases))


ROW = Row("a figure", "2 at most", (NODE,), most("number", "{:.0f} of {count}", bound=2))


def test_the_number_is_the_tests_own():
    assert measured(ROW, ("passed", (("number", "1"),)), ("passed", (("number", "2"),))) == ("2 of 2", True)
    assert measured(ROW, ("passed", (("number", "3"),))) == ("3 of 1", False)
    assert measured(ROW, ("passed", (("another", "1"),))) == ("nothing recorded as number", False)


@pytest.mark.parametrize(
    ("cases", "told"),
    [
        ([("failed", (("number", "1"),)), ("passed", (("number", "1"),))], "1 failed: tests/test_a.py::test_b[0]"),
        ([("skipped", (("number", "1"),))], f"not run: {NODE}"),
        ([], f"not run: {NODE}"),
    ],
)
def test_what_is_not_shown_does_not_hold(cases, told):
    assert measured(ROW, *cases) == (told, False)


def test_every_test_of_a_row_is_needed():
    row = Row("a", "b", (NODE, "tests/test_c.py"), passed)
    assert measured(row, ("passed",)) == ("not run: tests/test_c.py", False)
    found = Results(
        (Case(f"{NODE}[x]", "passed"), Case("tests/test_c.py::test_d", "passed"), Case("tests/e.py::f", "failed"))
    )
    assert row.measured(found) == ("2 tests pass", True)


def test_sums_and_several_numbers():
    cases = ("passed", (("n", "2"), ("m", "1"))), ("passed", (("n", "3"),))
    row = Row("a", "b", (NODE,), every(least("n", "{:.0f}", bound=5, total=True), least("m", "{:.0f}", bound=2)))
    assert measured(row, *cases) == ("5; 1", False)


def test_a_name_that_begins_alike_is_another_test():
    assert not Case(f"{NODE}_more", "passed").belongs_to(NODE)
    assert Case(f"{NODE}[x]", "passed").belongs_to("tests/test_a.py")


def test_reports_are_read(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_b[0]"><properties>'
        '<property name="n" value="1"/></properties></testcase>'
        '<testcase classname="tests.test_a" name="test_c"><skipped/></testcase>'
        '<testcase classname="tests.test_a" name="test_d"><skipped/><error/></testcase></testsuite></testsuites>'
    )
    assert read(report).cases == (
        Case(f"{NODE}[0]", "passed", (("n", "1"),)),
        Case("tests/test_a.py::test_c", "skipped"),
        Case("tests/test_a.py::test_d", "failed"),
    )


@pytest.mark.parametrize("row", CPU + GPU, ids=lambda row: f"{'gpu' if row.gpu else 'cpu'}: {row.figure[:40]}")
def test_the_tests_of_a_row_are_there(row):
    for test in row.tests:
        file, _, function = test.partition("::")
        source = (ROOT / file).read_text()
        assert not function or re.search(rf"^def {function.partition('[')[0]}\(", source, re.MULTILINE), test
    assert row.measured(Results(()))[1] is False


def test_what_does_not_hold_is_marked():
    text = table(lines([ROW], results(("passed", (("number", "3"),)))), head="today")
    assert text.startswith("today\n") and text.endswith("| a figure | 2 at most | **no**: 3 of 1 | `test_a.py` |")


def test_a_part_of_the_document_is_replaced():
    document = "a\n<!-- cpu -->\nold\n<!-- end of cpu -->\nb\n<!-- gpu -->\nkept\n<!-- end of gpu -->\n"
    assert replaced(document, "cpu", "new") == document.replace("old", "new")
    with pytest.raises(ValueError, match="no place for cpu"):
        replaced("nothing", "cpu", "new")
    for part in ("cpu", "gpu"):
        assert replaced(DOCUMENT.read_text(), part, "x").count("<!--") == 4
