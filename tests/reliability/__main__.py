"""`python -m tests.reliability`: run what the claimed figures rest on, and print them: asked, measured, by which tests.

By default the part for a CPU, with the seeded faults of `tests.mutants`: under 25 minutes on two cores. `--gpu`: that
for one GPU, under 15 minutes. `--write` puts the table into docs/reliability.md, with date and device. Fails where some
figure is not what is asked. `tests/reliability/rows.py` says which tests each figure is read off.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.__main__ import LEAST_SHARE

from .results import Results, read
from .rows import CPU, GPU, Row

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"
Line = tuple[str, str, str, bool, str]  # figure, asked, measured, whether it holds, tests
MINUTES = {"cpu": 25, "gpu": 15}


def run_tests(rows: Sequence[Row], *, part: str, workers: int) -> Results:
    """All tests of the rows, once each."""
    tests = sorted({test for row in rows for test in row.tests})
    whole = {test for test in tests if "::" not in test}
    tests = [test for test in tests if test in whole or test.partition("::")[0] not in whole]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu" if part == "gpu" else "not gpu"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        if part == "cpu" and workers > 1:
            command += ["-n", str(workers), "--dist", "loadfile"]
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(f"pytest ended with {done.returncode}")
        return read(report)


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="the part for a GPU")
    parser.add_argument("--write", action="store_true", help="into docs/reliability.md")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, on a CPU")
    parser.add_argument(
        "--no-faults", action="store_true", help="without the seeded faults, whose line is left out then"
    )
    options = parser.parse_args()
    part, rows = ("gpu", GPU) if options.gpu else ("cpu", CPU)
    start = time.monotonic()
    found = lines(rows, run_tests(rows, part=part, workers=options.workers))
    if part == "cpu" and not options.no_faults:
        found.append(faults(options.workers))
    minutes = (time.monotonic() - start) / 60
    limit = MINUTES[part]
    found.append(
        (
            "this table",
            f"under {limit} minutes",
            f"{minutes:.1f} minutes",
            minutes < limit,
            "`python -m tests.reliability`",
        )
    )
    head = f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, {device(part)}."
    print(table(found, head=head))
    if options.write:
        DOCUMENT.write_text(
            replaced(DOCUMENT.read_text(encoding="utf-8"), part, table(found, head=head)), encoding="utf-8"
        )
    return 0 if all(holds for *_, holds, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
