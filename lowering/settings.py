"""The environment variables of diffulex and lowering, at most five, all read here and once, at import.

DIFFULEX_DISABLE=1           start switched off, as inside `diffulex.disabled()`.
DIFFULEX_BATCH_INVARIANT=1   start as inside `diffulex.batch_invariant()`.
DIFFULEX_DEBUG=1             check the metadata of MoE layers (`diffulex.moe.metadata`) whenever it is made.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping

from .errors import MoEOptionError

_FLAGS = {"": False, "0": False, "1": True}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment asked for when the process started.

    disable          start switched off (DIFFULEX_DISABLE)
    debug            check metadata where it is made (DIFFULEX_DEBUG)
    batch_invariant  start with results that do not depend on the batch (DIFFULEX_BATCH_INVARIANT)
    """

    disable: bool = False
    debug: bool = False
    batch_invariant: bool = False


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Read the variables from `environ`; a value without a meaning raises `MoEOptionError` instead of being ignored."""
    return Settings(
        disable=_flag(environ, "DIFFULEX_DISABLE"),
        debug=_flag(environ, "DIFFULEX_DEBUG"),
        batch_invariant=_flag(environ, "DIFFULEX_BATCH_INVARIANT"),
    )


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "")
    if value not in _FLAGS:
        raise MoEOptionError.of(
            f"environment variable {name}",
            expected="0, 1 or nothing",
            got=repr(value),
            hint=f"Set {name}=1 to switch it on, or unset it.",
        )
    return _FLAGS[value]


def _settings_of_process() -> Settings:
    try:
        return read_settings(os.environ)
    except MoEOptionError as error:
        if sys.argv[:1] != ["-m"]:
            raise
        # what Python calls itself while it looks for the module of `python -m diffulex`: a wrong argument, no traceback
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


SETTINGS = _settings_of_process()
