"""Few slots are sorted by the expert GEMM that reads them first: `moe_dispatch` then has no kernel of its own.

Its outputs are buffers that this GEMM writes, and whatever else reads them comes later.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.fx import Node

from .. import ops  # noqa: F401  the ops have to exist
from ..graph.dataflow import arguments, is_op, is_output, outputs
from ..ops import UP_OPS
from ..state import is_batch_invariant
from ..templates.eager import power_of_two
from . import _compat
from .gemm_plan import KERNEL_DTYPES, planned_schedule

MOST_SLOTS = 64

# by graph and the name of the buffer `order`: the ids that are still to be sorted
_unsorted: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


def may_stay_unsorted(dispatch: Node | None, rows: Any, *, most_rows: int, device: torch.device) -> bool:
    """Whether the slots, `rows` of them and at most `most_rows`, can be sorted by what reads them."""
    if is_batch_invariant():  # one text of each expert kernel, whatever the number of rows
        return False
    if dispatch is None or not 0 < most_rows <= MOST_SLOTS or outputs(dispatch, 1):
        return False
    readers = {reader for index in (0, 2) for item in outputs(dispatch, index) for reader in item.users}
    if not readers:
        return False
    first = dispatch.next
    while first not in readers:
        first = first.next
    if not is_op(first, *UP_OPS) or not _reads(first, dispatch):
        return False
    hidden = arguments(first)["hidden"].meta["val"]
    if hidden.dtype not in KERNEL_DTYPES or hidden.device != device:
        return False
    schedule = planned_schedule(rows, first, device=device)
    return schedule is not None and not schedule.loop.tma


def _reads(up: Node, dispatch: Node) -> bool:
    given = arguments(up)
    return is_output(given["order"], dispatch, index=0) and is_output(given["offsets"], dispatch, index=2)


def leave_unsorted(order: Any, ids: Any, *, most_rows: int) -> None:
    """The expert GEMM that gets the buffer `order` [N] is to sort ids [T, K], at most `most_rows` slots."""
    _unsorted.setdefault(_compat.V.graph, {})[order.get_name()] = (ids, power_of_two(most_rows))


def take_unsorted(order: Any) -> tuple[Any, int] | None:
    """(ids [T, K], a power of two of at least N) where whoever reads `order` [N] next has to sort them."""
    return _unsorted.get(_compat.V.graph, {}).pop(order.get_name(), None)
