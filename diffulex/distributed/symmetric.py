"""Exchanges of static shapes through memory that the ranks of one host read from one another.

A `Workspace` is a buffer of torch's symmetric memory on each rank. An exchange is a write into the own buffer, a
barrier, a copy out of the buffers of all ranks, and another barrier: no host, no sizes that depend on data. Of the
results of slots a rank copies those alone that it has a use for, each by its address in the memory of a peer.

Why that is right. The first barrier comes after every rank's write, so what is read is there. The second comes after
every rank's reads, so whatever follows may write again. Each exchange is whole in itself: the buffer is free before it
and after it. Hence all layers share one; a CUDA graph may hold any number of exchanges and be replayed in any order
with others, as nothing alternates between calls; and a `dispatch` without its `combine` leaves nothing behind. (Two
buffers in turn would save the second barrier, but which one comes next would be settled when a graph is captured, not
when it is replayed.) As with any collective, ranks make the same exchanges in the same order, and those of one group
come one after the other: a caller that runs layers on several streams has to order these streams. A barrier is a kernel
on the current stream, released and acquired at the scope of the system, so the writes before it are seen after it.

Nothing here uses NVLink multicast.
"""

from __future__ import annotations

import importlib.util
import math
import socket
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lowering.errors import MoERangeError, MoEStageError, Reason, ReasonCode
from lowering.ops._launch import launcher

from .agreement import told_by_ranks
from .exchange_ops import define

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Where more bytes than that are to be read by a rank, a collective is as fast. Between two H200, with NCCL in brackets:
# 64 MiB of a rank gathered in 269 us (292), exchanged in 141 us (140); twice that in 524 (552) and 270 (257).
MOST_BYTES = 64 << 20
# Where a rank reads those results of slots alone that it has a use for: memory is faster then, but has to be there.
MOST_SLOT_BYTES = 256 << 20
_ALIGNED = 256  # bytes; parts begin there, so that copies are vectorised


class Handle(Protocol):
    """What is used of `torch.distributed._symmetric_memory`'s handles."""

    @property
    def rank(self) -> int:
        """The number of this rank."""

    @property
    def world_size(self) -> int:
        """How many ranks there are."""

    def get_buffer(self, rank: int, sizes: Any, *, dtype: torch.dtype, storage_offset: int | None = 0) -> Tensor:
        """A view [...] of a rank's buffer in a dtype, of those sizes, from `storage_offset` elements on."""

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        """Wait, on the current stream, for all ranks."""


def offsets_of(parts: Sequence[tuple[Sequence[int], torch.dtype]]) -> tuple[list[int], int]:
    """Where parts of those shapes and dtypes begin in a buffer, and how long it has to be, all in bytes."""
    offsets, end = [], 0
    for sizes, dtype in parts:
        offsets.append(end)
        end += -(-math.prod(sizes) * dtype.itemsize // _ALIGNED) * _ALIGNED
    return offsets, end


class Workspace:
    """The buffers of all ranks, `num_bytes` each, known to the ops by `key`; see the module for how they are used.

    addresses  where kernels find them, int64 [R]; None where no kernel reads them
    """

    def __init__(
        self,
        handle: Handle,
        num_bytes: int,
        *,
        key: str,
        group: ProcessGroup | None = None,
        memory: Tensor | None = None,
        addresses_R: Tensor | None = None,
    ) -> None:
        self.handle, self.num_bytes, self.key = handle, num_bytes, key
        self.group, self._memory = group, memory  # kept alive
        self.flight: Any = None  # what `overlap` has under way
        self._addresses_R = addresses_R
        _WORKSPACES[key] = self

    def gather(self, parts: Sequence[Tensor], capacity: int) -> list[Tensor]:
        """Tensors [T, X] of any dtype, T <= capacity C on each rank -> [ranks * C, X], with zeros behind the T rows."""
        self.check_free()
        shapes = [((capacity, *part.shape[1:]), part.dtype) for part in parts]
        offsets = self.offsets(shapes)
        for part, (sizes, _), offset in zip(parts, shapes, offsets, strict=True):
            own, count = self.view(self.handle.rank, sizes, dtype=part.dtype, offset=offset), part.shape[0]
            own[:count].copy_(part)
            if count < capacity:
                own[count:].zero_()
        self.handle.barrier()
        every = range(self.handle.world_size)
        gathered = [
            torch.cat([self.view(rank, sizes, dtype=dtype, offset=offset) for rank in every])
            for (sizes, dtype), offset in zip(shapes, offsets, strict=True)
        ]
        self.handle.barrier()
        return gathered

    def all_to_all(self, rows: Tensor) -> Tensor:
        """The r-th of equal parts of rows [R, ...], any dtype, to rank r; [R, ...] with rank 0's for this one first."""
        self._lend(rows)
        received = torch.cat(self._lent(rows))
        self.handle.barrier()
        return received

    def rows_of_ranks(self, rows: Tensor, places_N: Tensor) -> Tensor:
        """The rows of `all_to_all` at some places, [N, H] in the dtype of rows [R, H]; places [N] int64, -1 for zeros.

        A kernel reads no other row of a peer's memory: reading all takes as many times as long as there are ranks.
        """
        self._lend(rows)
        if self._addresses_R is not None:
            found = launcher().rows_of_ranks(rows, places_N, self._addresses_R, own=self.handle.rank)
        else:
            found = rows_at(torch.cat(self._lent(rows)), places_N)
        self.handle.barrier()
        return found  # type: ignore[no-any-return]

    def _lend(self, rows: Tensor) -> None:
        """Put the parts of rows [R, ...] where the ranks that they are for find them; what stays here is not there."""
        self.check_free()
        self.offsets([(rows.shape, rows.dtype)])
        own, (start, stop) = self.view(self.handle.rank, rows.shape, dtype=rows.dtype), self._part(rows)
        own[:start].copy_(rows[:start])
        own[stop:].copy_(rows[stop:])
        self.handle.barrier()

    def _lent(self, rows: Tensor) -> list[Tensor]:
        """The part for this rank from each, in order; the own one out of rows [R, ...]."""
        start, stop = self._part(rows)
        return [
            (rows if source == self.handle.rank else self.view(source, rows.shape, dtype=rows.dtype))[start:stop]
            for source in range(self.handle.world_size)
        ]

    def _part(self, rows: Tensor) -> tuple[int, int]:
        """Of equal parts of rows [R, ...], where this rank's begins and ends."""
        count = rows.shape[0] // self.handle.world_size
        return self.handle.rank * count, (self.handle.rank + 1) * count

    def check_free(self) -> None:
        """Raise `MoEStageError` where `overlap` has a call under way: whatever came next would write over it.

        After the error the memory counts as free, so that a call that ended half way does not end all that follow.
        """
        if self.flight is not None:
            self.flight = None
            raise MoEStageError.of(
                "symmetric memory",
                expected="one call in parts after the other",
                got="an exchange between `begin` and `collect` of another",
                hint="Let one layer's call end before another's begins, or give the layers chunks=1.",
            )

    def offsets(self, parts: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[int]:
        """`offsets_of`; raises `MoERangeError` where the parts do not fit."""
        offsets, end = offsets_of(parts)
        if end > self.num_bytes:
            raise MoERangeError.of(
                "symmetric memory",
                expected=f"at most {self.num_bytes} bytes in an exchange",
                got=str(end),
                hint="Make the layer for as many tokens, of that width and dtype.",
            )
        return offsets

    def view(self, rank: int, sizes: Sequence[int], *, dtype: torch.dtype, offset: int = 0) -> Tensor:
        """A part [...] of a rank's buffer in a dtype, from a byte on."""
        return self.handle.get_buffer(rank, tuple(sizes), dtype=dtype, storage_offset=offset // dtype.itemsize)


_WORKSPACES: weakref.WeakValueDictionary[str, Workspace] = weakref.WeakValueDictionary()


def workspace_of(key: str) -> Workspace:
    """The workspace of a key, which layers keep alive."""
    return _WORKSPACES[key]


def _gather(parts: list[Tensor], capacity: int, size: int, workspace: str) -> list[Tensor]:
    return _WORKSPACES[workspace].gather(parts, capacity)


def _gather_fake(parts: list[Tensor], capacity: int, size: int, workspace: str) -> list[Tensor]:
    return [part.new_empty(size * capacity, *part.shape[1:]) for part in parts]


def _all_to_all(rows: Tensor, size: int, workspace: str) -> Tensor:
    return _WORKSPACES[workspace].all_to_all(rows)


def _all_to_all_fake(rows: Tensor, size: int, workspace: str) -> Tensor:
    return rows.new_empty(rows.shape)


def rows_at(rows: Tensor, places_N: Tensor) -> Tensor:
    """Rows [R, H] of any dtype at places [N] int64, zeros for -1: [N, H]."""
    return torch.where((places_N >= 0).unsqueeze(1), rows.index_select(0, places_N.clamp(min=0)), 0)


def _rows_of_ranks(rows: Tensor, places: Tensor, size: int, workspace: str) -> Tensor:
    return _WORKSPACES[workspace].rows_of_ranks(rows, places)


def _rows_of_ranks_fake(rows: Tensor, places: Tensor, size: int, workspace: str) -> Tensor:
    return rows.new_empty(places.shape[0], rows.shape[1])


gather_op = define(
    "gather(Tensor[] parts, int capacity, int size, str workspace) -> Tensor[]", _gather, fake=_gather_fake
)
all_to_all_op = define("all_to_all(Tensor rows, int size, str workspace) -> Tensor", _all_to_all, fake=_all_to_all_fake)
rows_of_ranks_op = define(
    "rows_of_ranks(Tensor rows, Tensor places, int size, str workspace) -> Tensor",
    _rows_of_ranks,
    fake=_rows_of_ranks_fake,
)


def workspace_for(group: ProcessGroup, device_type: str, *, num_bytes: int) -> Workspace | Reason:
    """A workspace of at least `num_bytes` bytes, or why there is none: the same on every rank, and each has to call it.

    An open one of the group is taken where all ranks have it.
    """
    if device_type != "cuda":
        return Reason(ReasonCode.NOT_CUDA, f"symmetric memory is for CUDA devices, the mesh is on {device_type}")
    if group.size() == 1:
        return Reason(ReasonCode.PEERS, "one rank has nobody to exchange with")
    spaces = list(_WORKSPACES.values())  # none of them may be collected before the ranks have settled on one
    told = told_by_ranks(group, _tell(group, num_bytes, spaces=spaces))
    problem = disagreement(told)
    if problem is not None:
        return problem
    reused = told[0]["open"]
    if reused is not None:
        return _WORKSPACES[reused]
    key = f"{group.group_name}/{1 + max(each['made'] for each in told)}"
    num_bytes = max(each["bytes"] for each in told)
    memory = _on_all(group, _tried(lambda: _allocate(num_bytes)))
    if isinstance(memory, Reason):  # on all ranks: who went on would wait for the one that failed
        return memory
    shared = _on_all(group, _tried(lambda: _shared(memory, group)))
    if isinstance(shared, Reason):
        return shared
    handle, addresses_R = shared
    return Workspace(handle, num_bytes, key=key, group=group, memory=memory, addresses_R=addresses_R)


def _on_all(group: ProcessGroup, found: Any) -> Any:
    """What this rank found, or why some rank did not: a reason on every rank, or on none."""
    failures = told_by_ranks(group, found.detail if isinstance(found, Reason) else None)
    failed = next((f"on rank {rank}: {text}" for rank, text in enumerate(failures) if text is not None), None)
    return found if failed is None else Reason(ReasonCode.PEERS, failed)


def _tried(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except RuntimeError as error:
        return Reason(ReasonCode.PEERS, f"{type(error).__name__}: {str(error)[:200]}")


def disagreement(told: Sequence[dict[str, Any]]) -> Reason | None:
    """Why ranks that told this of themselves (see `_tell`) cannot share memory; also settles which workspace is open.

    The value depends on `told` alone, so all ranks come to the same one.
    """
    for rank, each in enumerate(told):
        if each["refused"] is not None:
            return Reason(ReasonCode.PEERS, f"on rank {rank}: {each['refused']}")
    hosts = sorted({each["host"] for each in told})
    if len(hosts) > 1:
        return Reason(ReasonCode.PEERS, f"the ranks are on {len(hosts)} hosts")
    devices = [each["device"] for each in told]
    if len({*devices}) < len(devices):
        return Reason(ReasonCode.PEERS, "ranks share a device")
    if any(each["open"] != told[0]["open"] for each in told):  # one rank may have let go of its layers earlier
        for each in told:
            each["open"] = None
    return None


def _tell(group: ProcessGroup, num_bytes: int, *, spaces: Sequence[Workspace]) -> dict[str, Any]:
    """What the other ranks have to know of this one before memory is shared."""
    device = torch.cuda.current_device()
    fitting = [space.key for space in spaces if space.group is group and space.num_bytes >= num_bytes]
    return {
        "refused": _refusal(device),
        "host": socket.gethostname(),
        "device": str(torch.cuda.get_device_properties(device).uuid),
        "bytes": num_bytes,
        "made": max((int(space.key.rpartition("/")[2]) for space in spaces), default=0),
        "open": max(fitting, default=None),
    }


def _refusal(device: int) -> str | None:
    """Why this rank has no symmetric memory."""
    try:
        from torch.distributed import _symmetric_memory as symmetric
    except ImportError as error:
        return f"torch has no symmetric memory ({error})"
    if symmetric.get_backend(torch.device("cuda", device)) is None:
        return "torch has no symmetric memory for the device"
    others = (other for other in range(torch.cuda.device_count()) if other != device)
    strangers = [other for other in others if not torch.cuda.can_device_access_peer(device, other)]
    return f"device {device} cannot read the memory of devices {strangers}" if strangers else None


def _allocate(num_bytes: int) -> Tensor:
    """An allocation of its own, from no pool: what a pool still holds may differ from rank to rank, and so would the
    place in it.
    """
    from torch._C._distributed_c10d import _SymmetricMemory

    device = torch.device("cuda", torch.cuda.current_device())
    return _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)


def _shared(memory: Tensor, group: ProcessGroup) -> tuple[Handle, Tensor | None]:
    """Memory that all ranks have, and its addresses: now, as a CUDA graph could not bring them to the device."""
    handle = _share(memory, group)
    return handle, _addresses(handle)


def _share(memory: Tensor, group: ProcessGroup) -> Handle:
    from torch._C._distributed_c10d import _SymmetricMemory

    return _SymmetricMemory.rendezvous(memory, group.group_name)


def _addresses(handle: Handle) -> Tensor | None:
    """Where each rank's buffer begins, int64 [R] on the device; None without triton, where there are no kernels."""
    if importlib.util.find_spec("triton") is None:
        return None
    buffers = [handle.get_buffer(rank, (1,), dtype=torch.uint8) for rank in range(handle.world_size)]
    return torch.tensor([buffer.data_ptr() for buffer in buffers], device=buffers[handle.rank].device)
