"""What `bench_parallel` measures: shapes, ways, and in which order."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from diffulex.benching.shapes import SHAPES, Shape

TINY = {"tiny": Shape(8, 2, 64, 32)}
WAYS: dict[str, dict[str, Any]] = {
    "naive": {"dispatcher": "naive"},
    "static": {"dispatcher": "static"},
    "sums": {"dispatcher": "static", "exact": False},
    "parts": {"dispatcher": "static", "exact": False, "chunks": 2},
    "tp-experts": {"mode": "tp"},
    "tp-width": {"mode": "tp", "shard": "width"},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, the same on every rank."""

    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    ways: tuple[str, ...]
    ranks: int = 2
    experts: int | None = None
    device: str = "cuda"
    seconds: float = 300
    out: str = "parallel.csv"


def shape_of(name: str, options: Options) -> Shape:
    """A shape by name, with another number of experts where one is asked for (but for the tiny one)."""
    shape = {**SHAPES, **TINY}[name]
    return dataclasses.replace(shape, num_experts=options.experts) if options.experts and name == "dsv3" else shape


def cells(options: Options) -> list[tuple[str, int, str]]:
    """Every shape, tokens and way: the most tokens where ways overlap, the fewest with `static`, then the rest."""
    static, most, fewest = ("parts", "sums", "static"), max(options.tokens), min(options.tokens)
    ways = [*static, *(way for way in WAYS if way not in static)]

    def place(cell: tuple[str, int, str]) -> tuple[int, ...]:
        name, tokens, way = cell
        first = 0 if tokens == most and way in static else 1 if (tokens, way) == (fewest, "static") else 2
        return first, options.tokens.index(tokens), options.shapes.index(name), ways.index(way)

    return sorted(itertools.product(options.shapes, options.tokens, options.ways), key=place)
