"""Which rank is missing when an exchange fails: found out after the fact, so that a call that succeeds pays nothing.

A rank whose exchange failed says so in the store of the job, and waits for the others to say the same. Who has not by
the time that the exchange had, and a little longer, is gone or stuck, or has left the layer with an error of its own.
Where gloo lost a connection a rank is gone, and the only one that has not said so a little later is named at once; of
several, some may be late, or wait in a ring of more than three for one that has failed and not yet ended. What a rank
says holds until it enters a block of the group again.
"""

from __future__ import annotations

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

GRACE = 4.0  # seconds behind the timeout of a group or a lost connection, in which ranks that are left say so
_POLL = 0.05
# The texts of gloo begin with its file and line; NCCL's have types of their own, which compiled code may not keep.
_OF_GLOO = re.compile(r"\[[^\]\n]*\bgloo[/\\][^\]\n]*:\d+\]")
_OF_NCCL = re.compile(r"\bNCCL error in: |Watchdog caught collective operation timeout")
_CUT_OFF = re.compile(r"Connection (?:closed|reset) by peer|Broken pipe")
_said: set[str] = set()  # the groups in whose stores this rank says that its exchange failed


@contextlib.contextmanager
def naming_lost_ranks(group: ProcessGroup, *, where: str = "an exchange") -> Iterator[None]:
    """Turn the failure of an exchange of `group` within the block into `MoERankError`, which names who did not come.

    Layers have it around their forward pass outside of compiled code; put it around a compiled model, or a backward
    pass. It comes within `GRACE` seconds of gloo's loss of a connection where one rank alone is missing, else within
    the group's timeout and `GRACE` seconds of the beginning of the block, or of the failure where that is later. No
    rank is named that the store of the job was not asked for, which is lost with its keeper: rank 0, unless the
    launcher keeps it as torchrun does. Errors that neither gloo nor NCCL nor a store raised are left as they are. The
    group cannot be used afterwards. With NCCL it can only help where NCCL's watchdog raises instead of ending the
    process.
    """
    began = time.monotonic()
    if group.group_name in _said:
        _take_back(group)
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, MoEErrorMixin) or not _is_of_exchange(error, text):
            raise
        is_cut = bool(_OF_GLOO.search(text) and _CUT_OFF.search(text))
        now = time.monotonic()
        limit = max(now, began + timeout_of(group).total_seconds())
        lost, unknown = _lost(group, limit + GRACE, if_one=(now if is_cut else limit) + GRACE)
        ranks = distributed.get_process_group_ranks(group)
        named = f"rank{'s'[: len(lost) > 1]} {', '.join(str(ranks[rank]) for rank in lost)}" if lost else "some rank"
        first_line = text.strip().partition("\n")[0]
        raise MoERankError.of(
            where,
            expected=f"the ranks {', '.join(map(str, ranks))}",
            got=f"nothing from {named} ({first_line}{unknown})",
            hint="It is gone or stuck, or left with an error of its own: see its output, and start the job again.",
        ) from error


def timeout_of(group: ProcessGroup) -> timedelta:
    """How long an exchange of the group may take."""
    devices = group._device_types
    backend = group._get_backend(torch.device("cpu") if torch.device("cpu") in devices else devices[0])
    return backend.options._timeout  # type: ignore[no-any-return]


def _is_of_exchange(error: RuntimeError, text: str) -> bool:
    """Whether torch's collectives raised it: what other code says of connections and timeouts is its own."""
    types = (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)
    return isinstance(error, types) or bool(_OF_GLOO.search(text) or _OF_NCCL.search(text))


def _lost(group: ProcessGroup, deadline: float, *, if_one: float) -> tuple[list[int], str]:
    """Who of the group has not said by the deadline, or if it is one rank by an earlier one, that its exchange failed;
    and what of that is not known.
    """
    others = [rank for rank in range(group.size()) if rank != group.rank()]
    waiting, is_asked = others, False
    try:
        store = _store_of(group)
        store.set(_key(group, group.rank()), "here")
        _said.add(group.group_name)
        while waiting and time.monotonic() < (if_one if len(waiting) == 1 and is_asked else deadline):
            waiting, is_asked = [rank for rank in waiting if not store.check([_key(group, rank)])], True
            time.sleep(_POLL if waiting else 0.0)
    except RuntimeError as error:
        known = "what is named was missing by then" if is_asked else "no rank could be asked"
        keeper = f"; the store's keeper, usually rank 0, is lost, and {known}: {str(error)[:100]}"
        return waiting if is_asked else [], keeper
    return waiting, ""


def _take_back(group: ProcessGroup) -> None:
    """Say no more that an exchange failed: this rank went on, and if it is lost later it must not count as there."""
    _said.discard(group.group_name)
    with contextlib.suppress(RuntimeError):  # a store that is gone tells nobody
        _store_of(group).delete_key(_key(group, group.rank()))


def _key(group: ProcessGroup, rank: int) -> str:
    return f"diffulex/{group.group_name}/failed/{rank}"


def _store_of(group: ProcessGroup) -> Store:
    from torch.distributed.distributed_c10d import _get_process_group_store

    return _get_process_group_store(group)
