"""Pytest plugin: how many examples hypothesis has run of each property, told at the end.

Each test's number travels with its report, so it comes from xdist's workers too, and stands in a JUnit report.
"""

import collections
import re

import pytest

from tests.support.promises import PROPERTIES

EXAMPLES = "hypothesis_examples"


def count_of(statistics):
    """Examples that passed, over all phases of what hypothesis tells of a test."""
    return sum(map(int, re.findall(r"(\d+) passing", statistics)))


def by_property(examples):
    """(property, tests, examples) of those that have run; tests of no property under a name of their own."""
    rows = []
    named = {test for tests in PROPERTIES.values() for test in tests}
    groups = {**PROPERTIES, "others": tuple(test for test in examples if test not in named)}
    for name, tests in groups.items():
        ran = [test for test in tests if test in examples]
        if ran:
            rows.append((name, len(ran), sum(examples[test] for test in ran)))
    return rows


def examples_of(reports):
    """Examples by test, those of its parameters together."""
    found = collections.Counter()
    for report in reports:
        for name, value in report.user_properties:
            if name == EXAMPLES:
                found[report.nodeid.partition("[")[0]] += value
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    statistics = getattr(item, "hypothesis_statistics", None)
    if call.when == "call" and statistics is not None:
        item.user_properties.append((EXAMPLES, count_of(statistics)))  # of this report and of the last one, for JUnit
    return (yield)


def pytest_terminal_summary(terminalreporter):
    stats = terminalreporter.stats
    examples = examples_of(r for kind in ("passed", "failed") for r in stats.get(kind, ()) if r.when == "call")
    if not examples:
        return
    terminalreporter.section("examples of properties")
    for name, tests, count in by_property(examples):
        terminalreporter.write_line(f"{count:8,} {name} ({tests} test{'s' if tests > 1 else ''})")
    terminalreporter.write_line(f"{sum(examples.values()):8,} in {len(examples)} tests")
