"""Tests run again in a child process under NVIDIA's compute-sanitizer, which sees bad accesses and races.

    @under_sanitizer("memcheck", "racecheck", runs="test_launches")
    def test_nothing_is_reported(found):
        found.assert_clean()

For each tool one child runs all cases of `test_launches`, of the same file, and the check gets what was found. The
test is skipped, with the reason, where there is no compute-sanitizer or it refuses the device.

memcheck sees accesses outside of an allocation, so the child has torch allocate each tensor by itself. racecheck sees
shared memory alone: neither tool knows of races between programs in global memory.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.support.sanitizer_plugin import INSIDE

_ROOT = Path(__file__).resolve().parents[2]
_CUDA = Path("/usr/local/cuda")
_ERRORS = 77  # exit status where something was reported
_PRINTED = 20  # reports in full
_SECONDS = 300  # most of them for compilation, beside what other processes compile
# Calls that fail are no bad accesses, and torch and Triton ask for functions that a driver need not have. A kernel that
# goes wrong is ended, not the context, so that the cases after it still run. Padding lies behind each allocation.
_FLAGS = {
    "memcheck": ("--report-api-errors", "no", "--destroy-on-device-error", "kernel", "--padding", "1024"),
    "racecheck": (),
}
_SUMMARIES = {
    "memcheck": re.compile(r"={9} ERROR SUMMARY: (\d+) errors?\b"),
    "racecheck": re.compile(r"={9} RACECHECK SUMMARY: (\d+) hazards?\b"),
}
_REFUSED = re.compile(r"={9} .*device not supported", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a tool found in a child, and how its cases ended, by name: "passed", "failed" or "skipped".

    errors: the number of reports that the tool's summary tells, or None where it made none. status: of the child.
    """

    tool: str
    output: str
    status: int | None
    cases: dict[str, str]

    @property
    def refused(self) -> bool:
        """Whether the tool cannot watch this device."""
        return bool(_REFUSED.search(self.output))

    @property
    def errors(self) -> int | None:
        """The errors or hazards of all summaries; None without one."""
        counts = _SUMMARIES[self.tool].findall(self.output)
        return sum(map(int, counts)) if counts else None

    @property
    def report(self) -> str:
        """The lines that the tool wrote."""
        begin = "=" * 9 + " "
        return "\n".join(line[line.index(begin) :] for line in self.output.splitlines() if begin in line)

    @property
    def problem(self) -> str:
        """Why this is no clean run, in a line; empty for a clean one."""
        failed = [name for name, how in self.cases.items() if how == "failed"]
        if self.refused:
            return "the tool refuses the device"
        if self.status is None:
            return "the child took too long and was ended"
        if self.errors is None:
            return f"the child ended with status {self.status} and no summary of {self.tool}"
        if self.errors:
            return f"{self.errors} reported; cases that failed: {', '.join(failed) or 'none'}"
        if failed:
            return f"nothing reported, but cases failed: {', '.join(failed)}"
        if "passed" not in self.cases.values():
            return f"nothing reported, but no case passed: {self.cases}"
        return f"nothing reported, but the child ended with status {self.status}" if self.status else ""

    def assert_clean(self) -> None:
        """Fail with the tool's report, or with the child's last lines where it made none."""
        if self.problem:
            tail = "\n".join(self.output.splitlines()[-60:])
            shown = self.report if self.errors else f"{self.report}\n{tail}"
            pytest.fail(f"{self.tool}: {self.problem}\n{shown}", pytrace=False)

    def assert_reported(self, *words: str) -> None:
        """Fail unless the tool reported something that holds all these words: it would have seen an error."""
        missing = [word for word in words if word not in self.report]
        if not self.errors or missing:
            pytest.fail(f"{self.tool} reported {self.errors}, without {missing}\n{self.output[-4000:]}", pytrace=False)


def find_sanitizer(path: str | None = None, *, cuda: Path = _CUDA) -> str | None:
    """compute-sanitizer on the path (by default that of the process), beside nvcc, or in the usual folder of CUDA."""
    nvcc = shutil.which("nvcc", path=path)
    folders = [cuda / "bin", cuda / "compute-sanitizer"]
    if nvcc is not None:
        folders = [Path(nvcc).parent, Path(nvcc).resolve().parent, *folders]
    found = [shutil.which("compute-sanitizer", path=path)]
    found += [shutil.which("compute-sanitizer", path=str(folder)) for folder in folders]
    return next(filter(None, found), None)


def command(sanitizer: str, tool: str, *, node: str, results: Path) -> list[str]:
    """The command line that runs the tests of `node` under a tool; pytest writes how they ended to `results`."""
    watch = [sanitizer, "--tool", tool, "--error-exitcode", str(_ERRORS), "--print-limit", str(_PRINTED)]
    # compilers that the child starts use no device
    watch += ["--target-processes", "application-only", *_FLAGS[tool]]
    # by default it gives up a child that imports for long, and the child then waits for it at its first call of CUDA
    watch += ["--launch-timeout", "0"]
    inner = [sys.executable, "-m", "pytest", "-v", "-p", "tests.support.sanitizer_plugin", INSIDE]
    return [*watch, *inner, "-p", "no:cacheprovider", f"--junitxml={results}", node]


def run_under(sanitizer: str, tool: str, *, node: str, folder: Path, seconds: float = _SECONDS) -> Found:
    """What a tool finds in the tests of `node`; files go to `folder`."""
    results, log = folder / f"{tool}.xml", folder / f"{tool}.log"
    with log.open("wb") as stream:
        child = subprocess.Popen(
            command(sanitizer, tool, node=node, results=results),
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=_ROOT,
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            start_new_session=True,
        )
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    return Found(tool, log.read_text(errors="replace"), status, _cases(results))


def _cases(results: Path) -> dict[str, str]:
    if not results.exists():
        return {}
    ends = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    cases = {}
    for case in ET.parse(results).iter("testcase"):
        kinds = [ends[part.tag] for part in case if part.tag in ends]
        cases[case.get("name", "")] = min(kinds, default="passed")  # "failed" where there are several
    return cases


def under_sanitizer(*tools: str, runs: str, seconds: float = _SECONDS) -> Callable[[Callable[[Found], None]], object]:
    """Decorator of a check of what was found: a test for each tool, whose child runs the test `runs` of the file."""

    def decorate(check: Callable[[Found], None]) -> object:
        @pytest.mark.parametrize("tool", tools)
        def test(tool, request, tmp_path):
            if request.config.getoption(INSIDE):
                pytest.fail("a sanitizer does not run inside another one", pytrace=False)
            sanitizer = find_sanitizer()
            if sanitizer is None:
                pytest.skip(f"compute-sanitizer is not on the PATH, not beside nvcc and not in {_CUDA}")
            found = run_under(sanitizer, tool, node=f"{request.path}::{runs}", folder=tmp_path, seconds=seconds)
            if found.refused:
                pytest.skip(f"compute-sanitizer refuses this device: {_REFUSED.search(found.output)[0]}")
            request.node.user_properties.append(("sanitized_cases", len(found.cases)))
            check(found)

        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return test

    return decorate
