"""The promised properties are tests of hypothesis, and their examples are counted, by xdist's workers as well."""

import ast
import collections
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.examples_plugin import EXAMPLES, by_property, count_of, examples_of
from tests.support.inputs import FORMS
from tests.support.promises import EDGES, PROPERTIES

ROOT = Path(__file__).resolve().parents[2]


def test_there_are_twelve_and_more():
    assert len(PROPERTIES) >= 12


@pytest.mark.parametrize("name", PROPERTIES)
def test_each_is_drawn_by_hypothesis(name):
    for test in PROPERTIES[name]:
        file, function = test.split("::")
        (node,) = [n for n in ast.parse((ROOT / file).read_text()).body if getattr(n, "name", "") == function]
        assert any("given(" in ast.unparse(decorator) for decorator in node.decorator_list), test


def test_passing_examples_of_all_phases_are_counted():
    text = "- during reuse phase:\n - 3 passing, 0 failing\n- during generate phase:\n - 47 passing test cases"
    assert count_of(text) == 50 and count_of("Stopped because nothing left to do") == 0


def test_parameters_count_for_their_test():
    def report(nodeid, *properties):
        return SimpleNamespace(nodeid=nodeid, user_properties=list(properties))

    reports = [report("a.py::t[x]", (EXAMPLES, 3)), report("a.py::t[y]", (EXAMPLES, 4)), report("a.py::u", ("k", 1))]
    assert examples_of(reports) == {"a.py::t": 7}


def test_what_is_no_promise_is_told_apart():
    first = PROPERTIES["a batch may be split"][0]
    rows = by_property(collections.Counter({first: 5, "a.py::t": 2}))
    assert rows == [("a batch may be split", 1, 5), ("others", 1, 2)]


def test_the_summary(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "from hypothesis import given, strategies as st\n"
        "@given(st.integers())\ndef test_one(number):\n    assert number == number\n"
        "def test_two():\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.support.examples_plugin"]
    command += ["--junitxml=report.xml", "-c", "/dev/null", "--rootdir=.", "-n", "1", "test_x.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # where the plugin is
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "examples of properties" in done.stdout and "100 in 1 tests" in done.stdout, done.stdout + done.stderr
    assert f'name="{EXAMPLES}" value="100"' in (tmp_path / "report.xml").read_text()


@pytest.mark.parametrize("name", EDGES)
def test_each_edge_has_its_test(name):
    """A function that is there, with a parameter that one of its tables has."""
    for test in EDGES[name]:
        file, function = test.split("::")
        function, _, parameter = function.partition("[")
        source = (ROOT / file).read_text()
        assert function in {getattr(node, "name", "") for node in ast.parse(source).body}, test
        assert not parameter or parameter.removesuffix("-cpu]") in FORMS, test
