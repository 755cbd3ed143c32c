"""What is measured of one callable: time per call, what Dynamo did, kernels on the device."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .progress import progress

_TIMED_SECONDS, _FEWEST_CALLS, _MOST_CALLS = 0.3, 5, 50


@dataclasses.dataclass(frozen=True)
class DynamoCounts:
    """Graphs that were compiled, graph breaks by reason, and compilations that repeat one of the same code.

    pieces: frames that have graphs of their own. Where one function was compiled, more than one of them without a break
    means that Dynamo gave up a frame and went on with those that it calls.
    """

    graphs: int
    break_reasons: tuple[tuple[str, int], ...]
    recompiles: int
    pieces: int = 1

    @property
    def breaks(self) -> int:
        """Number of graph breaks."""
        return sum(count for _, count in self.break_reasons)


def start_compiler(device: torch.device) -> None:
    """Compile something small, so that what Inductor does once a machine or process falls on none that is timed:
    precompiled C++ headers, worker processes.
    """
    with progress("starting the compiler", 1), torch.no_grad():
        torch.compile(lambda x: x.sin().softmax(-1))(torch.ones(64, 64, device=device))


def reset_dynamo() -> None:
    """Forget all compiled code and all counts of this process."""
    import torch._dynamo
    from torch._dynamo.utils import clear_compilation_metrics, counters

    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()


def dynamo_counts() -> DynamoCounts:
    """What Dynamo did since `reset_dynamo`."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    # compile ids read frame/attempt: the attempts after the first are recompilations
    known = [metrics for metrics in get_compilation_metrics() if metrics.compile_id is not None]
    again = {str(metrics.compile_id) for metrics in known}
    recompiles = sum(not compile_id.endswith("/0") for compile_id in again)
    breaks = tuple(sorted(counters["graph_break"].items()))
    pieces = {str(metrics.compile_id).partition("/")[0] for metrics in known if metrics.graph_op_count}
    return DynamoCounts(int(counters["stats"]["unique_graphs"]), breaks, recompiles, max(len(pieces), 1))


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call that has run before, the device's work included."""
    times: list[float] = []
    while len(times) < _FEWEST_CALLS or (sum(times) < _TIMED_SECONDS and len(times) < _MOST_CALLS):
        _synchronize()
        started = time.perf_counter()
        call()
        _synchronize()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def device_kernels(call: Callable[[], Any]) -> int:
    """Kernels, copies and fills that one call puts on the CUDA device, counted by torch.profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        call()
    _synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        _synchronize()
    events = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    return sum(not getattr(event, "is_user_annotation", False) for event in events)
