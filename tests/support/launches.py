"""Kernels of the standalone host without a GPU: launched in Triton's interpreter, or compiled for a faked H100."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowering.inductor.fake_device import fake_gpu
from lowering.templates import standalone

from .interpreter import interpreter


class _Interpreted:
    """Stands in for a `triton.jit` function: `function[grid](*args, **options)` changes the tensors in place."""

    def __init__(self, kernel: standalone.StandaloneKernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, num_warps: int, num_stages: int) -> None:
            after = interpreter().kernel(self.kernel.source, args, grid=grid, name=self.kernel.name)
            for before, value in zip(args, after, strict=True):
                if isinstance(before, Tensor) and not torch.equal(before, value):
                    before.copy_(value)

        return launch


def interpret(monkeypatch: Any) -> None:
    """Until the test ends, `standalone.launch` runs kernels in the interpreter, on CPU tensors of any shape [N, H] in
    fp32 or fp16.
    """
    monkeypatch.setattr(standalone, "_jit_function", _Interpreted)


def compile_for_h100(
    text: str, shapes: Mapping[str, Tensor], *, constants: Mapping[str, Any], num_warps: int, num_stages: int
) -> tuple[Any, dict[str, int]]:
    """Triton's compiled kernel for sm_90, and registers and spilled bytes per thread as ptxas reports them.

    shapes: tensors of any shape [N, H] and dtype, on the meta device.
    """
    import triton
    from torch._inductor.utils import fresh_cache

    with fake_gpu(), fresh_cache(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        standalone._loaded.cache_clear()  # compiled kernels are kept there too
        kernel = standalone.compile_only(
            text, shapes, name="moe_x", constants=constants, num_warps=num_warps, num_stages=num_stages
        )
    patterns = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill"}
    return kernel, {name: sum(map(int, re.findall(found, log.getvalue()))) for name, found in patterns.items()}


def sass_of(kernel: Any) -> list[str]:
    """All instructions of a compiled kernel. Triton's own listing ends at the 4096th."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", cubin.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]*;)", listing)


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor of a shape [N, H], without data."""
    return torch.empty(shape, dtype=dtype, device="meta")
