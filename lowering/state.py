"""The switches of this process: whether diffulex takes part in compilations, and whether results may depend on a batch.

Each is a plain bool of this module, which Dynamo guards on in every graph, and part of the identity that Inductor's
caches know code by.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from .settings import SETTINGS

_lock = threading.Lock()
_blocks = {"disabled": 0, "batch_invariant": 0}  # how many blocks of each kind are open, over all threads
_enabled = not SETTINGS.disable  # plain globals, which is what a guard reads cheaply
_batch_invariant = SETTINGS.batch_invariant
GUARDED = ("_enabled", "_batch_invariant")
WATCHERS: list[Callable[[], None]] = []  # called after every change, one change at a time


def is_enabled() -> bool:
    """True unless inside `disabled()` or started with DIFFULEX_DISABLE=1."""
    return _enabled


def is_batch_invariant() -> bool:
    """True inside `batch_invariant()` or started with DIFFULEX_BATCH_INVARIANT=1."""
    return _batch_invariant


def switches() -> tuple[bool, ...]:
    """Where the switches stand, in the order of `GUARDED`."""
    return tuple(globals()[name] for name in GUARDED)


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Stock Inductor for what is compiled AND called inside the block; `torch.compile` itself compiles nothing yet.

        stock = torch.compile(model)
        with diffulex.disabled():
            stock(*inputs)

    Code compiled outside and called inside is compiled again without the ops and passes, and the other way round; both
    stay, so going back and forth compiles nothing more. The switch is off for the whole process while any thread is
    inside. Models whose `experts_implementation` is "diffulex" ask for the ops by name and keep them.
    """
    with _open("disabled"):
        yield


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """What a MoE block computes for a token is bitwise the same, whatever other tokens are in the batch and however
    many, where it is computed inside the block. It costs time: `diffulex.explain` says how much, and what of a layer is
    not covered.

        with diffulex.batch_invariant():
            model(*inputs)

    As with `disabled`, code is compiled for either side, both stay, and the whole process is inside while a thread is.
    """
    with _open("batch_invariant"):
        yield


@contextlib.contextmanager
def _open(kind: str) -> Iterator[None]:
    _count(kind, 1)
    try:
        yield
    finally:
        _count(kind, -1)


def _count(kind: str, blocks: int) -> None:
    global _enabled, _batch_invariant
    with _lock:
        _blocks[kind] += blocks
        _enabled = not (SETTINGS.disable or _blocks["disabled"])
        _batch_invariant = SETTINGS.batch_invariant or _blocks["batch_invariant"] > 0
        for watcher in WATCHERS:
            watcher()
