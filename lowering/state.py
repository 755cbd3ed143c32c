"""Whether diffulex takes part in compilations of this process; Dynamo guards on it in every graph."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from .settings import SETTINGS

_lock = threading.Lock()
_blocks = 0  # how many `disabled()` blocks are open, over all threads
_enabled = not SETTINGS.disable  # a plain global, which is what a guard reads cheaply


def is_enabled() -> bool:
    """True unless inside `disabled()` or started with DIFFULEX_DISABLE=1."""
    return _enabled


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
    _open(1)
    try:
        yield
    finally:
        _open(-1)


def _open(blocks: int) -> None:
    global _blocks, _enabled
    with _lock:
        _blocks += blocks
        _enabled = _blocks == 0 and not SETTINGS.disable
