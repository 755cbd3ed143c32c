"""`plan_placement`: experts spread over ranks by what each had to do, the busiest ones on several ranks.

After DeepSeek's load balancer: replicas for the experts with the most to do, then as much as possible the same load for
every rank, with as many rows of weights on each. Replicas of an expert are taken to share its load equally.

Why the bound of `plan_placement` holds. Let p be the largest share of one replica. In both ways of spreading below the
loads of any two ranks a and b differ by at most p; so R * max - total <= (R - 1) * p. Experts that both hold add the
same to both and are left out. Shares come in falling order: a_1, a_2, .. to a and b_1, b_2, .. to b, where the numbers
differ by at most one.

- `_dealt`: for a before b, a_1 >= b_1 >= a_2 >= b_2 .., so the difference lies between 0 and a_1.
- `_packed`: a share goes to a while b has room only if a has no more load than b by then. Take the last a_j that came
  when b had fewer than j - 1 shares (or j = 1): b had room, as it had fewer than a, so a_1 + .. + a_(j-1) is at most
  b_1 + .. + b_(j-1). Each later a_i came when b had at least i - 1, so a_i <= b_(i-1). Together: a's load is at most
  b's and a_j, which is at most p.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

from lowering.errors import MoERangeError
from lowering.report import logger

from .placement import ExpertPlacement


@dataclasses.dataclass(frozen=True)
class PlacementPlan:
    """A placement, and the load of each rank that the counts predict for it; `str()` is a report.

    placement  what `ParallelConfig(placement=...)` takes
    before     load of each rank under `ExpertPlacement.even`, exact
    after      load of each rank under `placement`, exact
    bound      what `max(after)` is at most, whatever the counts are; see `plan_placement`
    """

    placement: ExpertPlacement
    before: tuple[Fraction, ...]
    after: tuple[Fraction, ...]
    bound: Fraction

    @property
    def mean(self) -> Fraction:
        """The mean load of a rank, the same under every placement."""
        return sum(self.after, Fraction()) / len(self.after)

    def _most(self, loads: tuple[Fraction, ...]) -> str:
        most = max(loads)
        return f"{float(most):.1f}" + (f" ({float(most / self.mean):.2f} x mean)" if self.mean else "")

    def __str__(self) -> str:
        none_better = "no better was found" if any(self.before) else "every load is 0, nothing was counted"
        replicas, changed = self.placement.replicas, self.placement != _even(self.placement)
        lines = [
            f"load of a rank: mean {float(self.mean):.1f}, bound {float(self.bound):.1f}",
            f"  before: max {self._most(self.before)}",
            f"  after:  max {self._most(self.after)}" + ("" if changed else f", the even placement: {none_better}"),
            "replicas: " + ("" if replicas else "none"),
        ]
        lines += [f"  expert {expert} on ranks {_listed(ranks)}" for expert, ranks in replicas.items()]
        lines.append("ranks:")
        for rank, (experts, load) in enumerate(zip(self.placement.owned, self.after, strict=True)):
            lines.append(f"  {rank}: load {float(load):.1f}, experts {_listed(experts)}")
        return "\n".join(lines)


def plan_placement(load_E: Sequence[float], num_ranks: int, *, replicas: int = 0) -> PlacementPlan:
    """Spread experts over ranks by their loads, e.g. `ExpertLoad.snapshot()`, E finite numbers >= 0.

    Where all are 0, as if nothing was counted, the even placement is kept, and a warning says so.

    replicas  rows of weights beyond one for each expert; they go one by one to the expert whose replicas have the
              largest share, on a rank each. Layers with replicas are for inference.

    All E + replicas rows, the largest share first, go each to the least loaded rank that has room and does not hold
    the expert, with as many rows on each rank (or one more on some, where that does not divide). If the room left is
    on too few ranks, they are dealt out in turn instead. Ties go to the smaller index, so equal loads give
    equal plans. The even placement, without replicas, is kept where this is not better.

    With R ranks and p the largest share of one replica: max <= mean + (1 - 1/R) * p, `bound`. As no choice of as many
    replicas has a smaller p, that is at most 2 - 1/R times the least possible; the module says why.

    Raises `MoERangeError` for a load or a number of replicas that cannot be, `MoEParallelError` for fewer experts than
    ranks.
    """
    loads = [_exact(expert, load) for expert, load in enumerate(load_E)]
    _check_counts(len(loads), num_ranks, replicas)
    even = ExpertPlacement.even(len(loads), num_ranks)
    even.check(len(loads), num_ranks)
    if not any(loads):
        logger.warning("plan_placement: every load is 0, so the even placement is kept: was anything counted?")
    counts = _replica_counts(loads, num_ranks, replicas)
    shares = [load / count for load, count in zip(loads, counts, strict=True)]
    order = sorted(range(len(loads)), key=lambda expert: (-shares[expert], expert))
    copies = [(expert, counts[expert]) for expert in order]
    spread = _packed(copies, num_ranks, shares=shares) or _dealt(copies, num_ranks)
    found = ExpertPlacement(tuple(tuple(sorted(experts)) for experts in spread))
    before, after = rank_loads(even, loads), rank_loads(found, loads)
    if max(before) <= max(after):
        found, after = even, before
    mean = sum(loads, Fraction()) / num_ranks
    return PlacementPlan(found, before, after, bound=mean + (1 - Fraction(1, num_ranks)) * max(shares))


def rank_loads(placement: ExpertPlacement, load_E: Sequence[float | Fraction]) -> tuple[Fraction, ...]:
    """The load of each rank, exact, where the replicas of an expert share its load, one of E numbers, equally."""
    counts = {expert: len(ranks) for expert, ranks in placement.replicas.items()}
    shares = [_exact(expert, load) / counts.get(expert, 1) for expert, load in enumerate(load_E)]
    return tuple(sum((shares[expert] for expert in experts), Fraction()) for experts in placement.owned)


def _replica_counts(loads: list[Fraction], num_ranks: int, replicas: int) -> list[int]:
    """How often each expert is held, at most once a rank, so that the largest share is the least possible."""
    counts = [1] * len(loads)
    if num_ranks == 1:
        return counts
    heap = [(-load, 1, expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(replicas):
        _, count, expert = heapq.heappop(heap)
        counts[expert] = count + 1
        if count + 1 < num_ranks:
            heapq.heappush(heap, (-loads[expert] / (count + 1), count + 1, expert))
    return counts


def _packed(copies: list[tuple[int, int]], num_ranks: int, *, shares: list[Fraction]) -> list[list[int]] | None:
    """All replicas (expert, count) to the least loaded ranks that have room; None where that is on too few ranks."""
    rows, extra = divmod(sum(count for _, count in copies), num_ranks)  # extra: ranks that may still take one more
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [Fraction()] * num_ranks
    for expert, count in copies:
        left = count
        for rank in sorted(range(num_ranks), key=lambda rank: (loads[rank], rank)):
            if left and len(held[rank]) < rows + (extra > 0):
                extra -= len(held[rank]) == rows
                held[rank].append(expert)
                loads[rank] += shares[expert]
                left -= 1
        if left:
            return None
    return held


def _dealt(copies: list[tuple[int, int]], num_ranks: int) -> list[list[int]]:
    """All replicas (expert, count) to the ranks in turn: those of an expert, no more than ranks, to different ones."""
    rows = [expert for expert, count in copies for _ in range(count)]
    return [rows[rank::num_ranks] for rank in range(num_ranks)]


def _even(placement: ExpertPlacement) -> ExpertPlacement:
    experts = {expert for owned in placement.owned for expert in owned}
    return ExpertPlacement.even(len(experts), len(placement.owned))


def _exact(expert: int, load: float | Fraction) -> Fraction:
    if not math.isfinite(load) or load < 0:
        raise MoERangeError.of(
            "plan_placement",
            expected="finite loads >= 0",
            got=f"{load} for expert {expert}",
            hint="Pass what ExpertLoad.snapshot() returns.",
        )
    return Fraction(load)


def _check_counts(num_experts: int, num_ranks: int, replicas: int) -> None:
    if num_ranks < 1:
        raise MoERangeError.of(
            "plan_placement", expected="at least one rank", got=str(num_ranks), hint="Pass the size of the group."
        )
    most = num_experts * (num_ranks - 1)
    if not 0 <= replicas <= most:
        raise MoERangeError.of(
            "plan_placement",
            expected=f"0 to {most} replicas of {num_experts} experts on {num_ranks} ranks",
            got=str(replicas),
            hint="No rank holds an expert twice.",
        )


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
