"""Progress on standard error: a bar on a terminal, elsewhere one line when something starts and one when it ends."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

_REFRESH_SECONDS = 0.5


class Progress:
    """A bar that was started by `progress`; without a terminal it shows nothing."""

    def __init__(self, bar: Any = None) -> None:
        self._bar = bar

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Add `amount` to the position and show `note` beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)


@contextlib.contextmanager
def progress(label: str, total: float, *, unit: str = "step") -> Iterator[Progress]:
    """Show how far the block is, out of `total`. The clock keeps running while a single step takes long."""
    started = time.perf_counter()
    if sys.stderr.isatty():
        with _bar(label, total, unit) as bar:
            yield bar
    else:
        print(f"{label} ...", file=sys.stderr, flush=True)
        yield Progress()
    print(f"{label}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(label: str, total: float, unit: str) -> Iterator[Progress]:
    from tqdm import tqdm  # transformers depends on it

    done = threading.Event()
    form = "{desc} {percentage:3.0f}% |{bar:24}| {elapsed}{postfix}"
    with tqdm(total=total, desc=label, unit=unit, leave=False, file=sys.stderr, bar_format=form) as bar:

        def tick() -> None:
            while not done.wait(_REFRESH_SECONDS):
                bar.refresh()

        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield Progress(bar)
        finally:
            done.set()
            ticker.join()
