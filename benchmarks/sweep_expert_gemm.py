"""Time schedules of the two expert GEMMs: the data the cost model is calibrated and judged by.

    python -m benchmarks.sweep_expert_gemm --shapes qwen3 mixtral --out sweep.csv
    python -m benchmarks.sweep_expert_gemm --best 12 --out sweep.csv    only those that the cost model ranks first

`python -m diffulex tune` with all schedules that could win, keeping nothing. One CSV row per (shape, stage, tokens,
schedule): median microseconds of CUDA-graph replays over rotated routings, so that weights come from memory and not
from L2.
"""

from __future__ import annotations

import argparse
import sys

from diffulex.benching.shapes import SHAPES, TOKENS
from diffulex.cli.main import main as diffulex


def main() -> int:
    """Parse arguments, then tune."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", default=list(map(str, TOKENS)))
    parser.add_argument("--best", default="0", help="only so many schedules, the model's first; 0: all")
    parser.add_argument("--out", default="sweep.csv")
    parser.add_argument("--seconds", default="400")
    given = parser.parse_args()
    what = ["--shapes", *given.shapes, "--tokens", *given.tokens, "--best", given.best, "--seconds", given.seconds]
    return diffulex(["tune", *what, "--csv", given.out, "--no-save"])


if __name__ == "__main__":
    sys.exit(main())
