"""Tuned times on disk: one JSON file for each device, torch, triton and text of the kernels, private to the user.

A file is replaced as a whole and carries a checksum. What cannot be read, or is not what was written, counts as nothing
tuned, and is said once; what cannot be written is not saved, and is said.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import Reason, ReasonCode
from ..report import logger
from .device import DeviceSpec
from .schedule import GemmShape, Schedule, numbers_of, schedule_of

# GEMM -> rows -> schedule -> seconds; those of one row count were taken side by side
Table = Mapping[GemmShape, Mapping[int, Mapping[Schedule, float]]]

_FORMAT = 1
_MOST_BYTES = 1 << 26
_LOCK_SECONDS = 10.0
_SHAPE_FIELDS = tuple(field.name for field in dataclasses.fields(GemmShape))


@dataclasses.dataclass(frozen=True)
class Key:
    """What times are true for. sources: a hash of the kernels' texts and of what a schedule is."""

    device: str
    capability: tuple[int, int]
    torch: str
    triton: str
    sources: str

    @property
    def file_name(self) -> str:
        """The name of the file with these times."""
        return f"tuned-{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}.json"


def hash_sources(root: Path, *folders: str) -> str:
    """Hex digest over names and contents of all code and templates in folders of `root`."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*")):
        if path.suffix in (".py", ".jinja"):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _sources() -> str:
    return hash_sources(Path(__file__).resolve().parent.parent, "schedule", "templates")


def key_of(device: DeviceSpec) -> Key:
    """The key of a device with what is installed here."""
    triton = "none"
    if importlib.util.find_spec("triton") is not None:
        import triton as installed

        triton = installed.__version__
    return Key(device.name, device.capability, torch.__version__, triton, _sources())


def load(key: Key) -> Table:
    """The times that were saved; none where there is no file, or none that can be trusted."""
    try:
        return decode(_read(_folder() / key.file_name), key)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning("tuned times are not used: %s", _told(error))
        return {}


def save(key: Key, table: Table) -> Reason | None:
    """Add to what is saved, or say why that cannot be; a row count of a GEMM that is there already is replaced."""
    try:
        folder = _folder(create=True)
        with _locked(folder) as descriptor:
            merged = {shape: dict(cells) for shape, cells in load(key).items()}
            for shape, cells in table.items():
                merged.setdefault(shape, {}).update(cells)
            _replace(folder / key.file_name, encode(key, merged))
            os.fsync(descriptor)
    except OSError as error:
        return Reason(ReasonCode.STORAGE, _told(error))
    return None


def encode(key: Key, table: Table) -> bytes:
    """The text of a file."""
    gemms = [
        {
            "shape": dataclasses.asdict(shape),
            "cells": [
                {"rows": rows, "times": [[*numbers_of(schedule), seconds] for schedule, seconds in times.items()]}
                for rows, times in sorted(cells.items())
            ],
        }
        for shape, cells in table.items()
    ]
    return _sealed({"format": _FORMAT, "key": dataclasses.asdict(key), "gemms": gemms})


def digest_of(table: Table) -> str:
    """Hex digest that is the same for the same times, in whatever order they came; empty without any."""
    lines = [
        repr((shape, rows, schedule, seconds))
        for shape, cells in table.items()
        for rows, times in cells.items()
        for schedule, seconds in times.items()
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() if lines else ""


def decode(text: bytes, key: Key) -> Table:
    """The times in such a text; `ValueError`, `TypeError` or `KeyError` where it is not exactly what was written."""
    body = json.loads(text)["body"]
    if text != _sealed(body):
        raise ValueError("the checksum does not fit the text")
    if body["format"] != _FORMAT or body["key"] != json.loads(json.dumps(dataclasses.asdict(key))):
        raise ValueError("the file is of another format, device or version")
    return {
        _shape(gemm["shape"]): {_count(cell["rows"]): _times(cell) for cell in gemm["cells"]} for gemm in body["gemms"]
    }


def _sealed(body: Any) -> bytes:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f'{{"body":{text},"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}\n'.encode()


def _shape(fields: Any) -> GemmShape:
    shape = GemmShape(**{name: fields[name] for name in _SHAPE_FIELDS})
    for name in _SHAPE_FIELDS:
        if type(getattr(shape, name)) is not type(getattr(_SOME_SHAPE, name)):
            raise TypeError(f"{name} of a GEMM is {getattr(shape, name)!r}")
    return shape


_SOME_SHAPE = GemmShape(1, 1, 1, True)


def _times(cell: Any) -> dict[Schedule, float]:
    times = {}
    for *numbers, seconds in cell["times"]:
        if not isinstance(seconds, float) or not 0 < seconds < math.inf:
            raise ValueError(f"{seconds!r} is no time")
        times[schedule_of([_count(number, least=0) for number in numbers])] = seconds
    return times


def _count(number: Any, *, least: int = 1) -> int:
    if type(number) is not int or number < least:
        raise ValueError(f"{number!r} is not a whole number from {least} on")
    return number


def _root() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # here, not above: this loads a part of the compiler

    return Path(cache_dir())


def _folder(*, create: bool = False) -> Path:
    """The folder among Inductor's caches; `OSError` where it is not this user's alone to write to."""
    folder = _root() / "diffulex"
    if create:
        folder.mkdir(mode=0o700, exist_ok=True)
    _check_owner(folder, folder.lstat(), is_kind=stat.S_ISDIR)
    return folder


def _check_owner(path: Path, found: os.stat_result, *, is_kind: Any) -> None:
    foreign = hasattr(os, "geteuid") and found.st_uid != os.geteuid()
    if foreign or not is_kind(found.st_mode) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} is a link, is not this user's, or may be written to by others")


def _read(path: Path) -> bytes:
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        _check_owner(path, found, is_kind=stat.S_ISREG)
        if found.st_size > _MOST_BYTES:
            raise ValueError(f"{path} has {found.st_size} bytes")
        return file.read()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """One process at a time; yields a descriptor of the folder. A process that ends lets go, however it ends."""
    import fcntl

    descriptor, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + _LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        yield descriptor
    finally:
        os.close(descriptor)


def _replace(path: Path, text: bytes) -> None:
    """Write beside the file, then put it in its place. The name is ours alone while the lock is held."""
    beside = path.with_suffix(".tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(beside, flags, 0o600), "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
