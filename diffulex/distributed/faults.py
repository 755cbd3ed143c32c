"""Which rank is missing when an exchange fails: found out after the fact, so that a call that succeeds pays nothing.

A rank whose exchange failed says so in the store of the job, and waits for the others to say the same. Who has not by
the time that the exchange had, and a little longer, is gone or stuck, or has left the layer with an error of its own.
"""

from __future__ import annotations

import collections
import contextlib
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed

from lowering.errors import MoEErrorMixin, MoERankError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

GRACE = 4.0  # seconds behind the timeout of a group, in which ranks that are left say so
_POLL = 0.05
# The texts of gloo begin with its file and line; NCCL's have types of their own, which compiled code may not keep.
_OF_GLOO = re.compile(r"\[[^\]\n]*\bgloo[/\\][^\]\n]*:\d+\]")
_OF_NCCL = re.compile(r"\bNCCL error in: |Watchdog caught collective operation timeout")
_failures: collections.Counter[str] = collections.Counter()  # by group


@contextlib.contextmanager
def naming_lost_ranks(group: ProcessGroup, *, where: str = "an exchange") -> Iterator[None]:
    """Turn the failure of an exchange of `group` within the block into `MoERankError`, which names who did not come.

    Layers have it around their forward pass outside of compiled code; put it around a compiled model, or a backward
    pass. It comes within the group's timeout and `GRACE` seconds of the beginning of the block, or of the failure where
    that is later. Errors that neither gloo nor NCCL nor a store raised are left as they are. The group cannot be used
    afterwards. With NCCL it can only help where NCCL's watchdog raises
    instead of ending the process.
    """
    began = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, MoEErrorMixin) or not _is_of_exchange(error, text):
            raise
        lost, unknown = _lost(group, max(time.monotonic(), began + timeout_of(group).total_seconds()) + GRACE)
        ranks = distributed.get_process_group_ranks(group)
        named = f"rank{'s'[: len(lost) > 1]} {', '.join(str(ranks[rank]) for rank in lost)}" if lost else "some rank"
        raise MoERankError.of(
            where,
            expected=f"the ranks {', '.join(map(str, ranks))}",
            got=f"nothing from {named} ({text.strip().partition(chr(10))[0]}{unknown})",
            hint="It is gone or stuck, or left with an error of its own: see its output, and start the job again.",
        ) from error


def timeout_of(group: ProcessGroup) -> timedelta:
    """How long an exchange of the group may take."""
    devices = group._device_types
    backend = group._get_backend(torch.device("cpu") if torch.device("cpu") in devices else devices[0])
    return backend.options._timeout  # type: ignore[no-any-return]


def _is_of_exchange(error: RuntimeError, text: str) -> bool:
    """Whether torch's collectives raised it: what code of the user's own says of connections and timeouts is its own."""
    types = (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)
    return isinstance(error, types) or bool(_OF_GLOO.search(text) or _OF_NCCL.search(text))


def _lost(group: ProcessGroup, deadline: float) -> tuple[list[int], str]:
    """Who of the group has not said by the deadline that its exchange failed; and why that is not known."""
    _failures[group.group_name] += 1
    prefix = f"diffulex/{group.group_name}/failure {_failures[group.group_name]}"
    waiting = [rank for rank in range(group.size()) if rank != group.rank()]
    try:
        store = _store_of(group)
        store.set(f"{prefix}/{group.rank()}", "here")
        while waiting and time.monotonic() < deadline:
            waiting = [rank for rank in waiting if not store.check([f"{prefix}/{rank}"])]
            time.sleep(_POLL if waiting else 0.0)
    except RuntimeError as error:  # the rank that keeps it, the first one unless the launcher does, may be the lost one
        return [], f"; nor can the store of the job be asked: {str(error)[:100]}"
    return waiting, ""


def _store_of(group: ProcessGroup) -> Store:
    from torch.distributed.distributed_c10d import _get_process_group_store

    return _get_process_group_store(group)
