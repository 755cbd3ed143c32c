"""Time of a layer over ranks that are not here: exchanges by bytes over links, expert GEMMs by the cost model.

    python -m diffulex.distributed.simulate [--shape qwen3] [--tokens 4096] [--ranks 8 16 32 64]

A prediction, with the assumptions that `docs/parallel.md` lists; `measured` puts it beside what
`benchmarks/bench_parallel.py` measured. Nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

from lowering.errors import MoEOptionError, MoERangeError
from lowering.schedule.cost_model import CONSTANTS, predict
from lowering.schedule.device import H100, DeviceSpec
from lowering.schedule.plan import exact_schedule
from lowering.schedule.schedule import GemmShape

from ..benching.shapes import SHAPES, Shape
from .balance import plan_placement, rank_loads
from .links import Host, Links, exchange_seconds, reduce_seconds, to_shares
from .placement import ExpertPlacement
from .symmetric import MOST_SLOT_BYTES

WAYS = ("naive", "static", "sums", "tp")
PAPER = {"deepseek-v3": Shape(256, 8, 7168, 2048), "qwen3": SHAPES["qwen3"]}
RANKS = (8, 16, 32, 64)
_ELEMENT, _WIDE, _DETAIL = 2, 4, 12  # bytes: bf16, fp32, and what goes with a slot (row, token, weight)
_KERNEL = 2.5e-6  # seconds of a kernel that has next to nothing to do, in a CUDA graph
# Slots of `naive` moved on their way back, in multiples of their bytes, into their places and to sums. Fitted.
PASSES = 2.44


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A layer on ranks.

    tokens     of each rank; with "tp" the same ones on all
    way        "naive", "static", "sums" (static with exact=False) or "tp" (whole experts)
    load       of each expert, E numbers >= 0; None: the same for all
    placement  experts of each rank, replicas allowed, which share an expert's load; None: `ExpertPlacement.even`
    chunks     with "sums": a rank's own tokens, and those of its peers in chunks - 1 parts, as `overlap` has them
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
        if self.chunks > 1 and self.way != "sums":
            raise MoEOptionError.of(where, expected="chunks=1 but for 'sums'", got=repr(self.way), hint="Leave it out.")
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

    rank_experts  seconds of each rank's experts
    shares        of all slots, that each rank gets

    With chunks, dispatch and combine are those of a call without.
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


def simulate(
    scenario: Scenario, *, links: Links | None = None, host: Host | None = None, device: DeviceSpec = H100
) -> Prediction:
    """What one call of the layer takes."""
    scenario.check()
    links, host, tokens = links or Links(), host or Host(), scenario.tokens
    loads = [float(load) for load in rank_loads(scenario.placed, scenario.loads)]
    total = sum(loads)
    shares = tuple(load / total if total else 1 / scenario.ranks for load in loads)
    dispatch = _dispatch(scenario, shares, links=links, device=device)
    combine = _combine(scenario, shares, links=links, device=device)
    if scenario.chunks > 1:
        return _in_parts(scenario, shares, links=links, device=device, phases=(dispatch, combine))
    everyone = tokens if scenario.way == "tp" else tokens * scenario.ranks
    experts = tuple(
        _experts(scenario, everyone, share=share, held=len(owned), device=device)
        for share, owned in zip(shares, scenario.placed.owned, strict=True)
    )
    slowest = max(experts)
    step = dispatch + slowest + combine
    if scenario.way == "naive":  # the host goes on while the device works, and begins the next call
        dispatch += host.before
        step = max(host.call, dispatch + slowest + combine)
        dispatch, combine = max(host.dispatch, dispatch), max(host.combine, combine)
    return Prediction(dispatch, slowest, combine, step, experts, shares)


def _rate(device: DeviceSpec) -> float:
    """Bytes per second that kernels read and write."""
    return device.bandwidth * CONSTANTS["memory_efficiency"]


def pass_seconds(scenario: Scenario, *, device: DeviceSpec) -> float:
    """Seconds of reading, or writing, the slots of a rank's tokens once."""
    return scenario.tokens * scenario.shape.top_k * scenario.shape.hidden * _ELEMENT / _rate(device)


def _experts(scenario: Scenario, tokens: int, *, share: float, held: int, device: DeviceSpec) -> float:
    """GEMMs of a rank over its share of the slots of so many tokens, and zeros in the places of the others if read."""
    slots = tokens * scenario.shape.top_k
    spare = (1 - share) * slots if scenario.way == "static" else 0.0
    zeros = spare * scenario.shape.hidden * _ELEMENT / _rate(device)
    return sum(_gemms(math.ceil(slots * share - 1e-9), held, shape=scenario.shape, device=device)) + zeros


@functools.lru_cache(maxsize=4096)
def _gemms(rows: int, experts: int, *, shape: Shape, device: DeviceSpec) -> tuple[float, float]:
    """Each of both GEMMs of a rank's experts, with the schedule that is planned for as many rows."""
    if rows < 1:
        return 0.0, 0.0
    hidden, width = shape.hidden, shape.intermediate
    gemms = (GemmShape(experts, hidden, width, True), GemmShape(experts, width, hidden, False))
    first, second = (
        predict(rows, gemm, schedule=exact_schedule(rows, gemm, device=device), device=device) for gemm in gemms
    )
    return first, second


def _in_parts(
    scenario: Scenario,
    shares: Sequence[float],
    *,
    links: Links,
    device: DeviceSpec,
    phases: tuple[float, float],
) -> Prediction:
    """A call in the order of `overlap`: the stream of the GEMMs, and the one of the copies beside it."""
    shape, ranks, parts = scenario.shape, scenario.ranks, scenario.chunks - 1
    rate, start = _rate(device), links.memory_latency / 2  # of an exchange there are two barriers
    rows = scenario.tokens * shape.hidden * _ELEMENT  # bytes of a rank's tokens
    peers = (ranks - 1) / parts  # tokens of a part, in multiples of a rank's
    copy = peers * rows / links.memory_bandwidth
    steps, experts = [], []
    for share, owned in zip(shares, scenario.placed.owned, strict=True):

        def gemms(tokens: float, share: float = share, held: int = len(owned)) -> tuple[float, float]:
            return _gemms(math.ceil(tokens * shape.top_k * share - 1e-9), held, shape=shape, device=device)

        (first, second), theirs = gemms(scenario.tokens), sum(gemms(peers * scenario.tokens)) if ranks > 1 else 0.0
        added = 3 * _KERNEL + (shape.top_k * share + 1) * rows / rate
        now = 2 * rows / rate + start + 3 * _KERNEL
        copied, now = now, now + first
        copies = [copied + (part + 1) * copy for part in range(parts)]
        back = copies[-1]
        for arrived in copies if ranks > 1 else ():
            sums = _KERNEL + peers * (shape.top_k * share + 1 + 2) * rows / rate
            now = max(now, arrived) + theirs + sums + start
            back = max(back, now) + copy
        steps.append(max(now + second, back if ranks > 1 else 0.0) + start + added + (ranks - 1) * rows / rate)
        experts.append(first + second + theirs * parts)
    step = max(steps)
    if ranks > links.ranks_per_node:  # hosts share no memory: collectives, one after the other with the GEMMs
        step = sum(phases) + max(experts)
    return Prediction(phases[0], max(experts), phases[1], step, tuple(experts), tuple(shares))


def _dispatch(scenario: Scenario, shares: Sequence[float], *, links: Links, device: DeviceSpec) -> float:
    shape, ranks, tokens = scenario.shape, scenario.ranks, scenario.tokens
    if scenario.way == "tp" or ranks == 1:
        return 0.0
    if scenario.way == "naive":  # counts, rows, details; each slot's row is copied before
        slots = tokens * shape.top_k
        there = to_shares(slots * (shape.hidden * _ELEMENT + _DETAIL), shares)
        return exchange_seconds(there, links, starts=3) + 2 * slots * shape.hidden * _ELEMENT / _rate(device)
    sent = tokens * (shape.hidden * _ELEMENT + shape.top_k * 8)
    copied = 3 * _KERNEL + 2 * sent / _rate(device)  # into the buffer, or padded to the capacity
    if links.by_memory(ranks, sent):
        return links.memory_latency + copied + (ranks - 1) * sent / links.memory_bandwidth
    there = to_shares(ranks * sent, [1 / ranks] * ranks)
    return copied + exchange_seconds(there, links, starts=2, gather=True)


def _combine(scenario: Scenario, shares: Sequence[float], *, links: Links, device: DeviceSpec) -> float:
    """The way back, and the sum of each token's slots."""
    shape, ranks, rate = scenario.shape, scenario.ranks, _rate(device)
    row, slots = shape.hidden * _ELEMENT, scenario.tokens * shape.top_k
    out, share = scenario.tokens * row, max(shares)
    if scenario.way == "tp":
        partial = scenario.tokens * shape.hidden * _WIDE
        local = 2 * _KERNEL + (slots * row * share + partial + partial + out) / rate
        return local + reduce_seconds(partial, ranks, links=links)
    if scenario.way == "naive":
        there = to_shares(slots * row, shares)
        back = exchange_seconds([list(column) for column in zip(*there, strict=True)], links)
        return back + PASSES * pass_seconds(scenario, device=device)
    if scenario.way == "sums":
        sums, read = ranks * out, ranks * slots * row * share
        return 2 * _KERNEL + (read + 2 * sums + out) / rate + _back(sums, ranks, links=links, rate=rate)
    read, added = slots * row, _KERNEL + (slots * row + out) / rate
    if not links.by_memory(ranks, ranks * read, most=MOST_SLOT_BYTES):
        return added + _back(ranks * read, ranks, links=links, rate=rate)
    # all that is for peers goes into the buffer; a peer reads the slots of this rank's experts alone, and writes them
    # while others are on their way
    across = read * (ranks - 1) * share  # out of the busiest rank
    copied = 2 * (ranks - 1) * read / rate + max(across / links.memory_bandwidth, 2 * read / rate)
    return added + _KERNEL + links.memory_latency + copied


def _back(num_bytes: float, ranks: int, *, links: Links, rate: float) -> float:
    """An all-to-all of rows that take so many bytes on each rank."""
    if ranks == 1:
        return 0.0
    if links.by_memory(ranks, num_bytes):
        across = num_bytes * (ranks - 1) / ranks
        return links.memory_latency + 2 * num_bytes / rate + across / links.memory_bandwidth
    return exchange_seconds(to_shares(num_bytes, [1 / ranks] * ranks), links)


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


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _cells(told: Prediction, tokens: int) -> list[str]:
    times = (told.dispatch, told.experts, told.combine, told.step)
    rate = tokens / told.step / 1e6
    return [*(f"{1e6 * seconds:.0f}" for seconds in times), f"{100 * told.communication:.0f}", f"{rate:.2f}"]


def table(name: str, tokens: int, *, ranks: Sequence[int] = RANKS, replicas: int = 32) -> str:
    """Every way with equal loads, then `naive` with Zipf's, as it is, planned, and planned with replicas: Markdown.

    `parts` is `sums` with chunks=2, on the ranks of one node.
    """
    shape = PAPER[name]
    loads = zipf_load(shape.num_experts, shape.top_k)
    head = ("ranks", "way", "loads", "busiest", "dispatch", "experts", "combine", "step", "comm. %", "M tokens/s")
    lines = [f"{name}, {tokens} tokens a rank, H100; microseconds", "", _row(head), _row(["--:"] * len(head))]
    for count in ranks:
        cases = [(way, "equal", Scenario(shape, count, tokens, way)) for way in WAYS]
        if count <= Links().ranks_per_node:
            cases.append(("parts", "equal", Scenario(shape, count, tokens, "sums", chunks=2)))
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
    parser.add_argument("--fit-naive", type=Path, help="such a CSV: print the constants of naive by it")
    given = parser.parse_args(arguments)
    from .measured import compare, fit_naive

    if given.fit_naive is not None:
        print("\n".join(f"{name} = {value:.3g}" for name, value in fit_naive(given.fit_naive).items()))
        return
    if given.compare is None:
        print(table(given.shape, given.tokens, ranks=given.ranks, replicas=given.replicas))
        return
    for one in compare(given.compare):
        where = f"{one.shape:8} {one.tokens:6} {one.way:10} {one.phase:8}"
        print(f"{where} measured {one.measured:9.1f}  predicted {one.predicted:9.1f}  ratio {one.ratio:.2f}")


if __name__ == "__main__":
    main()
