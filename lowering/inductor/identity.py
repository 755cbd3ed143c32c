"""The cache identity: a hash over every file of this package, so that a changed template never serves old code; where
the switches stand, so that code of one side is never served to the other; and the tuned times that schedules come from.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch

from ..schedule import tuned
from ..schedule.storage import hash_sources
from ..state import switches

_ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def fingerprint() -> str:
    """Hex digest over names and contents of all files of `lowering`."""
    return hash_sources(_ROOT, "")


def identity() -> str:
    """What stands in the keys of Inductor's caches: the fingerprint, where the switches stand, tuned times if any."""
    mark = tuned.mark()
    return f"{fingerprint()}-{''.join('01'[on] for on in switches())}{mark and f'-{mark}'}"


_MARK = re.compile(r"diffulex-[0-9a-f]{64}-[01]+(-[0-9a-f]+)?")


def tag_caches() -> None:
    """Put the identity into the tag that every cache key has, or, after it has changed, put it right.

    Our pass in Inductor's slot has it, too, but someone else's may stand there while a key is made.
    """
    tag, mark = torch.compiler.config.cache_key_tag, f"diffulex-{identity()}"
    tag, found = _MARK.subn(mark, tag)
    torch.compiler.config.cache_key_tag = tag if found else f"{tag}+{mark}" if tag else mark
