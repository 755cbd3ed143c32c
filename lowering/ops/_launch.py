"""Late binding of CUDA kernels: `ops` never imports triton, the launcher is loaded when a CUDA kernel first runs."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def launcher() -> ModuleType:
    """The module with one function per op, `lowering.templates.eager`; needs triton and a CUDA device."""
    return importlib.import_module("lowering.templates.eager")
