"""Whether diffulex takes part in compilations of this process; read during capture, so Dynamo guards on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .settings import SETTINGS

_enabled = not SETTINGS.disable


def is_enabled() -> bool:
    """True unless inside `disabled()` or started with DIFFULEX_DISABLE=1."""
    return _enabled


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Stock Inductor inside the block, for comparison: models compiled here do not use the ops or passes.

    Process-wide, like other compiler switches. Code compiled before and called inside is compiled again.
    """
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
