"""Which generated kernel does which stage of which layer.

Kernels are called after the ops in them, and identical layers share them; so the launches of all layers that name a
stage, in their order, belong to the decisions about that stage in the order of their graph.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TypeVar

from lowering.report import OWN_KERNEL, Decision

# where a kernel does more than one stage, it is counted to the first of these
STAGES = ("moe_expert_up", "moe_expert_down", "moe_dispatch", "moe_route", "moe_combine")
_NAMES = re.compile("|".join(STAGES))
_IN_GLUON = re.compile(r"_(\w+)_[0-9a-f]{8}(_unread)?_kernel")  # the ops' own are called so, too, but in eager mode
_T = TypeVar("_T")


def stage_of_kernel(name: str) -> str | None:
    """The stage of a kernel that Inductor generated, or that its code calls; other kernels are named otherwise."""
    ours = name.startswith("triton_") or _IN_GLUON.fullmatch(name)
    found = set(_NAMES.findall(name)) if ours else set()
    return next((stage for stage in STAGES if stage in found), None)


def places(decisions: Sequence[Decision], stage: str, *, own: bool) -> list[int]:
    """Where the decisions are by which a stage got a generated kernel, or its op's own one."""
    lowered = (i for i, decision in enumerate(decisions) if decision.stage == "lower" and decision.subject == stage)
    lowered = (i for i in lowered if not decisions[i].outcome.startswith("in the kernel of "))
    return [i for i in lowered if (decisions[i].outcome == OWN_KERNEL) is own]


def shares(launches: Sequence[_T], count: int) -> list[list[_T]]:
    """Equal parts of the launches, in order; nothing where they do not come out even."""
    if not count or not launches or len(launches) % count:
        return []
    size = len(launches) // count
    return [list(launches[at : at + size]) for at in range(0, len(launches), size)]


def named(decisions: Sequence[Decision], launched: Sequence[str]) -> list[Decision]:
    """The decisions with the names of their kernels, out of those that the generated code launches, in order."""
    told = list(decisions)
    for stage in STAGES:
        at = []
        for place in places(decisions, stage, own=False):
            language, kernel, *_ = f"{decisions[place].outcome} ".split(" ")
            if language == "gluon":  # the code calls it by an op, so it is not among the launches
                told[place] = dataclasses.replace(told[place], kernels=(f"_{kernel}_kernel",))
            else:
                at.append(place)
        mine = [name for name in launched if stage_of_kernel(name) == stage]
        for place, names in zip(at, shares(mine, len(at)), strict=False):
            told[place] = dataclasses.replace(told[place], kernels=tuple(dict.fromkeys(names)))
    return told
