"""The table says what the tests said: nothing that failed, was skipped or was not run counts as shown."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from tests.reliability import running
from tests.reliability.__main__ import DOCUMENT, lines, long_first, processes, replaced, table
from tests.reliability.recording import Shared
from tests.reliability.results import Case, Results, read
from tests.reliability.rows import CPU, GPU, LARGE, LONG, Row, every, least, most, passed
from tests.reliability.running import Options, once, shared

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


def test_a_report_of_several_processes(tmp_path):
    """The second one has died while it wrote."""
    lines = [
        [("a.py::b", "left"), ("a.py::c", "left"), ("a.py::b", "begun"), ("a.py::b", "passed", [["n", "1"]])],
        [("a.py::b", "left"), ("a.py::c", "left"), ("a.py::c", "begun")],
    ]
    files = [tmp_path / "0", tmp_path / "1"]
    for file, told in zip(files, lines, strict=True):
        dicts = [dict(zip(("node", "ended", "recorded"), (*line, []), strict=False)) for line in told]
        file.write_text("".join(f"{json.dumps(line)}\n" for line in dicts))
    files[1].write_text(files[1].read_text() + '{"node": "a.py::c", "end')
    found = read(files)
    assert found.cases == (Case("a.py::b", "passed", (("n", "1"),)), Case("a.py::c", "begun"))
    assert found.problem(["a.py"]) == "1 begun and not ended: a.py::c"
    assert read(files[:1]).problem(["a.py"]) == "1 not begun: a.py::c"


def test_each_test_once():
    assert once(["a.py::b", "c.py", "a.py::b", "c.py::d", "a.py::e"]) == ["a.py::b", "c.py", "a.py::e"]


def test_what_takes_long_begins_first():
    assert long_first(["a.py::b", f"{LONG[1]}::c", "d.py", f"{LONG[0]}::e"]) == [
        f"{LONG[0]}::e",
        f"{LONG[1]}::c",
        "a.py::b",
        "d.py",
    ]


TESTS = """
import os, signal, time
import pytest

@pytest.mark.parametrize("number", range(6))
def test_shared(number, record_property):
    record_property("number", number)
    time.sleep(0.3)

@pytest.fixture
def broken():
    yield
    raise ValueError

def test_teardown(broken): pass
def test_skipped(): pytest.skip("not here")
"""
WHOLE = "import os\ndef test_one(record_property): record_property('process', os.getpid())\n"
WHOLE += WHOLE.replace("test_one", "test_two")
DIES = "import os, signal\ndef test_dies(): os.kill(os.getpid(), signal.SIGKILL)\n"
HANGS = "import time\ndef test_hangs(): time.sleep(60)\n"


def run_of(folder, *, workers=2, seconds=math.inf, **texts):
    """What processes say of test files with these texts, whose log is always the same folder."""
    log = folder / "log"
    log.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"test_{name}.py").write_text(text)
    files = [str(folder / f"test_{name}.py") for name in texts]
    return shared(files, "not gpu", Options(workers, log, seconds, [file for file in files if "whole" in file]))


def names(found, ended):
    return sorted(node.partition("::")[2] for node in found.results.that(ended))


def begun(log):
    """The tests that the processes have begun."""
    told = [json.loads(line) for file in log.glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted(line["node"].partition("::")[2] for line in told if line["ended"] == "begun")


def test_processes_share_tests_and_die(tmp_path):
    """What is lost is one test, and who lost it is named."""
    found = run_of(tmp_path, dies=DIES, shared=TESTS, whole=WHOLE)
    log = tmp_path / "log"
    assert names(found, "passed") == ["test_one", *(f"test_shared[{n}]" for n in range(6)), "test_two"]
    assert (names(found, "failed"), names(found, "skipped")) == (["test_teardown"], ["test_skipped"])
    assert names(found, "begun") == ["test_dies"]
    (told,) = found.ended
    assert re.fullmatch("process-[01] ended with signal 9", told) and told in table([processes(found)], head="")
    assert not processes(found)[3] and processes(dataclasses.replace(found, ended=()))[3]
    assert sorted(found.results.numbers("number")) == list(range(6))
    assert len(set(found.results.numbers("process"))) == 1
    assert "1 error" in "".join(file.read_text() for file in log.glob("*.log"))
    assert begun(log) == sorted(case.node.partition("::")[2] for case in found.results.cases)  # each once


def test_a_run_begins_anew(tmp_path):
    """What passed in an earlier run is run again, and what that one said or printed is in no later table."""
    run_of(
        tmp_path, fails="def test_fails(): assert False", passes="def test_passes(): pass", gone="def test_gone(): pass"
    )
    (tmp_path / "log" / "notes").touch()
    again = run_of(tmp_path, workers=1, fails="def test_fails(): pass", passes="def test_passes(): assert False")
    assert (names(again, "passed"), names(again, "failed")) == (["test_fails"], ["test_passes"])
    assert len(again.results.cases) == 2 and begun(tmp_path / "log") == ["test_fails", "test_passes"]
    assert {file.name for file in (tmp_path / "log").iterdir()} == {"notes", "process-0.jsonl", "process-0.log"}


def test_a_file_as_a_whole_is_taken_by_one_process(tmp_path):
    one, other = (Shared(tmp_path, {"a.py"}, math.inf) for _ in range(2))
    assert one.takes("a.py::b") and not other.takes("a.py::c") and one.takes("a.py::c")
    assert other.takes("d.py::e") and not one.takes("d.py::e") and one.takes("d.py::f")


def test_processes_end_after_their_time(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "LAST", 0)
    found = run_of(tmp_path, workers=1, seconds=6.0, hangs=HANGS, late="def test_late(): pass")
    assert (names(found, "begun"), names(found, "left")) == (["test_hangs"], ["test_late"])
    assert found.ended == ("process-0 was ended after its time",)
    assert found.results.problem([case.node for case in found.results.cases]).startswith("1 begun and not ended")


def test_no_test_begins_in_the_last_minute(tmp_path):
    found = run_of(tmp_path, workers=1, seconds=30.0, late="def test_late(): pass")
    assert (names(found, "left"), found.ended) == (["test_late"], ())


@pytest.mark.parametrize("row", CPU + GPU, ids=lambda row: f"{'gpu' if row.gpu else 'cpu'}: {row.figure[:40]}")
def test_the_tests_of_a_row_are_there(row):
    for test in row.tests:
        file, _, function = test.partition("::")
        source = (ROOT / file).read_text()
        assert not function or re.search(rf"^def {function.partition('[')[0]}\(", source, re.MULTILINE), test
    assert row.measured(Results(()))[1] is False


def test_the_tests_that_are_named_apart_are_tests_of_rows():
    assert {*LONG, *LARGE} <= {test.partition("::")[0] for row in GPU for test in row.tests}


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
