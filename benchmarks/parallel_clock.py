"""Times of calls that all ranks of a group make together: of CUDA graphs, or beside a probe of the host."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from diffulex.distributed.agreement import told_by_ranks

PROBE = 64  # ops


class RankClock:
    """One rank's clock; every rank of the group times the same calls."""

    def __init__(self, device: torch.device, group: distributed.ProcessGroup) -> None:
        self.device, self.group, self.cuda = device, group, device.type == "cuda"

    def time(self, function: Callable[..., Any], *args: Any, tokens: int, graph: bool = True) -> float:
        """Median microseconds of a call on the slowest rank; as many calls on each."""
        return self._slowest(self._samples(functools.partial(function, *args), tokens, graph=graph)[0])

    def beside_host(self, function: Callable[..., Any], *args: Any, tokens: int) -> tuple[float, float]:
        """What `time` tells of a call without a graph, and the probe of the host in turns with it."""
        seconds, probes = self._samples(functools.partial(function, *args), tokens, graph=False)
        return self._slowest(seconds), self._slowest(probes)

    def _samples(self, call: Callable[[], Any], tokens: int, *, graph: bool) -> tuple[list[float], list[float]]:
        """Seconds of a call, and without a graph those of the probe, one after the other in each round."""
        calls, rounds = (20, 9) if tokens <= 256 else (8, 7) if tokens <= 2048 else (3, 5)
        if not self.cuda:
            rounds = 3
        elif not graph:
            rounds *= 3  # the host is less steady than the device
        seconds, probes = [], []
        with torch.no_grad():
            for _ in range(3):
                call()
            if self.cuda:
                torch.cuda.synchronize()
                distributed.barrier(self.group)
                run = self._captured(call) if graph else call
            for _ in range(rounds):
                if not graph:
                    probes.append(self._probe())
                seconds.append(self._evented(run, calls) if self.cuda else _clocked(call))
        if self.cuda:
            del run
            gc.collect()
            torch.cuda.empty_cache()
        return seconds, probes

    def _slowest(self, seconds: list[float]) -> float:
        return 1e6 * max(told_by_ranks(self.group, statistics.median(seconds)))

    def _captured(self, call: Callable[[], Any]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # other threads of the process, as NCCL's watchdog, may ask the device while this one captures
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
        for _ in range(2):
            graph.replay()
        return graph.replay

    def _evented(self, run: Callable[[], object], calls: int) -> float:
        distributed.barrier(self.group)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        run()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    def _probe(self) -> float:
        """Seconds in which the host issues `PROBE` small ops: the median of five times."""
        eight, seconds = torch.zeros(8, device=self.device), []
        for _ in range(5):
            if self.cuda:
                torch.cuda.synchronize()
            seconds.append(_clocked(lambda: [eight.add_(1) for _ in range(PROBE)]))
        return statistics.median(seconds)


def _clocked(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
