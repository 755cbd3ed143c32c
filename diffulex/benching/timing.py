"""Round-robin medians: of CUDA graphs on a GPU, by the wall clock on a CPU."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

_WARM_UP_ROUNDS = 2
Name = TypeVar("Name")


def capture(
    function: Callable[..., object], inputs: Sequence[tuple[Any, ...]], *, pool: Any = None
) -> torch.cuda.CUDAGraph:
    """A CUDA graph that calls `function` once for each input set, a tuple of tensors [...] of any dtype.

    pool: the memory of graphs whose results nobody reads, so that they may have it one after the other.
    """
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(2):
            function(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, pool=pool):
        for one in inputs:
            function(*one)
    return graph


def round_robin(
    graphs: Mapping[Name, torch.cuda.CUDAGraph], calls: int, *, rounds: int = 15, alone: float = 0.0
) -> dict[Name, float]:
    """Median microseconds per call of each graph, replayed in turn so that all see the same clocks.

    The order is another one in each round, the same in each run: after a graph that draws little power the next one
    finds higher clocks, which was worth 15 % of what takes some milliseconds. alone: seconds for which a graph is
    replayed before each of its samples, so that at the power cap it has the clocks that itself leaves.
    """
    samples: dict[Name, list[float]] = {name: [] for name in graphs}
    shuffled, names = random.Random(0), list(graphs)
    for _ in range(rounds):
        shuffled.shuffle(names)
        for name in names:
            began = time.perf_counter()
            while time.perf_counter() - began < alone:
                graphs[name].replay()
                torch.cuda.synchronize()
            samples[name].append(1e6 * _event_seconds(graphs[name].replay) / calls)
    return {name: statistics.median(values[_WARM_UP_ROUNDS:]) for name, values in samples.items()}


def wall_clock(
    calls: Mapping[str, Sequence[Callable[[], object]]], *, rounds: int = 500, fewest: int = 3, seconds: float = 5.0
) -> dict[str, float]:
    """Median microseconds per call. Each name has a call for each input set; a round makes one of each name.

    The first round is not counted. Rounds begin with another name each time, so that none always finds the caches as
    the same neighbour left them. After `fewest` counted rounds, no further one begins past `seconds`.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, began = list(calls), time.perf_counter()
    for number in range(rounds + 1):
        if number > fewest and time.perf_counter() - began > seconds:
            break
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            call = calls[name][number % len(calls[name])]
            started = time.perf_counter()
            call()
            if number:
                samples[name].append(1e6 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in samples.items()}


def call_seconds(function: Callable[[], object], *, device: torch.device, repeats: int = 7) -> list[float]:
    """Seconds of each of several calls, after one that does not count."""
    once = _event_seconds if device.type == "cuda" else _clock_seconds
    function()
    return [once(function) for _ in range(repeats)]


def _event_seconds(function: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3


def _clock_seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
