"""A device guard for CUDA where there is no device.

Indexing, copies and autograd nodes guard the device in C++, for fake tensors too. A CUDA build without a device has a
guard that does nothing ready. A CPU build has an empty entry in its registry, and stops there: a guard made in Python
fills the entry and is taken out again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import MoEUnsupportedError


@contextlib.contextmanager
def device_guard() -> Iterator[None]:
    """Inside the block there is a device guard for CUDA that does nothing."""
    torch._C._ensureCUDADeviceGuardSet()
    slots = guard_registry()
    missing = not slots[_CUDA]
    if missing:
        slots[_CUDA] = _python_guard()
    try:
        yield
    finally:
        if missing:
            slots[_CUDA] = None


# Places in c10's registry of device guards; the numbers of the device types are part of torch's file format.
_CPU, _CUDA, _PRIVATE = 0, 1, 20
_GUARD_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"


def guard_registry() -> Any:
    """c10's array of pointers to device guards, one for each device type."""
    path = os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so")
    try:
        slots = (ctypes.c_void_p * (_PRIVATE + 1)).in_dll(ctypes.CDLL(path), _GUARD_REGISTRY)
    except (OSError, ValueError) as error:
        raise MoEUnsupportedError.of(
            "fake_gpu",
            expected="torch for Linux",
            got=f"no registry of device guards ({error})",
            hint="Use Linux, or a CUDA build of torch.",
        ) from error
    if not slots[_CPU]:
        raise MoEUnsupportedError.of(
            "fake_gpu",
            expected="a device guard for the CPU",
            got="an empty registry",
            hint="This torch is newer than fake_gpu knows.",
        )
    return slots


@functools.cache
def _python_guard() -> int:
    """Address of a guard that says `cuda:0` and does nothing.

    torch registers guards made in Python under its private device type only; the pointer is read there.
    """

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.CUDA

    slots = guard_registry()
    before, slots[_PRIVATE] = slots[_PRIVATE], None
    try:
        torch._C._acc.register_python_privateuseone_device_guard(Guard())  # keeps the guard alive
        return slots[_PRIVATE]
    finally:
        slots[_PRIVATE] = before
