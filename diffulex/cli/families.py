"""`python -m diffulex families`: every MoE family of transformers, tiny, compiled, and what came of it."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lowering.errors import MoEOptionError, MoERangeError

from ..families.catalogue import FAMILIES, Family
from .progress import progress
from .table import format_table


def add_parser(commands: Any) -> None:
    """Add `families` to the commands."""
    parser = commands.add_parser(
        "families",
        help="what the compiler does with every MoE family of transformers",
        description="Builds a tiny model of every MoE family of the installed transformers with random weights, runs "
        "it eagerly, in float64 and under torch.compile over several token counts, and prints a row for each. Nothing "
        "is downloaded. Exit code 1 when too few families are captured whole, or a layer is left out without a reason.",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these families alone")
    parser.add_argument("--quick", action="store_true", help="two token counts instead of eleven")
    parser.add_argument(
        "--codegen",
        action="store_true",
        help="let Inductor generate and compile code; by default the rewritten graphs are run as they are, which takes "
        "seconds a family instead of a minute and needs no C++ compiler",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that work side by side (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that is known there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, as a document")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if args.jobs < 1:
        raise MoERangeError.of("--jobs", expected="at least 1", got=str(args.jobs), hint="Give a positive number.")
    chosen = choose(args.only)
    from ..families import measure, table

    counts = measure.QUICK_COUNTS if args.quick else measure.COUNTS
    rows: dict[str, measure.Row] = {}
    with progress("families", len(chosen), unit="family") as bar:
        for row in _rows(chosen, counts, codegen=args.codegen, jobs=args.jobs):
            rows[str(row.family)] = row
            bar.advance(note=str(row.family))
    ordered = [rows[str(family)] for family in chosen]
    result = table.verdict(ordered)
    print(format_table(table.HEADER[:-1], [table.cells(row)[:-1] for row in ordered]))
    for row in ordered:
        for note in table.notes(row):
            print(f"{row.family}: {note}")
    print(result)
    if args.json:
        args.json.write_text(table.as_json(ordered) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(table.as_document(ordered, codegen=args.codegen), encoding="utf-8")
    return 0 if result.met else 1


def choose(names: Sequence[str] | None) -> tuple[Family, ...]:
    """The families of these names; all without names."""
    if names is None:
        return FAMILIES
    known = {family.name for family in FAMILIES}
    for name in names:
        if name not in known:
            raise MoEOptionError.of(
                "--only",
                expected="families of the catalogue",
                got=repr(name),
                hint=f"Known are {', '.join(sorted(known))}.",
            )
    return tuple(family for family in FAMILIES if family.name in names)


def _rows(families: Sequence[Family], counts: Sequence[int], *, codegen: bool, jobs: int) -> Iterator[Any]:
    """The rows as they are done."""
    one = functools.partial(_row, counts=counts, codegen=codegen)
    if jobs == 1:
        yield from map(one, families)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for done in concurrent.futures.as_completed([pool.submit(one, family) for family in families]):
            yield done.result()


def _row(family: Family, *, counts: Sequence[int], codegen: bool) -> Any:
    from transformers.utils import logging

    from ..families.measure import measure

    logging.set_verbosity_error()  # tiny configurations make it warn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return measure(family, counts, codegen=codegen)
