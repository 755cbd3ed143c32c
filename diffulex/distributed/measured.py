"""Predictions of `simulate` beside what `benchmarks/bench_parallel.py` measured, and constants of `naive` by it."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path

from lowering.errors import MoEOptionError
from lowering.schedule.device import H100, H200, DeviceSpec

from ..benching.shapes import SHAPES
from .links import REFERENCE_PROBE, Host, Links
from .simulate import PASSES, Scenario, pass_seconds, simulate


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A measured phase beside its prediction, in microseconds."""

    shape: str
    tokens: int
    way: str
    phase: str
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def _measured(file: Path) -> Iterator[tuple[dict[str, str], Scenario, DeviceSpec]]:
    """The rows of a CSV that have a model, on H100 or H200 alone."""
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            device = next((spec for spec in (H100, H200) if spec.name in row["device"]), None)
            way = {"tp-experts": "tp", "tp-width": None, "parts": "sums"}.get(row["way"], row["way"])
            if device is not None and way is not None:
                shape = dataclasses.replace(SHAPES[row["shape"]], num_experts=int(row["experts_in_all"]))
                chunks = 2 if row["way"] == "parts" else 1
                yield row, Scenario(shape, int(row["ranks"]), int(row["tokens"]), way, chunks=chunks), device


def _probe(row: dict[str, str]) -> float:
    """Seconds of the host's probe beside a row; the reference where it was not measured."""
    return 1e-6 * float(row.get("host_us") or 0) or REFERENCE_PROBE


def compare(file: Path, *, links: Links | None = None) -> list[Comparison]:
    """Each phase of each row, on a host as fast as its probe says."""
    found = []
    for row, scenario, device in _measured(file):
        told = simulate(scenario, links=links, host=Host().at(_probe(row)), device=device)
        phases = {"dispatch": told.dispatch, "experts": told.experts, "combine": told.combine, "time": told.step}
        for phase, seconds in phases.items():
            if row[f"{phase}_us"]:
                measured = float(row[f"{phase}_us"])
                found.append(Comparison(row["shape"], scenario.tokens, row["way"], phase, measured, 1e6 * seconds))
    return found


def fit_naive(file: Path, *, links: Links | None = None) -> dict[str, float]:
    """`REFERENCE_PROBE` and the fields of `Host` in seconds, and `PASSES`, by the rows of `naive`: means.

    By the host: with fewer tokens, what takes more than twice as long as it would without one. The most tokens tell
    what comes upon bytes and links: `before` of the way out, and the passes of the way back.
    """
    rows = [(row, scenario, device) for row, scenario, device in _measured(file) if scenario.way == "naive"]
    most = max((scenario.tokens for _, scenario, _ in rows), default=0)
    reference = statistics.median([_probe(row) for row, _, _ in rows] or [REFERENCE_PROBE])
    found: dict[str, list[float]] = {name: [] for name in (*(f.name for f in dataclasses.fields(Host)), "PASSES")}
    for row, scenario, device in rows:
        told = simulate(scenario, links=links, host=Host(0.0, 0.0, 0.0, 0.0), device=device)
        dispatch, combine, call = (1e-6 * float(row[f"{phase}_us"]) for phase in ("dispatch", "combine", "time"))
        scale = reference / _probe(row)
        if scenario.tokens == most:
            found["before"].append((dispatch - told.dispatch) * scale)
            found["PASSES"].append(PASSES + (combine - told.combine) / pass_seconds(scenario, device=device))
            continue
        alone = {"dispatch": told.dispatch, "combine": told.combine, "call": told.step}
        for (name, seconds), took in zip(alone.items(), (dispatch, combine, call), strict=True):
            if took > 2 * seconds:
                found[name].append(took * scale)
    if not all(found.values()):
        raise MoEOptionError.of(
            "fit_naive",
            expected="rows of naive with few tokens and with many",
            got=f"nothing that tells {', '.join(name for name, values in found.items() if not values)}",
            hint="Measure --ways naive --tokens 64 1024 16384.",
        )
    return {"REFERENCE_PROBE": reference} | {name: statistics.fmean(values) for name, values in found.items()}
