"""The second host of the kernel templates: renders them without Inductor and launches them on given tensors.

Used by the ops' CUDA kernels in eager mode, by the Triton-interpreter tests and by the offline checks.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from ..after_import import after_import
from ..errors import Reason, ReasonCode
from .scratch import lend_memory

Constant = int | float | bool | str

_IMPORTS = "import triton\nimport triton.language as tl\n\n\n"
_DEF_KERNEL = "<DEF_KERNEL>"
_GLUON_VERSIONS = ("3.6.", "3.7.")
_LOADING = threading.RLock()
OUTPUT = "OUT"


@dataclasses.dataclass
class _Hooks:
    """Implements Inductor's template hooks; sizes and strides become integer arguments of the kernel."""

    kernel_name: str
    constants: Mapping[str, Constant]
    output_rank: int
    pointers: tuple[str, ...] = ()
    integers: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)

    def def_kernel(self, *names: str) -> str:
        self.pointers = names
        return _DEF_KERNEL

    def _integer(self, kind: str, name: str, dim: int) -> str:
        entry = (kind, name, dim)
        if entry not in self.integers:
            self.integers.append(entry)
        return f"{kind}_{name}_{dim}"

    def size(self, name: str, dim: int) -> str:
        return self._integer("size", name, dim)

    def stride(self, name: str, dim: int) -> str:
        return self._integer("stride", name, dim)

    def store_output(
        self,
        indices: tuple[str, ...],
        value: str,
        mask: str | None = None,
        indent_width: int = 4,
        val_shape: tuple[str, ...] | None = None,
    ) -> str:
        offset = " + ".join(f"{index} * {self.stride(OUTPUT, dim)}" for dim, index in enumerate(indices))
        target = f"{OUTPUT} + ({offset})"
        if val_shape is not None:
            shape = ", ".join(val_shape)
            target = f"{OUTPUT} + tl.broadcast_to({offset}, ({shape},))"
        return f"tl.store({target}, ({value}).to({OUTPUT}.dtype.element_ty), mask={mask})"

    def finish(self, body: str) -> str:
        arguments = [*self.pointers, OUTPUT, *(f"{kind}_{name}_{dim}" for kind, name, dim in self.integers)]
        lines = [f"def {self.kernel_name}({', '.join(arguments)}):"]
        header = _IMPORTS
        if body.startswith(_DEF_KERNEL):  # else the text has a decorator and constants of its own
            header += "@triton.jit\n"
            lines += [f"    {name}: tl.constexpr = {value}" for name, value in self.constants.items()]
        return header + body.replace(_DEF_KERNEL, "\n".join(lines), 1) + "\n"


@dataclasses.dataclass(frozen=True)
class StandaloneKernel:
    """A rendered kernel: text, the tensors it takes in order (or descriptors of them), and integers read off them."""

    name: str
    source: str
    pointers: tuple[str, ...]
    integers: tuple[tuple[str, str, int], ...]

    def arguments(self, tensors: Mapping[str, Tensor]) -> list[Any]:
        """Positional arguments of the kernel: tensors (any shape [T, H] and dtype), then their sizes and strides."""
        sizes = [
            tensors[name].size(dim) if kind == "size" else tensors[name].stride(dim)
            for kind, name, dim in self.integers
        ]
        return [*(tensors[name] for name in self.pointers), tensors[OUTPUT], *sizes]


@functools.lru_cache(maxsize=1024)
def render(text: str, name: str, *, constants: tuple[tuple[str, Constant], ...], output_rank: int) -> StandaloneKernel:
    """Fill the hooks of a template text. `constants` become both jinja variables and constexprs of the kernel."""
    hooks = _Hooks(f"_{name}_kernel", dict(constants), output_rank)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    body = environment.from_string(text).render(
        def_kernel=hooks.def_kernel,
        size=hooks.size,
        stride=hooks.stride,
        store_output=hooks.store_output,
        **dict(constants),
    )
    return StandaloneKernel(hooks.kernel_name, hooks.finish(body), hooks.pointers, tuple(hooks.integers))


@functools.cache
def gluon_refusal() -> Reason | None:
    """Why texts in Gluon, an experimental language of Triton, cannot be compiled here, or None."""
    import triton

    version = triton.__version__
    if not version.startswith(_GLUON_VERSIONS):
        known = " and ".join(found.rstrip(".") for found in _GLUON_VERSIONS)
        return Reason(ReasonCode.ABSENT, f"Gluon as of triton {known}, which is not that of triton {version}")
    return None


@functools.cache
def _folder_of(process: int) -> Path:
    """A folder of this process alone: one that was forked from it may end before it does, or after."""
    folder = Path(tempfile.mkdtemp(prefix="diffulex-kernels-"))  # private to the user (0700)
    atexit.register(_remove, folder, process)
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # forked processes have its exit handlers as well
        shutil.rmtree(folder, ignore_errors=True)


def _source_folder() -> Path:
    folder = _folder_of(os.getpid())
    if not folder.is_dir():  # what cleans up temporary files does not know that this process lives
        _folder_of.cache_clear()
        folder = _folder_of(os.getpid())
    return folder


def _jit_function(kernel: StandaloneKernel) -> Any:
    """The `triton.jit` function of a kernel, one for all threads."""
    with _LOADING:
        return _loaded(kernel)


@functools.lru_cache(maxsize=1024)
def _loaded(kernel: StandaloneKernel) -> Any:
    """Triton reads a function's source from a file, so there has to be one, and no thread may write it meanwhile."""
    digest = hashlib.sha256(kernel.source.encode()).hexdigest()[:16]
    path = _source_folder() / f"{kernel.name}_{digest}.py"
    path.write_text(kernel.source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    after_import("triton.runtime._allocation", lend_memory)  # the source has imported triton
    return getattr(module, kernel.name)


def compile_only(
    text: str,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    constants: Mapping[str, Constant],
    num_warps: int,
    num_stages: int,
) -> Any:
    """Compile a template for the active target without running it.

    `tensors`, any shape [T, H] and dtype, may be on the meta device.

    Returns triton's compiled kernel, whose `asm` and `metadata` hold PTX, cubin and shared memory (bytes).
    """
    kernel = render(text, name, constants=tuple(constants.items()), output_rank=tensors[OUTPUT].dim())
    arguments = [a.dtype if isinstance(a, Tensor) else a for a in kernel.arguments(tensors)]
    return _jit_function(kernel).warmup(*arguments, grid=(1,), num_warps=num_warps, num_stages=num_stages)


def launch(
    text: str,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    constants: Mapping[str, Constant],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
) -> None:
    """Run a template on tensors named as in its `def_kernel`, plus `OUT`, which `store_output` writes.

    Tensors have any shape [T, H] and dtype the text expects. Nothing is launched for an empty grid.
    """
    if 0 in grid:
        return
    output = tensors[OUTPUT]
    kernel = render(text, name, constants=tuple(constants.items()), output_rank=output.dim())
    function = _jit_function(kernel)
    # triton launches on the current device, whatever the tensors are on
    elsewhere = output.is_cuda and output.device.index != torch.cuda.current_device()
    with torch.cuda.device(output.device) if elsewhere else contextlib.nullcontext():
        function[grid](*kernel.arguments(tensors), num_warps=num_warps, num_stages=num_stages)
