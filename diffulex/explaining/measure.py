"""Which stage of which layer took how long, by torch's profiler.

Generated kernels are called after the ops in them, and identical layers share them; so the launches of all layers that
name a stage, in the order of time, belong to the decisions about that stage in the order of their graph.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lowering.errors import MoEUnsupportedError
from lowering.report import OWN_KERNEL, Decision

RUNS, WARM_UP = 5, 2
# where a kernel does more than one stage, the time is that of the first of these
_STAGES = ("moe_expert_up", "moe_expert_down", "moe_dispatch", "moe_route", "moe_combine")
_NAMES = re.compile("|".join(_STAGES))


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel on the device, or one call of an op on the host: its time is that of its kernels, if it has any."""

    name: str
    start: float
    microseconds: float
    is_kernel: bool


def check_measurable(*, training: bool) -> None:
    """Raise `MoEUnsupportedError` for what cannot be measured."""
    if training:
        raise MoEUnsupportedError.of(
            "explain(measure=True)",
            expected="a model in inference",
            got="one in training",
            hint="Call model.eval(), or explain inside torch.no_grad().",
        )


def measured(call: Callable[[], Any], decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions with the median time of each lowered stage over a few calls of what was compiled.

    A stage whose launches cannot be told apart keeps no time; if that is all of them, it is `MoEUnsupportedError`.
    """
    launches = profile(call)
    told = attribute(launches, decisions, runs=RUNS)
    if all(decision.measured_us is None for decision in told):
        raise MoEUnsupportedError.of(
            "explain(measure=True)",
            expected="calls of diffulex's ops, or kernels named after them, in what the profiler saw",
            got=f"{len(launches)} ops and kernels, none of them of a MoE layer that was captured",
            hint="Call diffulex.explain without measure to see what became of the layers.",
        )
    return told


def profile(call: Callable[[], Any]) -> list[Launch]:
    """What the profiler sees of `RUNS` calls after a few that it does not look at."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    on_cuda = torch.cuda.is_available()
    synchronize = torch.cuda.synchronize if on_cuda else lambda: None
    for _ in range(WARM_UP):
        call()
    synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with torch_profile(activities=activities) as profiler:
        for _ in range(RUNS):
            call()
            synchronize()
    return [_launch(event) for event in profiler.events()]


def _launch(event: Any) -> Launch:
    is_kernel = event.device_type != torch.autograd.DeviceType.CPU
    own = event.time_range.elapsed_us()
    return Launch(event.name, event.time_range.start, own if is_kernel else event.device_time_total or own, is_kernel)


def _stage_of_kernel(name: str) -> str | None:
    """The stage of a kernel that Inductor generated; those of the ops themselves are named otherwise."""
    found = set(_NAMES.findall(name)) if name.startswith("triton_") else set()
    return next((stage for stage in _STAGES if stage in found), None)


def attribute(launches: Sequence[Launch], decisions: Sequence[Decision], *, runs: int) -> list[Decision]:
    """The decisions with the times of these launches of `runs` equal calls; where they do not come out even, none."""
    told = list(decisions)
    for stage in _STAGES:
        mine = [i for i, d in enumerate(decisions) if d.stage == "lower" and d.subject == stage]
        own = [i for i in mine if decisions[i].outcome == OWN_KERNEL]
        generated = [i for i in mine if i not in own]
        calls = [one for one in launches if not one.is_kernel and one.name == f"diffulex::{stage}"]
        kernels = [one for one in launches if one.is_kernel and _stage_of_kernel(one.name) == stage]
        for places, times in ((own, calls), (generated, kernels)):
            for place, microseconds in zip(places, _medians(times, len(places), runs), strict=False):
                told[place] = dataclasses.replace(told[place], measured_us=microseconds)
    return told


def _medians(launches: Sequence[Launch], places: int, runs: int) -> list[float]:
    """The time of each place in a call; nothing where the launches are no multiple of places and runs."""
    if not places or not launches or len(launches) % (places * runs):
        return []
    times = [one.microseconds for one in sorted(launches, key=lambda one: one.start)]
    size = len(times) // (places * runs)
    sums = [sum(times[at : at + size]) for at in range(0, len(times), size)]
    return [statistics.median(sums[place::places]) for place in range(places)]
