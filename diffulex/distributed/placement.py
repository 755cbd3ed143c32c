"""Which rank owns which experts, and which part of a width."""

from __future__ import annotations

import dataclasses
import itertools

from lowering.errors import MoEParallelError


def even_shares(total: int, parts: int) -> tuple[tuple[int, int], ...]:
    """`total` things in `parts` consecutive runs (start, stop) whose sizes differ by at most one, larger ones first."""
    share, rest = divmod(total, parts)
    starts = [rank * share + min(rank, rest) for rank in range(parts + 1)]
    return tuple(itertools.pairwise(starts))


@dataclasses.dataclass(frozen=True)
class ExpertPlacement:
    """The experts of each rank of a group, `owned[rank]`, in the order of the rows of its weights.

    One with replicas, experts on several ranks, is for planning alone (`plan_placement`): layers refuse it in `check`.
    """

    owned: tuple[tuple[int, ...], ...]

    @classmethod
    def even(cls, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """Consecutive experts, as many on each rank; where that does not divide, the first ranks own one more."""
        return cls(tuple(tuple(range(start, stop)) for start, stop in even_shares(num_experts, num_ranks)))

    @property
    def replicas(self) -> dict[int, tuple[int, ...]]:
        """The ranks of each expert that has several, by expert."""
        ranks: dict[int, list[int]] = {}
        for rank, experts in enumerate(self.owned):
            for expert in experts:
                ranks.setdefault(expert, []).append(rank)
        return {expert: tuple(where) for expert, where in sorted(ranks.items()) if len(where) > 1}

    def check(self, num_experts: int, num_ranks: int) -> None:
        """Raise `MoEParallelError` unless every expert has one rank, and every rank at least one expert."""
        where = "ExpertPlacement"
        if len(self.owned) != num_ranks or not all(self.owned):
            raise MoEParallelError.of(
                where,
                expected=f"at least one expert for each of {num_ranks} ranks",
                got=f"{[len(experts) for experts in self.owned]} experts",
                hint="Use a smaller group, or name the experts of each rank in order.",
            )
        if sorted(expert for experts in self.owned for expert in experts) != list(range(num_experts)):
            raise MoEParallelError.of(
                where,
                expected=f"each expert of {num_experts} on one rank",
                got=str(self.owned)[:120],
                hint="Replicas of an expert are not supported.",
            )

    def rank_of(self, num_experts: int) -> list[int]:
        """The rank of each expert, and -1 behind them for what is none; raises as `check`."""
        self.check(num_experts, len(self.owned))
        ranks = [-1] * (num_experts + 1)
        for rank, experts in enumerate(self.owned):
            for expert in experts:
                ranks[expert] = rank
        return ranks

    def row_of(self, num_experts: int) -> list[int]:
        """The row of each expert in the weights of its rank, and -1 behind them for what is none; raises as `check`."""
        self.check(num_experts, len(self.owned))
        rows = [-1] * (num_experts + 1)
        for experts in self.owned:
            for row, expert in enumerate(experts):
                rows[expert] = row
        return rows
