"""Time of a layer over ranks that are not here: exchanges by bytes over links, expert GEMMs by the cost model.

    python -m diffulex.distributed.simulate [--shape qwen3] [--tokens 4096] [--ranks 8 16 32 64]

A prediction, with the assumptions that `docs/parallel.md` lists; `compare` puts it beside what
`benchmarks/bench_parallel.py` measured. Nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

from lowering.errors import MoEOptionError, MoERangeError
from lowering.schedule.cost_model import CONSTANTS, predict
from lowering.schedule.device import H100, H200, DeviceSpec
from lowering.schedule.plan import exact_schedule
from lowering.schedule.schedule import GemmShape

from ..benching.shapes import SHAPES, Shape
from .balance import plan_placement, rank_loads
from .placement import ExpertPlacement

WAYS = ("naive", "static", "sums", "tp")
PAPER = {"deepseek-v3": Shape(256, 8, 7168, 2048), "qwen3": SHAPES["qwen3"]}
RANKS = (8, 16, 32, 64)
_ELEMENT, _SUM, _DETAIL = 2, 4, 12  # bytes: bf16, fp32, and what goes with a slot (row, token, weight)


@dataclasses.dataclass(frozen=True)
class Links:
    """Bytes per second that a rank sends, and receives, at the same time; seconds until an exchange gets going.

    Within a node: two H100 80GB with 18 NVLinks between them, torch 2.11, NCCL: 256 MiB of slots across in 975 us, and
    44 to 61 us for any exchange of 64 tokens. Between nodes nothing was measured: 400 Gbit/s a rank is what such
    clusters have by their data sheets, and the start is taken as a half longer.
    """

    ranks_per_node: int = 8
    inside_bandwidth: float = 270e9
    between_bandwidth: float = 50e9
    inside_latency: float = 45e-6
    between_latency: float = 68e-6


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A layer on ranks.

    tokens     of each rank; with "tp" the same ones on all
    way        "naive", "static", "sums" (static with exact=False) or "tp" (whole experts)
    load       of each expert, E numbers >= 0; None: the same for all
    placement  experts of each rank, replicas allowed, which share an expert's load; None: `ExpertPlacement.even`
    chunks     parts the tokens are cut into, so that the exchange of one part overlaps the GEMMs of another
    """

    shape: Shape
    ranks: int
    tokens: int
    way: str = "naive"
    load: tuple[float, ...] | None = None
    placement: ExpertPlacement | None = None
    chunks: int = 1

    def check(self) -> None:
        """Raise `MoEOptionError` or `MoERangeError` for what has no meaning."""
        where = "simulate"
        if self.way not in WAYS:
            raise MoEOptionError.of(where, expected=f"way in {WAYS}", got=repr(self.way), hint="Choose one of them.")
        if min(self.ranks, self.chunks) < 1 or self.tokens < 0:
            got = f"{self.ranks} ranks, {self.chunks} chunks, {self.tokens} tokens"
            raise MoERangeError.of(where, expected="ranks and chunks >= 1, tokens >= 0", got=got, hint="Pass counts.")
        if len(self.placed.owned) != self.ranks or len(self.loads) != self.shape.num_experts:
            raise MoERangeError.of(
                where,
                expected=f"a placement on {self.ranks} ranks and loads of {self.shape.num_experts} experts",
                got=f"{len(self.placed.owned)} and {len(self.loads)}",
                hint="Make both for the same layer.",
            )

    @property
    def placed(self) -> ExpertPlacement:
        """The experts of each rank."""
        return self.placement or ExpertPlacement.even(self.shape.num_experts, self.ranks)

    @property
    def loads(self) -> tuple[float, ...]:
        """The load of each expert."""
        return self.load if self.load is not None else (1.0,) * self.shape.num_experts


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of the phases of one call, each on the slowest rank, and of all of it.

    rank_experts  seconds of each rank's GEMMs
    shares        of all slots, that each rank gets
    """

    dispatch: float
    experts: float
    combine: float
    step: float
    rank_experts: tuple[float, ...]
    shares: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """Slots of the busiest rank over the mean."""
        return max(self.shares) * len(self.shares)

    @property
    def communication(self) -> float:
        """What of the phases is not GEMMs."""
        parts = self.dispatch + self.experts + self.combine
        return (parts - self.experts) / parts if parts else 0.0


def simulate(scenario: Scenario, *, links: Links | None = None, device: DeviceSpec = H100) -> Prediction:
    """What one call of the layer takes."""
    scenario.check()
    links = links or Links()
    tokens = -(-scenario.tokens // scenario.chunks)
    loads = [float(load) for load in rank_loads(scenario.placed, scenario.loads)]
    total = sum(loads)
    shares = tuple(load / total if total else 1 / scenario.ranks for load in loads)
    everyone = tokens if scenario.way == "tp" else tokens * scenario.ranks
    slots = everyone * scenario.shape.top_k
    experts = tuple(
        _gemms(math.ceil(slots * share - 1e-9), len(owned), shape=scenario.shape, device=device)
        for share, owned in zip(shares, scenario.placed.owned, strict=True)
    )
    dispatch = _dispatch(scenario, tokens, shares=shares, links=links)
    combine = _combine(scenario, tokens, shares=shares, links=links) + _local(scenario, tokens, device=device)
    slowest, chunks = max(experts), scenario.chunks
    step = dispatch + slowest + combine + (chunks - 1) * max(slowest, dispatch + combine)
    return Prediction(dispatch * chunks, slowest * chunks, combine * chunks, step, experts, shares)


@functools.lru_cache(maxsize=4096)
def _gemms(rows: int, experts: int, *, shape: Shape, device: DeviceSpec) -> float:
    """Both GEMMs of a rank's experts, each with the schedule that is best for as many rows."""
    if rows < 1:
        return 0.0
    hidden, width = shape.hidden, shape.intermediate
    gemms = (GemmShape(experts, hidden, width, True), GemmShape(experts, width, hidden, False))
    return sum(predict(rows, gemm, schedule=exact_schedule(rows, gemm, device=device), device=device) for gemm in gemms)


def _neighbours(rank: int, ranks: int, links: Links) -> range:
    """The ranks of a rank's node, itself included."""
    first = rank - rank % links.ranks_per_node
    return range(first, min(first + links.ranks_per_node, ranks))


def _exchange(sent: Sequence[Sequence[float]], links: Links, *, starts: int = 1) -> float:
    """Seconds until sent[a][b] bytes have gone from each rank a to each rank b, in `starts` exchanges.

    Both kinds of links are busy at once, in both directions at once; the slowest rank counts.
    """
    ranks = len(sent)
    if ranks == 1:
        return 0.0
    slowest = 0.0
    for rank in range(ranks):
        near = _neighbours(rank, ranks, links)
        out_near = sum(sent[rank][other] for other in near if other != rank)
        in_near = sum(sent[other][rank] for other in near if other != rank)
        out_far = sum(sent[rank][other] for other in range(ranks) if other not in near)
        in_far = sum(sent[other][rank] for other in range(ranks) if other not in near)
        times = [starts * links.inside_latency + max(out_near, in_near) / links.inside_bandwidth]
        if len(near) < ranks:
            times.append(starts * links.between_latency + max(out_far, in_far) / links.between_bandwidth)
        slowest = max(slowest, *times)
    return slowest


def _to_shares(rows: float, row_bytes: int, shares: Sequence[float]) -> list[list[float]]:
    """Bytes from each rank to each, where every rank sends so many rows, spread by the shares."""
    return [[rows * row_bytes * share for share in shares] for _ in shares]


def _dispatch(scenario: Scenario, tokens: int, *, shares: Sequence[float], links: Links) -> float:
    shape, ranks = scenario.shape, scenario.ranks
    if scenario.way == "tp":
        return 0.0
    if scenario.way == "naive":  # counts, rows, details
        row = shape.hidden * _ELEMENT + _DETAIL
        return _exchange(_to_shares(tokens * shape.top_k, row, shares), links, starts=3)
    row = shape.hidden * _ELEMENT + shape.top_k * 8
    return _exchange(_to_shares(tokens * ranks, row, [1 / ranks] * ranks), links)


def _combine(scenario: Scenario, tokens: int, *, shares: Sequence[float], links: Links) -> float:
    shape, ranks = scenario.shape, scenario.ranks
    if scenario.way == "tp":
        if ranks == 1:
            return 0.0
        across = ranks > links.ranks_per_node  # a ring is as fast as its slowest link
        bandwidth = links.between_bandwidth if across else links.inside_bandwidth
        latency = links.between_latency if across else links.inside_latency
        return latency + 2 * (ranks - 1) / ranks * tokens * shape.hidden * _SUM / bandwidth
    if scenario.way == "naive":
        there = _to_shares(tokens * shape.top_k, shape.hidden * _ELEMENT, shares)
        return _exchange([list(column) for column in zip(*there, strict=True)], links)
    row = shape.hidden * (_SUM if scenario.way == "sums" else shape.top_k * _ELEMENT)
    return _exchange(_to_shares(tokens * ranks, row, [1 / ranks] * ranks), links)


def _local(scenario: Scenario, tokens: int, *, device: DeviceSpec) -> float:
    """Reading and writing the rows of slots on the device, between GEMMs and tokens."""
    shape, ranks = scenario.shape, scenario.ranks
    row, slots = shape.hidden * _ELEMENT, tokens * shape.top_k
    moved = {
        "naive": 4 * slots * row,  # zeros, into their places, and the sum
        "static": (ranks + 1) * slots * row,  # rows without an expert are written as zeros
        "sums": 2 * ranks * slots * row,
        "tp": 2 * slots * row,
    }[scenario.way]
    return (moved + tokens * row) / (device.bandwidth * CONSTANTS["memory_efficiency"])


def zipf_load(num_experts: int, top_k: int) -> tuple[float, ...]:
    """Loads in falling order after 1 / number, none more than a K-th of the slots, as a token takes an expert once."""
    free, left, loads = [1 / (number + 1) for number in range(num_experts)], 1.0, [0.0] * num_experts
    for number in range(num_experts):
        rest = sum(free[number:])
        loads[number] = min(1 / top_k, left * free[number] / rest)
        left -= loads[number]
    return tuple(loads)


def planned(scenario: Scenario, *, replicas: int = 0, device: DeviceSpec = H100) -> ExpertPlacement:
    """`plan_placement` for the loads, with so many replicas where the model finds the GEMMs no slower with them.

    Where few tokens make reading weights the whole cost, another row of weights costs more than it takes off.
    """
    counts = (0, replicas) if replicas else (0,)
    plans = [plan_placement(scenario.loads, scenario.ranks, replicas=count).placement for count in counts]
    times = [simulate(dataclasses.replace(scenario, placement=plan), device=device).experts for plan in plans]
    return plans[times.index(min(times))]


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


def compare(file: Path, *, links: Links | None = None) -> list[Comparison]:
    """Each phase of each row of the CSV of `benchmarks/bench_parallel.py`, on H100 or H200 alone."""
    found = []
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            device = next((spec for spec in (H100, H200) if spec.name in row["device"]), None)
            way = {"tp-experts": "tp", "tp-width": None, "parts": "sums"}.get(row["way"], row["way"])
            chunks = 4 if row["way"] == "parts" else 1
            if device is None or way is None:
                continue
            shape = dataclasses.replace(SHAPES[row["shape"]], num_experts=int(row["experts_in_all"]))
            scenario = Scenario(shape, int(row["ranks"]), int(row["tokens"]), way, chunks=chunks)
            told = simulate(scenario, links=links, device=device)
            phases = {"dispatch": told.dispatch, "experts": told.experts, "combine": told.combine, "time": told.step}
            for phase, seconds in phases.items():
                if row[f"{phase}_us"]:
                    measured = float(row[f"{phase}_us"])
                    found.append(
                        Comparison(row["shape"], int(row["tokens"]), row["way"], phase, measured, 1e6 * seconds)
                    )
    return found


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _cells(told: Prediction, tokens: int) -> list[str]:
    times = (told.dispatch, told.experts, told.combine, told.step)
    rate = tokens / told.step / 1e6
    return [*(f"{1e6 * seconds:.0f}" for seconds in times), f"{100 * told.communication:.0f}", f"{rate:.2f}"]


def table(name: str, tokens: int, *, ranks: Sequence[int] = RANKS, replicas: int = 32) -> str:
    """Every way with equal loads, then `naive` with Zipf's, as it is, planned, and planned with replicas: Markdown."""
    shape = PAPER[name]
    loads = zipf_load(shape.num_experts, shape.top_k)
    head = ("ranks", "way", "loads", "busiest", "dispatch", "experts", "combine", "step", "comm. %", "M tokens/s")
    lines = [f"{name}, {tokens} tokens a rank, H100; microseconds", "", _row(head), _row(["--:"] * len(head))]
    for count in ranks:
        cases = [(way, "equal", Scenario(shape, count, tokens, way)) for way in WAYS]
        skewed = Scenario(shape, count, tokens, "naive", load=loads)
        cases.append(("naive", "zipf", skewed))
        for text, more in (("zipf, planned", 0), (f"zipf, planned, {replicas} replicas", replicas)):
            cases.append(("naive", text, dataclasses.replace(skewed, placement=planned(skewed, replicas=more))))
        for way, text, scenario in cases:
            told, done = simulate(scenario), tokens if way == "tp" else tokens * count
            lines.append(_row([count, way, text, f"{told.imbalance:.2f}", *_cells(told, done)]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or with --compare the predictions beside measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="deepseek-v3", choices=list(PAPER))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--replicas", type=int, default=32)
    parser.add_argument("--compare", type=Path, help="a CSV of benchmarks/bench_parallel.py")
    given = parser.parse_args(arguments)
    if given.compare is None:
        print(table(given.shape, given.tokens, ranks=given.ranks, replicas=given.replicas))
        return
    for one in compare(given.compare):
        where = f"{one.shape:8} {one.tokens:6} {one.way:10} {one.phase:8}"
        print(f"{where} measured {one.measured:9.1f}  predicted {one.predicted:9.1f}  ratio {one.ratio:.2f}")


if __name__ == "__main__":
    main()
