"""Processes of a gloo or NCCL group that stay: started once for many cases, each told what to run through a pipe."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE = 120  # seconds that a case may take before the group counts as stuck
# Imported once, in the process that the ranks are forked from; it runs nothing else, so it has no threads.
_PRELOAD = ["torch", "torch._dynamo", "torch._functorch.aot_autograd", "tests.support.rank_cases"]


class RankError(AssertionError):
    """A case failed on a rank; the message holds the traceback of each that did."""


def _serve(pipe: Connection, rank: int, size: int, store: str, backend: str, timeout: float) -> None:
    import torch
    import torch._inductor.config
    from torch import distributed

    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # no pool of compilers for each rank
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    distributed.destroy_process_group()


class Ranks:
    """A group of processes that runs functions of importable modules."""

    def __init__(self, size: int, store: Path, backend: str = "gloo", timeout: float = PATIENCE / 2) -> None:
        self.size = size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, size, str(store), backend, timeout), daemon=True
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(rank, *args) on every rank at once; the results by rank, or `RankError`."""
        for pipe in self.pipes:
            pipe.send((function, args))
        told = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE):
                self.stop()
                raise RankError(f"rank {rank} did not answer within {PATIENCE} s")
            told.append(pipe.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(told) if not good]
        if failed:
            raise RankError("\n".join(failed))
        return [result for _, result in told]

    def run_without(self, lost: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(rank, *args) on every rank, of which one gives no answer; those of the others. All end with it."""
        for pipe in self.pipes:
            pipe.send((function, args))
        told = [pipe.recv() for rank, pipe in enumerate(self.pipes) if rank != lost and pipe.poll(PATIENCE)]
        for process in self.processes:
            process.kill()
        assert all(good for good, _ in told), told
        return [result for _, result in told]

    def stop(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def running(size: int, backend: str = "gloo", *, timeout: float = PATIENCE / 2) -> Iterator[Ranks]:
    """`size` processes for the time of the block, with "nccl" each on a GPU of its own."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(size, Path(folder) / "store", backend, timeout)
        try:
            yield ranks
        finally:
            ranks.stop()
