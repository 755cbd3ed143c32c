"""What a run of pytest says of tests, read from its JUnit report."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Case:
    """One test: `node` as pytest names it, how it ended ("passed", "failed", "skipped"), and what it recorded."""

    node: str
    ended: str
    recorded: tuple[tuple[str, str], ...] = ()

    def belongs_to(self, test: str) -> bool:
        """Whether it is of a file, of a function of it, or of one parameter of that."""
        return self.node == test or self.node.startswith((f"{test}::", f"{test}["))


@dataclasses.dataclass(frozen=True)
class Results:
    """All tests of a run."""

    cases: tuple[Case, ...]

    def of(self, tests: Iterable[str]) -> Results:
        """Those of these tests."""
        wanted = tuple(tests)
        return Results(tuple(case for case in self.cases if any(case.belongs_to(test) for test in wanted)))

    def count(self, ended: str) -> int:
        """How many ended so."""
        return sum(case.ended == ended for case in self.cases)

    def numbers(self, name: str) -> list[float]:
        """What the tests recorded under a name."""
        return [float(value) for case in self.cases for key, value in case.recorded if key == name]

    def problem(self, tests: Sequence[str]) -> str:
        """Why not all of these tests are shown to hold; empty where they are."""
        failed = [case.node for case in self.of(tests).cases if case.ended == "failed"]
        if failed:
            return f"{len(failed)} failed: {failed[0]}"
        silent = [test for test in tests if not self.of([test]).count("passed")]
        return f"not run: {silent[0]}" if silent else ""


def read(report: Path) -> Results:
    """The results in a JUnit report."""
    ends = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    found = []
    for case in ET.parse(report).iter("testcase"):
        ended = min((ends[part.tag] for part in case if part.tag in ends), default="passed")
        recorded = tuple((p.get("name", ""), p.get("value", "")) for p in case.iter("property"))
        file = case.get("classname", "").replace(".", "/")
        found.append(Case(f"{file}.py::{case.get('name')}", ended, recorded))
    return Results(tuple(found))
