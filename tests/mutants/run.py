"""Each fault in a copy of the checkout, one after the other, and what its tests say."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.house.source import read_checkout

from .faults import Fault

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 150  # seconds for the tests of one fault; a run that does not end has seen it, too
_PASSED, _FAILED = 0, 1  # of pytest; anything else means that the tests did not run


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the tests of a fault said: `killed_by` is the first that failed, by its name, empty where all passed."""

    fault: Fault
    killed_by: str
    seconds: float

    @property
    def killed(self) -> bool:
        return bool(self.killed_by)


def problems(fault: Fault, root: Path = ROOT) -> list[str]:
    """Why a fault does not apply to a checkout."""
    path = root / fault.file
    if not path.is_file():
        return [f"{fault.name}: {fault.file} is not there"]
    count = path.read_text().count(fault.old)
    found = [] if count == 1 else [f"{fault.name}: the text stands {count} times in {fault.file}"]
    found += [f"{fault.name}: {test} is not there" for test in fault.tests if not (root / test).is_file()]
    return found + ([f"{fault.name}: changes nothing"] if fault.old == fault.new else [])


class Copy:
    """A copy of the checkout, in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for source in read_checkout(ROOT):
            target = folder / source.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / source.path, target)

    def judge(self, fault: Fault | None, tests: Iterable[str], *, only: str = "", limit: float = LIMIT) -> str:
        """The first test that fails with the fault in place; empty where none does. Without a fault: as it stands."""
        target = None if fault is None else self.folder / fault.file
        text = "" if target is None else target.read_text()
        if fault is not None and target is not None:
            target.write_text(text.replace(fault.old, fault.new))
        try:
            return self._failing(tests, only, limit)
        finally:
            if target is not None:
                target.write_text(text)

    def _failing(self, tests: Iterable[str], only: str, limit: float) -> str:
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not gpu", "-p", "no:cacheprovider", "--tb=line"]
        command += ["--hypothesis-profile=faults", f"--junitxml={report}", *(["-k", only] if only else []), *tests]
        # bytecode is told apart by seconds and sizes: a changed file may have those of the one before
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, start_new_session=True, **pipes
        ) as run:
            try:
                told, _ = run.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)  # ranks and interpreters, too
                return f"no end after {limit:.0f} s"
        if run.returncode not in (_PASSED, _FAILED):
            raise RuntimeError(f"pytest ended with {run.returncode}:\n{told[-5000:]}")
        return first_failure(report)


def first_failure(report: Path) -> str:
    """The first failed or broken test in a JUnit report, as pytest names it."""
    for case in ET.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
    return ""


def run(faults: Iterable[Fault], copies: Sequence[Copy]) -> Iterator[Verdict]:
    """Verdicts as they come, of as many faults at a time as there are copies."""
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def judge(fault: Fault) -> Verdict:
        copy, start = free.get(), time.perf_counter()
        try:
            killed_by = copy.judge(fault, fault.tests, only=fault.only)
        finally:
            free.put(copy)
        return Verdict(fault, killed_by, time.perf_counter() - start)

    with concurrent.futures.ThreadPoolExecutor(len(copies)) as pool:
        yield from pool.map(judge, faults)


def control(verdicts: Iterable[Verdict], copy: Copy) -> str:
    """The first of the tests that have seen a fault which fails without one, too; empty where none does."""
    seen = sorted({verdict.killed_by for verdict in verdicts if verdict.killed_by.startswith("tests/")})
    return copy.judge(None, seen, limit=4 * LIMIT) if seen else ""
