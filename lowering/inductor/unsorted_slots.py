"""Few slots are sorted by the expert GEMM that reads them first: `moe_dispatch` then has no kernel of its own.

Its outputs are buffers that this GEMM writes, and whatever else reads them comes later. The slots of one token are not
sorted at all where only its two expert GEMMs would see it: an expert that is chosen twice is read twice, and no
program has to wait for the ids of the others. Most of these multiply vectors, see `vectors`.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch.fx import Node

from .. import ops  # noqa: F401  the ops have to exist
from ..graph.dataflow import arguments, is_op, is_output, outputs
from ..ops import DOWN_OPS, UP_OPS
from ..state import is_batch_invariant
from . import _compat
from .gemm_plan import KERNEL_DTYPES, planned_schedule

MOST_SLOTS = 64


@dataclasses.dataclass(frozen=True)
class Unsorted:
    """Slots that no kernel has sorted.

    ids          the buffer [T, K]
    slots_pow2   a power of two of at least T * K
    by_slot      nor has any to: each slot is a row tile of its own
    """

    ids: Any
    slots_pow2: int
    by_slot: bool

    def __str__(self) -> str:
        return "a slot a row tile" if self.by_slot else "sorts the slots"


# by graph and the name of the buffer `order`: what those who read it, one after the other, have to do without
_unsorted: weakref.WeakKeyDictionary[Any, dict[str, list[Unsorted]]] = weakref.WeakKeyDictionary()


def may_stay_unsorted(dispatch: Node | None, rows: Any, *, most_rows: int, device: torch.device) -> bool:
    """Whether the slots, `rows` of them and at most `most_rows`, can be sorted by what reads them."""
    if is_batch_invariant():  # one text of each expert kernel, whatever the number of rows
        return False
    if dispatch is None or not 0 < most_rows <= MOST_SLOTS or outputs(dispatch, 1):
        return False
    readers = _readers(dispatch)
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
    if schedule is not None and schedule.loop.tma:  # does not sort
        return may_stay_in_place(dispatch, rows, device=device)
    return schedule is not None


def may_stay_in_place(dispatch: Node | None, rows: Any, *, device: torch.device) -> bool:
    """Whether slots that may stay unsorted need not be sorted: one token's, which only its two expert GEMMs read."""
    assert dispatch is not None
    given = arguments(dispatch)
    tokens, top_k = map(_compat.known_size, given["ids"].meta["val"].shape)
    if tokens != 1 or top_k is None or top_k > given["num_experts"]:
        return False
    readers = _readers(dispatch)
    ups, downs = ([node for node in readers if is_op(node, *stage)] for stage in (UP_OPS, DOWN_OPS))
    if len(readers) != 2 or not ups or not downs or not _reads(downs[0], dispatch):
        return False
    act = arguments(downs[0])["act"]
    if act is not ups[0] and not is_output(act, ups[0], index=0):
        return False
    planned = all(planned_schedule(rows, node, device=device) is not None for node in (*ups, *downs))
    return planned and len(act.users) == 1


def _readers(dispatch: Node) -> set[Node]:
    return {reader for index in (0, 2) for item in outputs(dispatch, index) for reader in item.users}


def _reads(gemm: Node, dispatch: Node) -> bool:
    given = arguments(gemm)
    return is_output(given["order"], dispatch, index=0) and is_output(given["offsets"], dispatch, index=2)


def leave_unsorted(order: Any, unsorted: Unsorted) -> None:
    """The expert GEMM that gets the buffer `order` [N] next is to sort, or both GEMMs are to do without."""
    _unsorted.setdefault(_compat.V.graph, {})[order.get_name()] = [unsorted] * (2 if unsorted.by_slot else 1)


def is_in_place(order: Any) -> bool:
    """Whether the next reader of `order` [N] reads slots where they stand."""
    kept = _unsorted.get(_compat.V.graph, {}).get(order.maybe_get_name())
    return kept is not None and kept[0].by_slot


def take_unsorted(order: Any) -> Unsorted | None:
    """What the reader of `order` [N] that is lowered now has to do without, or None: it is there."""
    kept, name = _unsorted.get(_compat.V.graph, {}), order.get_name()
    if name not in kept:
        return None
    unsorted, *others = kept.pop(name)
    if others:
        kept[name] = others
    return unsorted
