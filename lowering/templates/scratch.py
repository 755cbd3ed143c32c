"""Memory for kernels that make tensor descriptors: triton asks an allocator for it, which it keeps by context."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _from_torch(size: int, alignment: int, stream: int | None) -> Tensor:
    """`size` bytes [size] int8 of the current device, on the stream that is current."""
    return torch.empty(size, dtype=torch.int8, device="cuda")  # torch aligns to 512 bytes


class _Allocator:
    """Stands for triton's context variable: the allocator that was set in this context, else torch's memory."""

    def __init__(self, variable: Any, nothing: Any) -> None:
        self.variable, self.nothing = variable, nothing

    def __getattr__(self, name: str) -> Any:
        return getattr(self.variable, name)

    def get(self) -> Any:
        found = self.variable.get()
        return _from_torch if found is self.nothing and torch.cuda.is_available() else found


def lend_memory(module: ModuleType) -> None:
    """Have `triton.runtime._allocation` take memory from torch in contexts that set no allocator.

    Its own default raises, a new thread begins without what others set, and Inductor of torch 2.14 sets an allocator
    at a kernel's first launch only, in the thread of that launch. A triton that keeps it otherwise is left alone.
    """
    variable, nothing = (getattr(module, name, None) for name in ("_allocator", "_NULL_ALLOCATOR"))
    if variable is not None and nothing is not None and not isinstance(variable, _Allocator):
        module._allocator = _Allocator(variable, nothing)  # type: ignore[attr-defined]
