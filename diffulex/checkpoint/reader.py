"""Tensors of a checkpoint in safetensors files: names and shapes at once, contents a few rows at a time.

safetensors maps a file into memory; what was read stays there as long as the file is open. So one file is open at a
time, and it is opened anew after every window of bytes, which bounds the resident memory without copies.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lowering.errors import MoECheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WINDOW = 32 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def unreadable(path: Path, got: str) -> MoECheckpointError:
    """The error of a file that is not there or not what it should be."""
    error = MoECheckpointError.of(
        f"checkpoint {path}",
        expected="a folder with model.safetensors or its index and shards, one such file, or an index",
        got=got,
        hint="Other formats have to be saved again with `save_pretrained(safe_serialization=True)`.",
    )
    assert isinstance(error, MoECheckpointError)
    return error


class CheckpointReader:
    """Reads tensors by name out of a folder, a `.safetensors` file or an index; a context manager.

    files   name -> file that holds it
    window  bytes read before the file is opened anew; a tensor that is larger is read in one go
    """

    def __init__(self, path: str | Path, *, window: int = WINDOW) -> None:
        self.path = Path(path)
        self.window = window
        self._file: Path | None = None
        self._handle: Any = None
        self._read = 0
        self._whole: set[Path] = set()
        self.files = self._find()

    def __enter__(self) -> CheckpointReader:
        """Nothing is opened before it is read."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the open file; tensors that were read from it keep it mapped."""
        self._file = self._handle = None
        self._read = 0

    def info(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor, in safetensors' words, without its contents."""
        found = self._open(self.files[name]).get_slice(name)
        return tuple(found.get_shape()), found.get_dtype()

    def read(self, name: str, *, start: int | None = None, stop: int | None = None) -> Tensor:
        """A tensor on the CPU, or its rows `start` to `stop` [R, ...], in the dtype of the file.

        It is a view of the mapped file, to be copied from and let go.
        """
        if self._read >= self.window:
            self.close()
        handle = self._open(self.files[name])
        rows = handle.get_tensor(name) if start is None else handle.get_slice(name)[start:stop]
        self._read += rows.nbytes
        return rows

    def _open(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file != self._file:
            self.close()
            try:
                self._handle = safe_open(file, framework="pt", device="cpu")
            except (OSError, SafetensorError) as reason:
                raise unreadable(file, str(reason)) from reason
            self._file = file
            if file not in self._whole:
                self._check_names(file)
        return self._handle

    def _check_names(self, file: Path) -> None:
        """An index may name tensors that its file does not hold."""
        absent = {name for name, where in self.files.items() if where == file} - {*self._handle.keys()}
        if absent:
            raise unreadable(file, f"no {min(absent)}, which the index says it holds ({len(absent)} such names)")
        self._whole.add(file)

    def _find(self) -> dict[str, Path]:
        path = self.path
        if path.is_dir():
            files = sorted(path.glob("*.safetensors"))
            if not files:
                raise unreadable(path, "no .safetensors file in the folder")
            usual = [path / name for name in (SINGLE, INDEX) if (path / name).is_file()]
            if not usual:
                return {name: file for file in files for name in self._names(file)}
            path = usual[0]
        if not path.is_file():
            raise unreadable(path, "no such file")
        if path.suffix == ".json":
            return self._index(path)
        return dict.fromkeys(self._names(path), path)

    def _names(self, file: Path) -> list[str]:
        self._whole.add(file)
        names = list(self._open(file).keys())
        self.close()
        return names

    def _index(self, path: Path) -> dict[str, Path]:
        try:
            names = {name: PurePath(file) for name, file in dict(json.loads(path.read_text())["weight_map"]).items()}
        except (ValueError, KeyError, TypeError, RecursionError) as reason:
            raise unreadable(path, f"an index without a weight_map ({str(reason)[:200]!r})") from reason
        elsewhere = sorted(str(file) for file in {*names.values()} if file.is_absolute() or ".." in file.parts)
        if elsewhere:
            raise unreadable(path, f"shards outside of its folder: {', '.join(elsewhere[:5])}")
        files = {name: path.parent / file for name, file in names.items()}
        absent = sorted({str(file.name) for file in files.values() if not file.is_file()})
        if absent:
            raise unreadable(path, f"no {', '.join(absent[:5])} beside it ({len(absent)} of {len({*files.values()})})")
        return files
