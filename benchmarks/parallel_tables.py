"""The tables of docs/parallel.md from what `bench_parallel` measured, and from the simulator.

    python -m benchmarks.parallel_tables measured.csv                        # print them
    python -m benchmarks.parallel_tables measured.csv --again again.csv      # as they would be with these cells
    python -m benchmarks.parallel_tables measured.csv --again again.csv --write docs/parallel.md

A row of again.csv takes the place of that of the same cell: device, ranks, shape, experts, tokens and way. --write puts
the tables into the document, between the comments that name them, and the merged rows into measured.csv; before all is
made, nothing is written. The constants are those of the code: `simulate --fit-naive` tells those that fit the rows.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench_parallel import COLUMNS
from benchmarks.parallel_cells import WAYS
from diffulex.distributed.links import Host
from diffulex.distributed.measured import compare
from diffulex.distributed.simulate import PASSES, table

KEY = ("device", "ranks", "shape", "experts_in_all", "tokens", "way")
PREDICTED = (("deepseek-v3", 4096), ("deepseek-v3", 128), ("qwen3", 4096))  # each has a heading in the document
Row = dict[str, str]


def read(file: Path) -> list[Row]:
    """The rows of a CSV."""
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def cell(row: Row) -> tuple[str, ...]:
    """What a row is a measurement of."""
    return tuple(row[name] for name in KEY)


def merged(rows: Sequence[Row], again: Sequence[Row]) -> list[Row]:
    """The rows with those of `again` in the places of the same cells: layers as they first come, by tokens and ways."""
    found = {cell(row): row for row in (*rows, *again)}
    layers = list(dict.fromkeys(key[:4] for key in found))
    ways = list(WAYS)
    return sorted(
        found.values(),
        key=lambda row: (layers.index(cell(row)[:4]), int(row["tokens"]), ways.index(row["way"])),
    )


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as `bench_parallel` writes them, with the columns that some row has."""
    text = io.StringIO()
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def tables(file: Path) -> dict[str, str]:
    """What the document has from the rows of a CSV and from the simulator, by the names of its places.

    Raises `ValueError` for rows of several devices, numbers of ranks, or layers under one name: the table of whole
    calls does not tell them apart.
    """
    rows = read(file)
    places = {(row["device"], row["ranks"]) for row in rows}
    layers = {(row["shape"], row["experts_in_all"]) for row in rows}
    if len(places) > 1 or len(layers) > len({shape for shape, _ in layers}):
        raise ValueError(f"rows that the table does not tell apart: {sorted(places)}, {sorted(layers)}")
    calls = [one for one in compare(file) if one.phase == "time"]
    lines = ["| shape | tokens | way | measured | predicted | ratio |", "| --- | --: | --- | --: | --: | --: |"]
    lines += [
        f"| {one.shape} | {one.tokens} | {one.way} | {one.measured:.0f} | {one.predicted:.0f} | {one.ratio:.2f} |"
        for one in calls
    ]
    host = ", ".join(f"{1e3 * seconds:.2f}" for seconds in dataclasses.astuple(Host()))
    return {
        "calls": "\n".join(lines),
        "furthest": f"{math.ceil(100 * max(abs(one.ratio - 1) for one in calls))} %",
        "Host": f"{host} ms",
        "PASSES": f"{PASSES} times their bytes",
        **{f"{name}, {tokens}": table(name, tokens) for name, tokens in PREDICTED},
    }


def replaced(document: str, found: dict[str, str]) -> str:
    """The document with these texts between `<!-- name -->` and `<!-- end of name -->`, on lines of their own or not.

    Raises `ValueError` where it has not one place for each.
    """
    for name, text in found.items():
        place = re.compile(rf"(<!-- {re.escape(name)} -->\n?).*?(\n?<!-- end of {re.escape(name)} -->)", re.DOTALL)
        if len(place.findall(document)) != 1:
            raise ValueError(f"the document has not one place for {name}")
        document = place.sub(lambda match, text=text: f"{match[1]}{text}{match[2]}", document)
    return document


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="a CSV of bench_parallel")
    parser.add_argument("--again", type=Path, help="another one, whose rows replace those of the same cells")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="put the tables into it, and rows into the CSV")
    given = parser.parse_args(arguments)
    rows, again = read(given.measured), read(given.again) if given.again else []
    text = as_csv(merged(rows, again))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "merged.csv"
        file.write_text(text, encoding="utf-8")
        found = tables(file)
    known = {cell(row) for row in rows}
    for row in again:
        print(f"{'replaced' if cell(row) in known else 'new'}: {' '.join(cell(row))}")
    if given.write is None:
        print("\n\n".join(f"{name}:\n\n{text}" for name, text in found.items()))
        return
    document = replaced(given.write.read_text(encoding="utf-8"), found)
    given.write.write_text(document, encoding="utf-8")
    if again:
        given.measured.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
