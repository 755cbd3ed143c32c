"""The list of faults does not rot, and the script tells a fault that is seen from one that is not."""

import collections

import pytest

from tests.mutants.faults import FAULTS, Fault
from tests.mutants.run import ROOT, Copy, Verdict, control, first_failure, problems


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_applies(fault):
    assert problems(fault) == []


def test_there_are_enough_of_every_kind():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 36
    folders = collections.Counter(fault.file.rpartition("/")[0] for fault in FAULTS)
    wanted = {"lowering/templates", "lowering/ops", "lowering/graph", "lowering/inductor", "lowering/schedule"}
    assert wanted | {"diffulex/distributed", "diffulex/moe/dispatcher"} <= folders.keys()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"old": "no such text"}, "stands 0 times"),
        ({"old": "import"}, "times in"),
        ({"file": "lowering/none.py"}, "is not there"),
        ({"tests": ("tests/none.py",)}, "is not there"),
        ({"new": "import argparse"}, "changes nothing"),
    ],
)
def test_what_does_not_apply_is_told(change, problem):
    sound = {
        "old": "import argparse",
        "new": "",
        "file": "tests/mutants/__main__.py",
        "tests": ("tests/test_house.py",),
    }
    assert problems(Fault("x", **sound)) == []
    assert any(problem in found for found in problems(Fault("x", **(sound | change))))


SEEN = """
from lowering.state import switches
def test_switches():
    assert len(switches()) > 0
"""


def test_a_fault_is_made_in_a_copy_and_taken_back(tmp_path):
    file, old = "lowering/state.py", "def switches() -> tuple[bool, ...]:\n"
    text, copy, tests = (ROOT / file).read_text(), Copy(tmp_path), ("tests/test_seen.py",)
    assert text.count(old) == 1
    (tmp_path / tests[0]).write_text(SEEN)
    fault = Fault("x", file, old, f"{old}    return ()\n", tests)
    assert copy.judge(fault, tests) == "tests/test_seen.py::test_switches"
    assert control([Verdict(fault, "tests/test_seen.py::test_switches", 1.0), Verdict(fault, "", 1.0)], copy) == ""
    assert copy.judge(None, tests, limit=0.01) == "no end after 0 s"
    assert (tmp_path / file).read_text() == (ROOT / file).read_text() == text


def test_what_fails_first_is_named(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<t><testcase classname="a.b" name="c"/><testcase classname="a.b" name="d"><error/></testcase></t>'
    )
    assert first_failure(report) == "a/b.py::d"
