"""What the ranks of a group must agree on, compared when a layer is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import distributed
from torch.distributed import ProcessGroup

from lowering.errors import MoEParallelError


def flat_fields(value: Any, prefix: str = "") -> dict[str, str]:
    """The fields of nested dataclasses by dotted name, `{"routing.top_k": "2"}`."""
    if not dataclasses.is_dataclass(value):
        return {prefix: repr(value)}
    found: dict[str, str] = {}
    for field in dataclasses.fields(value):
        found |= flat_fields(getattr(value, field.name), f"{prefix}.{field.name}".lstrip("."))
    return found


def told_by_ranks(group: ProcessGroup, value: Any) -> list[Any]:
    """What every rank of the group says, in their order; each has to call it."""
    told: list[Any] = [None] * group.size()
    distributed.all_gather_object(told, value, group=group)
    return told


def check_agreement(where: str, group: ProcessGroup, *, fields: Mapping[str, str], problem: str | None = None) -> None:
    """Raise `MoEParallelError` on every rank of the group where a field differs, naming it, its values and the ranks.

    problem: why this rank cannot go on; the other ranks then raise with it, instead of waiting for this one.
    Every rank of the group must call it. Ranks are numbered as in the whole job.
    """
    told = told_by_ranks(group, (dict(fields), problem))
    ranks = distributed.get_process_group_ranks(group)
    failed = {rank: reason for rank, (_, reason) in zip(ranks, told, strict=True) if reason is not None}
    if failed:
        raise MoEParallelError.of(
            where,
            expected="a layer that every rank can make",
            got="; ".join(f"on rank {rank}: {reason}" for rank, reason in failed.items()),
            hint="See the error of that rank.",
        )
    differing = []
    for name in sorted({name for theirs, _ in told for name in theirs}):
        by_value: dict[str, list[int]] = {}
        for rank, (theirs, _) in zip(ranks, told, strict=True):
            by_value.setdefault(theirs.get(name, "absent"), []).append(rank)
        if len(by_value) > 1:
            values = (f"{value} on rank{'s'[: len(who) > 1]} {_listed(who)}" for value, who in by_value.items())
            differing.append(f"{name} {', '.join(values)}")
    if differing:
        raise MoEParallelError.of(
            where,
            expected=f"the same layer on the ranks {_listed(ranks)}",
            got="; ".join(differing),
            hint="Give every rank the same config.",
        )


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
