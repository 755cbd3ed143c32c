"""`python -m tests.reliability`: run what the claimed figures rest on, and print them: asked, measured, by which tests.

By default the part for a CPU, with the seeded faults of `tests.mutants`: under 25 minutes on two cores. `--gpu`: that
for one GPU, under 15 minutes; most of it is compilation, so several processes share the GPU. `--write` puts the table
into docs/reliability.md, with date and device. Fails where some figure is not what is asked, and where a process that
runs tests does not end by itself. `tests/reliability/rows.py` says which tests each figure is read off.

`--log FOLDER` keeps how each test of this run ended, and with `--gpu` what the processes printed. `--gpu --seconds 500`
ends a run that takes longer; a test that was not run or did not end by then does not count as shown.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.__main__ import LEAST_SHARE

from .results import Results
from .rows import CPU, GPU, LARGE, LONG, Row
from .running import ROOT, Options, Run, by_xdist, shared

DOCUMENT = ROOT / "docs" / "reliability.md"
Line = tuple[str, str, str, bool, str]  # figure, asked, measured, whether it holds, tests
MINUTES = {"cpu": 25, "gpu": 15}


def run_tests(rows: Sequence[Row], part: str, options: Options) -> Run:
    """All tests of the rows, once each; those that take long begin first."""
    tests = [test for row in rows for test in row.tests]
    if part == "cpu":
        return by_xdist(sorted(tests), "not gpu", options)
    return shared(long_first(tests), "gpu", options)


def long_first(tests: Sequence[str]) -> list[str]:
    """Those that take long, then the others as they stood."""
    files = [test.partition("::")[0] for test in tests]
    places = [LONG.index(file) if file in LONG else len(LONG) for file in files]
    return [tests[index] for index in sorted(range(len(tests)), key=places.__getitem__)]


def faults(workers: int) -> Line:
    """The row of the seeded faults, by their own command."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "verdicts.json"
        command = [sys.executable, "-m", "tests.mutants", "--jobs", str(workers), "--json", str(told)]
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        verdicts = json.loads(told.read_text()) if told.exists() else []
    seen = sum(bool(verdict["killed_by"]) for verdict in verdicts)
    text = f"{seen} of {len(verdicts)}"
    holds = done.returncode == 0 and len(verdicts) >= 30 and seen >= LEAST_SHARE * len(verdicts)
    return "seeded faults that tests see", "90 % of 30 or more", text, holds, "`python -m tests.mutants`"


def lines(rows: Sequence[Row], results: Results) -> list[Line]:
    """A line of the table for each row."""
    found = []
    for row in rows:
        text, holds = row.measured(results)
        files = [*dict.fromkeys(f"`{test.partition('::')[0].removeprefix('tests/')}`" for test in row.tests)]
        more = [f"{len(files) - 3} more"] if len(files) > 3 else []
        found.append((row.figure, row.asked, text, holds, ", ".join([*files[:3], *more])))
    return found


def device(part: str) -> str:
    """What it was measured on, and with."""
    import torch
    import transformers
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}"
    if part == "gpu":
        return f"{torch.cuda.get_device_name()}, {versions}" if torch.cuda.is_available() else f"no GPU, {versions}"
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return f"{len(names)} x {names[0].partition(': ')[2] if names else platform.machine()}, {versions}"


def table(found: Sequence[Line], *, head: str) -> str:
    """The table in Markdown."""
    rows = [
        f"| {figure} | {asked} | {'' if holds else '**no**: '}{text} | {tests} |"
        for figure, asked, text, holds, tests in found
    ]
    return "\n".join(
        [head, "", "| figure | asked | measured | tests, in `tests/` |", "| --- | --- | --- | --- |", *rows]
    )


def replaced(document: str, part: str, text: str) -> str:
    """The document with another text in the place of a part."""
    begin, end = f"<!-- {part} -->\n", f"\n<!-- end of {part} -->"
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(end)
    if not rest or end not in rest:
        raise ValueError(f"the document has no place for {part}")
    return f"{before}{begin}{text}{end}{after}"


def processes(run: Run) -> Line:
    """The row of those who ran the tests."""
    text = "; ".join(run.ended) or f"{run.processes} did"
    return "processes that run the tests", "end by themselves", text, not run.ended, "`python -m tests.reliability`"


def duration(seconds: float, part: str) -> Line:
    """The row of the table itself."""
    limit, minutes = MINUTES[part], seconds / 60
    text = f"{minutes:.1f} minutes"
    return "this table", f"under {limit} minutes", text, minutes < limit, "`python -m tests.reliability`"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="the part for a GPU")
    parser.add_argument("--write", action="store_true", help="into docs/reliability.md")
    parser.add_argument("--workers", type=int, help="processes at a time: 2; --gpu: half as many as cores, 8 at most")
    parser.add_argument("--log", type=Path, help="keep in this folder how tests end; --gpu: and what they print")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="on a GPU: end after these")
    parser.add_argument(
        "--no-faults", action="store_true", help="without the seeded faults, whose line is left out then"
    )
    options = parser.parse_args()
    if options.workers is None:
        options.workers = min(8, max(1, (os.cpu_count() or 1) // 2)) if options.gpu else 2
    return options


def measured(options: argparse.Namespace, folder: Path) -> list[Line]:
    """All lines of the table of a part."""
    part, rows = ("gpu", GPU) if options.gpu else ("cpu", CPU)
    start = time.monotonic()
    run = run_tests(rows, part, Options(options.workers, folder, options.seconds, LARGE))
    for ended in ("failed", "begun", "left"):
        for node in run.results.that(ended):
            print(f"{ended}: {node}", file=sys.stderr)
    found = [*lines(rows, run.results), processes(run)]
    if part == "cpu" and not options.no_faults:
        found.append(faults(options.workers))
    return [*found, duration(time.monotonic() - start, part)]


def main() -> int:
    options = parsed()
    part = "gpu" if options.gpu else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.log or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = measured(options, folder)
    head = f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, {device(part)}."
    print(table(found, head=head))
    if options.write:
        DOCUMENT.write_text(
            replaced(DOCUMENT.read_text(encoding="utf-8"), part, table(found, head=head)), encoding="utf-8"
        )
    return 0 if all(holds for *_, holds, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
