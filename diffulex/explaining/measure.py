"""Which stage of which layer took how long, by torch's profiler."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lowering.errors import MoEUnsupportedError
from lowering.report import Decision

from .kernels import STAGES, places, shares, stage_of_kernel

RUNS, WARM_UP = 5, 2


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
    with torch_profile(activities=activities, acc_events=True) as profiler:
        for _ in range(RUNS):
            call()
            synchronize()
    return [_launch(event) for event in profiler.events()]


def _launch(event: Any) -> Launch:
    is_kernel = event.device_type != torch.autograd.DeviceType.CPU
    own = event.time_range.elapsed_us()
    return Launch(event.name, event.time_range.start, own if is_kernel else event.device_time_total or own, is_kernel)


def attribute(launches: Sequence[Launch], decisions: Sequence[Decision], *, runs: int) -> list[Decision]:
    """The decisions with the times of these launches of `runs` equal calls; where they do not come out even, none."""
    told = list(decisions)
    for stage in STAGES:
        calls = [one for one in launches if not one.is_kernel and one.name == f"diffulex::{stage}"]
        kernels = [one for one in launches if one.is_kernel and stage_of_kernel(one.name) == stage]
        for own, mine in ((True, calls), (False, kernels)):
            at = places(decisions, stage, own=own)
            for place, microseconds in zip(at, _medians(mine, len(at), runs), strict=False):
                told[place] = dataclasses.replace(told[place], measured_us=microseconds)
    return told


def _medians(launches: Sequence[Launch], count: int, runs: int) -> list[float]:
    """The time of each of `count` places in a call; nothing where the launches cannot be told apart."""
    ordered = sorted(launches, key=lambda one: one.start)
    sums = [sum(one.microseconds for one in share) for share in shares(ordered, count * runs)]
    return [statistics.median(sums[place::count]) for place in range(count)] if sums else []
