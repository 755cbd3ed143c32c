"""Random models around MoE blocks, compiled by the passes and compared with eager torch.

    python -m tests.support.fuzz                        1,000 seeds, every 50th through all of Inductor
    python -m tests.support.fuzz --first 17 --count 1   one seed

A program that differs, crashes or breaks its graph is made smaller and printed; it runs by itself. The exit code is 1.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
import warnings

from .check import check
from .draw import draw
from .shrink import shrunk


def main() -> int:
    """Run the seeds, print what fails and what was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--inductor", type=int, default=50, help="every how many seeds go through code generation")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of torch, about programs as odd as these
    start, failed, reached = time.time(), [], collections.Counter()
    for seed in range(arguments.first, arguments.first + arguments.count):
        inductor = bool(arguments.inductor) and seed % arguments.inductor == 0
        result = check(draw(seed), inductor=inductor)
        for found in result.decisions:
            if found.stage == "recognise":
                reached[f"{found.subject}: {found.reason.code.name if found.reason else 'yes'}"] += 1
        if result.kind == "few":
            reached["seeds with too few clear tokens"] += 1
        elif result.problem:
            failed.append(seed)
            small = shrunk(result, inductor=inductor)
            print(f"--- seed {seed}, {'Inductor' if inductor else 'passes'}: {small.problem}\n{small.text}", flush=True)
    print(*(f"{count:6} {what}" for what, count in sorted(reached.items())), sep="\n")
    print(f"{arguments.count} seeds, {len(failed)} failed {failed[:50]}, {time.time() - start:.0f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
