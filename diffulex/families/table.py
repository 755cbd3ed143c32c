"""What the rows come to: one line each, as text, markdown or JSON, and whether the goal is met."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch

from .measure import MOST_GRAPHS, Row, splits

HEADER = ("family", "model", "through", "error", "graphs", "breaks", "layers", "ops", "notes")
_ROUTE = "moe_route"
WHOLE_FAMILIES, FUSED_LAYERS = 0.93, 0.95  # of those in the release: 60 of the 64 of transformers 5.17


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Sums over the rows of families that the installed transformers has.

    families, whole  all, and those whose layers all run the ops, without a graph break, in at most three graphs, or as
                     many as the stock model needs
    layers, fused    MoE layers, and those that run the ops
    unknown          layers that do not and have no reason
    """

    families: int
    whole: int
    layers: int
    fused: int
    unknown: int

    @property
    def met(self) -> bool:
        """Whether the goal is met."""
        enough = self.whole >= WHOLE_FAMILIES * self.families and self.fused >= FUSED_LAYERS * self.layers
        return enough and not self.unknown

    def __str__(self) -> str:
        return (
            f"{self.whole} of {self.families} families whole, {self.fused} of {self.layers} MoE layers fused,"
            f" {self.unknown} without a reason"
        )


def fused(row: Row) -> int:
    """How many of the row's layers run the ops."""
    return sum(bool(layer.ops) for layer in row.layers)


def unknown(row: Row) -> int:
    """How many of the row's layers do not run the ops and have no reason: all, where ours failed and stock does not."""
    if not row.installed or row.stock_fails:
        return 0
    explained = sum(bool(layer.reason) for layer in row.layers)
    return max(row.family.layers - fused(row) - explained, 0)


def is_whole(row: Row) -> bool:
    """Whether the model is captured as promised."""
    if row.problem or row.dynamo is None or row.error is None or row.error.problem:
        return False
    most = max(MOST_GRAPHS, row.stock.graphs if row.stock else 0)
    few = not splits(row.dynamo) and row.dynamo.graphs <= most
    return few and fused(row) == row.family.layers == len(row.layers)


def verdict(rows: Sequence[Row]) -> Verdict:
    """The sums. A family of several models is whole if all of them are."""
    present = [row for row in rows if row.installed]
    names = {row.family.name for row in present}
    broken = {row.family.name for row in present if not is_whole(row)}
    layers = sum(row.family.layers for row in present)
    return Verdict(len(names), len(names - broken), layers, sum(map(fused, present)), sum(map(unknown, present)))


def notes(row: Row) -> list[str]:
    """What is to be said of a row: why it is not whole, and why its router stays as it was."""
    if not row.installed:
        return ["not in this release"]
    found = [row.family.note, row.problem, row.error.problem if row.error else ""]
    if row.dynamo and row.stock:
        counts = f"{splits(row.stock)} breaks in {row.stock.graphs} graphs without diffulex"
        found += [counts, *(_short(reason) for reason, _ in row.dynamo.break_reasons)]
    found += dict.fromkeys(layer.reason for layer in row.layers)
    found += dict.fromkeys(f"router {layer.router}" for layer in row.layers if layer.ops and _ROUTE not in layer.ops)
    missing = row.family.layers - len(row.layers)
    if row.dynamo and missing:
        found.append(f"{row.family.layers} layers expected, {len(row.layers)} found")
    return [note for note in found if note]


def _short(reason: str) -> str:
    return " ".join(reason.partition("Hint:")[0].split())[:160]


def cells(row: Row, *, figures: bool = True) -> list[str]:
    """The row's texts under `HEADER`. `figures`: errors as numbers, which differ from one CPU to the next."""
    said = "; ".join(notes(row))
    if row.dynamo is None or row.error is None:
        return [str(row.family), row.family.model, "", "", "", "", "", "", said]
    error = str(row.error) if figures else "over the limit" if row.error.problem else "holds"
    ops = sorted({len(layer.ops) for layer in row.layers if layer.ops})
    return [
        str(row.family),
        row.family.model,
        "adapt" if row.adapted else "import",
        error,
        str(row.dynamo.graphs),
        str(splits(row.dynamo)),
        f"{fused(row)}/{row.family.layers}",
        "-".join(map(str, ops)),
        said,
    ]


def as_json(rows: Sequence[Row]) -> str:
    """Everything that is known of the rows, and the sums."""
    listed: list[dict[str, Any]] = []
    for row in rows:
        fields = dataclasses.asdict(row)
        fields["family"] = row.family.name
        fields |= {"part": row.family.part, "model": row.family.model, "whole": is_whole(row), "notes": notes(row)}
        listed.append(fields)
    return json.dumps({"verdict": dataclasses.asdict(verdict(rows)), "families": listed}, indent=2)


def as_markdown(rows: Sequence[Row]) -> str:
    """The table as it is kept in the documents."""
    lines = ["| " + " | ".join(HEADER) + " |", "| --- | --- | --- | --- | --: | --: | --: | --: | --- |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row, figures=False)) + " |" for row in rows]
    return "\n".join(lines)


_TITLE = """# Mixture-of-Experts families of transformers under `torch.compile`

Written by `{command}`: torch {torch}, transformers {transformers}, on a CPU.

Each row is a tiny model with random weights in float32, made of transformers' own classes, with two MoE layers where
the family allows it. It ran in eager mode, in float64, and under `torch.compile` after `import diffulex`, for
inference, over these numbers of tokens: {counts}.
{how}
Families that mix attention with recurrent layers were built of attention layers alone: what stands between the MoE
layers is not what is asked here.

| column | says |
| --- | --- |
| model | the class that was compiled, the text model where a family also reads images or sound |
| through | `import`: nothing but `import diffulex`; `adapt`: `diffulex.adapt(model)` first |
| error | whether the error against float64 is at most ten times stock eager's, mean and largest |
| graphs, breaks | graphs compiled over all token counts, and graph breaks |
| layers | MoE layers that run the ops in every graph, out of those that the model has |
| ops | ops of diffulex per MoE layer; 5 is all stages, 4 leaves the router to ordinary operations |

"""
_HOW = {
    False: "The graphs were rewritten where Inductor would rewrite them, and then run without generated code.",
    True: "Inductor generated the code.",
}


def as_document(rows: Sequence[Row], *, codegen: bool) -> str:
    """A markdown file: what was done, the sums, and the table."""
    import transformers

    title = _TITLE.format(
        command=f"python -m diffulex families{' --codegen' if codegen else ''} --markdown FILE",
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        counts=", ".join(map(str, rows[0].counts)),
        how=_HOW[codegen],
    )
    return f"{title}{verdict(rows)}.\n\n{as_markdown(rows)}\n"


def rows_of_markdown(text: str) -> dict[str, list[str]]:
    """The cells of each family in a table written by `as_markdown`."""
    _, _, table = text.partition(f"| {' | '.join(HEADER)} |\n")
    rows = [line[2:-2].split(" | ") for line in table.splitlines()[1:]]
    return {row[0]: [cell.strip() for cell in row] for row in rows}
