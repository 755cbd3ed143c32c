"""Safetensors files written piece by piece: the header first, then each tensor as it is asked for.

`safetensors.torch.save_file` wants all tensors of a file in memory; here it is one piece of one tensor.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowering.errors import MoECheckpointError, MoEDtypeError, MoEOptionError

from .reader import DTYPES, INDEX, SINGLE

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


class Entry(NamedTuple):
    """A tensor to write: `pieces()` yields its contents in order, on any device; a piece is read before the next."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of the contents."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def bytes_of(size: int | str) -> int:
    """Bytes of a size like 5_000_000_000, "5GB" or "512MiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)", str(size).upper())
    if not match or float(match[1]) <= 0:
        raise MoEOptionError.of(
            "checkpoint",
            expected="max_shard_size as a positive number of bytes, or like '5GB' or '512MiB'",
            got=repr(size),
            hint="Units are B, KB, MB, GB, TB and KiB, MiB, GiB, TiB.",
        )
    return int(float(match[1]) * _UNITS[match[2]])


def write_shards(folder: Path, entries: Sequence[Entry], *, max_shard_size: int) -> None:
    """Write `model.safetensors`, or shards and their index, into a folder without safetensors files.

    A shard is as large as whole tensors fit; a tensor that is larger than that has one of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(path.name for path in folder.glob("*.safetensors*"))
    if there:
        raise MoECheckpointError.of(
            f"checkpoint {folder}",
            expected="a folder without a checkpoint",
            got=", ".join(there[:5]),
            hint="Save into a new folder, or delete the files first.",
        )
    shards = _split(entries, max_shard_size)
    if len(shards) == 1:
        _write(folder / SINGLE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard)
        weight_map.update({entry.key: name for entry in shard})
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
    _replace(folder / INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def _split(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        if entry.dtype not in _CODES:
            raise MoEDtypeError.of(
                f"checkpoint, {entry.key}",
                expected=f"a dtype of {', '.join(_CODES.values())}",
                got=str(entry.dtype),
                hint="Convert the tensor first.",
            )
        end = offset + entry.nbytes
        header[entry.key] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, entries: Sequence[Entry]) -> None:
    """One file, complete or not there: it is given its name when everything is in it."""
    # large elements first: every tensor starts at a multiple of its element size
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header = _header(entries)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(header)
            for entry in entries:
                begin = file.tell()
                for piece in entry.pieces():
                    flat = piece.detach().to("cpu", entry.dtype).contiguous().reshape(-1)
                    file.write(flat.view(torch.uint8).numpy().data)
                    del piece, flat  # or the next tensor's would come on top
                assert file.tell() - begin == entry.nbytes, entry.key
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
