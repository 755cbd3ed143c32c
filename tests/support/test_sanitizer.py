"""The helper that runs tests under compute-sanitizer, with a script in its place: what it finds and what it skips."""

import contextlib
import os
import sys
import time

import pytest

from tests.support import sanitizer
from tests.support.sanitizer import Found, command, find_sanitizer, run_under, under_sanitizer
from tests.support.sanitizer_plugin import INSIDE

CLEAN = {
    "memcheck": "========= ERROR SUMMARY: 0 errors",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
}
BAD_WRITE = """\
tests/a.py::test_a[one] PASSED ========= Invalid __global__ write of size 4 bytes
=========     at _moe_x_kernel+0x70 in moe_x.py:6
========= ERROR SUMMARY: 1 error
"""
RACE = """\
========= Error: Race reported between Write access at _moe_x_kernel+0x70
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the documentation\n"
PASSED, FAILED, SKIPPED = {"test_a": "passed"}, {"test_a": "passed", "test_b": "failed"}, {"test_a": "skipped"}
# tool, output, status of the child, cases, and the problem
RUNS = {
    "clean": ("memcheck", CLEAN["memcheck"], 0, PASSED, ""),
    "clean_of_races": ("racecheck", CLEAN["racecheck"], 0, PASSED, ""),
    "bad_write": ("memcheck", BAD_WRITE, 77, FAILED, "1 reported; cases that failed: test_b"),
    "error_exit_alone": ("memcheck", BAD_WRITE, 0, PASSED, "1 reported; cases that failed: none"),
    "race": ("racecheck", RACE, 77, PASSED, "1 reported; cases that failed: none"),
    "summary_of_another_tool": ("racecheck", CLEAN["memcheck"], 0, PASSED, "no summary of racecheck"),
    "refused": ("memcheck", REFUSED, 1, {}, "refuses the device"),
    "no_summary": ("memcheck", "bash: no such file", 127, {}, "status 127 and no summary"),
    "two_summaries": ("memcheck", BAD_WRITE + CLEAN["memcheck"], 77, PASSED, "1 reported"),
    "failed": ("memcheck", CLEAN["memcheck"], 1, FAILED, "nothing reported, but cases failed: test_b"),
    "all_skipped": ("memcheck", CLEAN["memcheck"], 0, SKIPPED, "no case passed"),
    "nothing_ran": ("memcheck", CLEAN["memcheck"], 4, {}, "no case passed"),
    "died_at_the_end": ("memcheck", CLEAN["memcheck"], 139, PASSED, "the child ended with status 139"),
    "too_long": ("memcheck", "", None, {}, "took too long"),
}


@pytest.mark.parametrize(("tool", "output", "status", "cases", "problem"), RUNS.values(), ids=RUNS)
def test_what_is_clean(tool, output, status, cases, problem):
    found = Found(tool, output, status, cases)
    assert problem in found.problem and bool(problem) == bool(found.problem)
    with pytest.raises(pytest.fail.Exception) if problem else contextlib.nullcontext() as failure:
        found.assert_clean()
    if problem:
        assert problem in str(failure.value) and found.report in str(failure.value)


def test_the_report_begins_where_the_tool_began_to_write():
    assert Found("memcheck", BAD_WRITE, 77, {}).report.splitlines()[0].startswith("========= Invalid __global__ write")


def test_a_planted_error_has_to_be_reported():
    Found("memcheck", BAD_WRITE, 77, {}).assert_reported("Invalid __global__ write", "_moe_x_kernel")
    none = BAD_WRITE.replace("1 error", "0 errors")
    for output in (CLEAN["memcheck"], "Invalid __global__ write", BAD_WRITE.replace("write", "read"), none):
        with pytest.raises(pytest.fail.Exception):
            Found("memcheck", output, 77, {}).assert_reported("Invalid __global__ write")


def script(folder, name, text="exit 0"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_where_it_is_looked_for(tmp_path):
    nothing, cuda = str(tmp_path / "nothing"), tmp_path / "cuda"
    assert find_sanitizer(nothing, cuda=cuda) is None
    inside = script(cuda / "bin", "compute-sanitizer")
    assert find_sanitizer(nothing, cuda=cuda) == inside
    script(tmp_path / "toolkit", "nvcc")
    beside = script(tmp_path / "toolkit", "compute-sanitizer")
    links = tmp_path / "links"
    links.mkdir()
    (links / "nvcc").symlink_to(tmp_path / "toolkit" / "nvcc")
    assert find_sanitizer(str(links), cuda=cuda) == beside
    first = script(tmp_path / "first", "compute-sanitizer")
    assert find_sanitizer(os.pathsep.join([str(tmp_path / "first"), str(links)]), cuda=cuda) == first


def test_the_command_line(tmp_path):
    line = command("/x/compute-sanitizer", "memcheck", node="tests/a.py::test_a", results=tmp_path / "found.xml")
    assert line[:3] == ["/x/compute-sanitizer", "--tool", "memcheck"] and line[-1] == "tests/a.py::test_a"
    assert line.index("--error-exitcode") < line.index(sys.executable) < line.index(INSIDE)


# The child: pytest itself, started by a script that says what the tool would


INNER = """
import os
import pytest

def test_passes(inside_sanitizer):
    assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"

def test_fails():
    assert False

def test_is_skipped():
    pytest.skip("not here")
"""
PASSES_ON = """\
echo "========= COMPUTE-SANITIZER"
while [[ $1 != */python* ]]; do shift; done
"$@"
status=$?
echo "========= ERROR SUMMARY: 0 errors"
exit $status"""


def test_cases_of_a_child(tmp_path):
    inner = tmp_path / "test_of_a_child.py"
    inner.write_text(INNER)
    found = run_under(script(tmp_path, "fake", PASSES_ON), "memcheck", node=str(inner), folder=tmp_path)
    ended = {"test_passes": "passed", "test_fails": "failed", "test_is_skipped": "skipped"}
    assert (found.cases, found.errors, found.status) == (ended, 0, 1), found.output
    assert "cases failed: test_fails" in found.problem


def test_a_child_that_takes_too_long_is_ended_with_its_own(tmp_path):
    mark = tmp_path / "mark"
    slow = script(tmp_path, "fake", f"(sleep 2; touch {mark}) & echo started; wait")
    found = run_under(slow, "memcheck", node="none", folder=tmp_path, seconds=0.5)
    assert (found.status, found.output, found.cases) == (None, "started\n", {}) and "too long" in found.problem
    time.sleep(2.0)
    assert not mark.exists()


def outer(check=lambda found: found.assert_clean()):
    return under_sanitizer("memcheck", runs="test_a")(check)


def ask(request, tmp_path, monkeypatch, output):
    """The outer test, with a tool that says `output` and runs nothing."""
    fake = None if output is None else script(tmp_path, "fake", f"echo '{output}'")
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: fake)
    outer()("memcheck", request, tmp_path)


@pytest.mark.parametrize(
    ("output", "reason"), [(None, "not on the PATH"), (REFUSED, "refuses this device: .*Device not supported")]
)
def test_skipped_with_a_reason(output, reason, request, tmp_path, monkeypatch):
    with pytest.raises(pytest.skip.Exception, match=reason):
        ask(request, tmp_path, monkeypatch, output)


@pytest.mark.parametrize(
    ("output", "reason"), [("", "no summary"), (CLEAN["memcheck"], "no case passed"), (BAD_WRITE, "Invalid __global__")]
)
def test_fails_with_the_report(output, reason, request, tmp_path, monkeypatch):
    with pytest.raises(pytest.fail.Exception, match=reason):
        ask(request, tmp_path, monkeypatch, output)


def test_not_inside_another_one(request, tmp_path, monkeypatch):
    monkeypatch.setattr(request.config.option, "inside_sanitizer", True)
    with pytest.raises(pytest.fail.Exception, match="inside another one"):
        ask(request, tmp_path, monkeypatch, CLEAN["memcheck"])
