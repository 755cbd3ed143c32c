"""Parses the command line and runs one command: 0 is success, 1 a failed check, 2 a wrong argument."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lowering.errors import MoEErrorMixin

from . import bench, demo, env, explain, families, tune

_COMMANDS = (demo, explain, families, bench, tune, env)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `python -m diffulex`; each command brings its own options and a `run` function."""
    parser = argparse.ArgumentParser(
        prog="python -m diffulex",
        description="Mixture-of-Experts models, compiled. See `python -m diffulex COMMAND --help`.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: of this process) and return its exit code."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; transformers reads this when it is imported
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, TypeError) as error:
        if not isinstance(error, MoEErrorMixin):
            raise
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
