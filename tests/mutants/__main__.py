"""`python -m tests.mutants`: make every fault in a copy of the checkout, run its tests, and print who saw it.

Fails where less than 90 % were seen, or where one of these tests fails without a fault, too. About fifteen minutes;
`--only TEXT` takes the faults whose name or file holds the text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from .faults import FAULTS
from .run import Copy, control, problems, run

LEAST_SHARE = 0.9


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name or file holds this")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--json", type=Path, help="write the verdicts there, too")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.only in fault.name or options.only in fault.file]
    wrong = [problem for fault in chosen for problem in problems(fault)]
    if wrong or not chosen:
        print("\n".join(wrong) or "no such fault", file=sys.stderr)
        return 2
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        copies = [Copy(Path(folder) / str(number)) for number in range(options.jobs)]
        for verdict in run(chosen, copies):
            verdicts.append(verdict)
            told = verdict.killed_by.rpartition("/")[2] or "SURVIVED"
            print(f"{verdict.fault.name:58} {verdict.seconds:5.1f} s  {told}", flush=True)
        broken = control(verdicts, copies[0])
    if broken:
        print(f"{broken} fails without a fault, too", file=sys.stderr)
        return 2
    killed = sum(verdict.killed for verdict in verdicts)
    print(f"{killed} of {len(verdicts)} faults were seen ({killed / len(verdicts):.0%})")
    if options.json is not None:
        told = [{"name": v.fault.name, "killed_by": v.killed_by, "seconds": round(v.seconds, 1)} for v in verdicts]
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0 if killed >= LEAST_SHARE * len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
