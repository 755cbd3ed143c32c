"""The cache identity: a hash over every file of this package, so that a changed template never serves old code, and
where the switches stand, so that code of one side is never served to the other.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

import torch

from ..state import switches

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


def identity() -> str:
    """What stands in the keys of Inductor's caches: the fingerprint and where the switches stand."""
    return f"{fingerprint()}-{''.join('01'[on] for on in switches())}"


_MARK = re.compile(r"diffulex-[0-9a-f]{64}-[01]+")


def tag_caches() -> None:
    """Put the identity into the tag that every cache key has, or, after a switch has moved, put it right.

    Our pass in Inductor's slot has it, too, but someone else's may stand there while a key is made.
    """
    tag, mark = torch.compiler.config.cache_key_tag, f"diffulex-{identity()}"
    tag, found = _MARK.subn(mark, tag)
    torch.compiler.config.cache_key_tag = tag if found else f"{tag}+{mark}" if tag else mark
