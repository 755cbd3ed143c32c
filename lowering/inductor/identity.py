"""The cache identity: a hash over every file of this package, so that a changed template never serves old code."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def fingerprint() -> str:
    """Hex digest over names and contents of all files of `lowering`."""
    digest = hashlib.sha256()
    for path in sorted(_ROOT.rglob("*")):
        if path.suffix in (".py", ".jinja"):
            digest.update(path.relative_to(_ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
