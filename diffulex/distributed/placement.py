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

    With replicas, experts on several ranks, a slot goes to one of these: see `ranks_of`. `plan_placement` makes them.
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
        """Raise `MoEParallelError` unless every expert has a rank, none twice the same, and every rank an expert."""
        where = "ExpertPlacement"
        if len(self.owned) != num_ranks or not all(self.owned):
            raise MoEParallelError.of(
                where,
                expected=f"at least one expert for each of {num_ranks} ranks",
                got=f"{[len(experts) for experts in self.owned]} experts",
                hint="Use a smaller group, or name the experts of each rank in order.",
            )
        twice = any(len({*experts}) < len(experts) for experts in self.owned)
        if twice or {expert for experts in self.owned for expert in experts} != {*range(num_experts)}:
            raise MoEParallelError.of(
                where,
                expected=f"each expert of {num_experts} on a rank, and on none twice",
                got=str(self.owned)[:120],
                hint="Copies of an expert go to ranks of their own.",
            )

    def ranks_of(self, num_experts: int, rank: int) -> list[tuple[int, ...]]:
        """The ranks that slots from `rank` may go to, for each expert: that rank itself where it holds the expert, else
        all that do, which its tokens take in turn; (-1,) behind them for what is no expert. Raises as `check`.

        Ranks without the expert begin with one copy after the other. So where ranks have as many tokens for it, each
        copy gets as many, within c / 2 for c copies: 1 + (R - c) / c of R ranks'.
        """
        self.check(num_experts, len(self.owned))
        turns = []
        for expert in range(num_experts):
            ranks = tuple(r for r, experts in enumerate(self.owned) if expert in experts)
            first = (rank - sum(r < rank for r in ranks)) % len(ranks)  # by its number among those without a copy
            turns.append((rank,) if rank in ranks else ranks[first:] + ranks[:first])
        return [*turns, (-1,)]

    def rows_of(self, num_experts: int) -> list[list[int]]:
        """The row of each expert in the weights of each rank; -1 where it has none, and behind them for what is none.

        Raises as `check`.
        """
        self.check(num_experts, len(self.owned))
        tables = [[-1] * (num_experts + 1) for _ in self.owned]
        for table, experts in zip(tables, self.owned, strict=True):
            for row, expert in enumerate(experts):
                table[expert] = row
        return tables
