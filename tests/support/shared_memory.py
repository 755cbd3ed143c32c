"""Stand-ins for torch's symmetric memory on a CPU: ranks as threads of this process, or as gloo processes."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from diffulex.distributed.agreement import told_by_ranks
from diffulex.distributed.symmetric import Workspace
from lowering.errors import Reason

POISON = 0xA5
_PATIENCE = 20


class _Handle:
    """Buffers of bytes, one a rank. Holds its user to the order of an exchange: peers are read after an odd number of
    barriers only, and what lies in the own buffer is gone after an even one. A call in parts has `of_call` of them
    instead of two: its own buffer is gone after the last, and peers are read after the first."""

    def __init__(self, rank: int, buffers: Sequence[Tensor], wait: Callable[[], Any], *, of_call: int = 2) -> None:
        self.rank, self.world_size, self.buffers, self._wait = rank, len(buffers), buffers, wait
        self.barriers, self.of_call = 0, of_call

    def get_buffer(self, rank: int, sizes: Any, *, dtype: torch.dtype, storage_offset: int | None = 0) -> Tensor:
        assert rank == self.rank or self.barriers % self.of_call > 0, "a peer's buffer outside of the barriers"
        start = (storage_offset or 0) * dtype.itemsize
        count = torch.Size(sizes).numel() * dtype.itemsize
        assert start + count <= self.buffers[rank].numel()
        return self.buffers[rank][start : start + count].view(dtype).view(tuple(sizes))

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        self._wait()
        self.barriers += 1
        if self.barriers % self.of_call == 0:
            self.buffers[self.rank].fill_(POISON)


def on_threads(size: int, num_bytes: int, function: Callable[[Workspace], Any], *, of_call: int = 2) -> list[Any]:
    """function(workspace) of each rank, every rank a thread, the first one this; their results in order."""
    buffers = [torch.full((num_bytes,), POISON, dtype=torch.uint8) for _ in range(size)]
    barrier = threading.Barrier(size, timeout=_PATIENCE)
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        try:
            space = Workspace(_Handle(rank, buffers, barrier.wait, of_call=of_call), num_bytes, key=f"threads/{rank}")
            results[rank] = function(space), space.handle.barriers  # type: ignore[attr-defined]
        except BaseException as error:
            barrier.abort()
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    assert all(count % of_call == 0 for _, count in results), "an exchange was left open"
    return [result for result, _ in results]


def workspace_of_processes(
    group: ProcessGroup, device_type: str, *, num_bytes: int, of_call: int = 2
) -> Workspace | Reason:
    """In the place of `workspace_for`: a file for each rank, mapped by all."""
    with tempfile.TemporaryDirectory() as own:  # files that are mapped stay until nobody has them any more
        folder = told_by_ranks(group, own)[0]
        buffers = [
            torch.from_file(str(Path(folder) / str(rank)), shared=True, size=num_bytes, dtype=torch.uint8)
            for rank in range(group.size())
        ]
        distributed.barrier(group)
    handle = _Handle(group.rank(), buffers, lambda: distributed.barrier(group), of_call=of_call)
    return Workspace(handle, num_bytes, key=f"{group.group_name}/{Path(folder).name}", group=group)
