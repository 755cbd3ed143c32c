"""What a run of pytest says of tests, read from what `tests.reliability.recording` wrote."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Case:
    """One test: `node` as pytest names it, how it ended ("passed", "failed", "skipped"; "begun" where it did not end,
    "left" where nobody came to it), and what it recorded.
    """

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

    def that(self, ended: str) -> list[str]:
        """The tests that ended so."""
        return [case.node for case in self.cases if case.ended == ended]

    def count(self, ended: str) -> int:
        """How many ended so."""
        return len(self.that(ended))

    def numbers(self, name: str) -> list[float]:
        """What the tests recorded under a name."""
        return [float(value) for case in self.cases for key, value in case.recorded if key == name]

    def problem(self, tests: Sequence[str]) -> str:
        """Why not all of these tests are shown to hold; empty where they are."""
        own = self.of(tests)
        for ended, text in (("failed", "failed"), ("begun", "begun and not ended"), ("left", "not begun")):
            if own.count(ended):
                return f"{own.count(ended)} {text}: {own.that(ended)[0]}"
        silent = [test for test in tests if not self.of([test]).count("passed")]
        return f"not run: {silent[0]}" if silent else ""


def read(files: Iterable[Path]) -> Results:
    """The results in several files; of a test that is in more than one of them, or twice in one, the last: that it was
    collected says nothing where another process has run it.
    """
    found = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").split("\n")[:-1]:  # without what a process died in
            told = json.loads(line)
            if told["ended"] == "left" and told["node"] in found:
                continue
            recorded = tuple((key, value) for key, value in told["recorded"])
            found[told["node"]] = Case(told["node"], told["ended"], recorded)
    return Results(tuple(found.values()))
