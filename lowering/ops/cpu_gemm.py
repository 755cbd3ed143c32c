"""Expert GEMMs on a CPU: rows of a few experts at a time, each expert's product in the way that is fastest here.

Which way that is follows from what torch and the processor say of themselves, never from a clock: the ways differ in
the last bits, and processes that work on one model have to agree.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..state import is_batch_invariant
from ._rows import rows_alone

Chunk = list[tuple[int, int, int]]  # (expert, its first row, its last row + 1)

_ROWS_AT_ONCE = 256  # of all experts together: what is gathered, computed and activated stays in the cache
_WIDENED = 1 << 19  # fp32 elements of a weight that are widened at once, 2 MiB
_LEAST_WIDENED_ROWS = 6  # with fewer, widening the weight costs more than the product
_FEW_ROWS = 256  # with more, both products are equally fast


def hit_experts(bounds: list[int]) -> Chunk:
    """The experts that have rows, in their order; bounds [E+1]: the first row of each, and the end."""
    return [(expert, start, end) for expert, (start, end) in enumerate(itertools.pairwise(bounds)) if start < end]


def chunks(experts: Chunk) -> Iterator[tuple[int, int, Chunk]]:
    """(first row, last row + 1, experts) of consecutive experts with few rows together, or of a single one."""
    chunk: Chunk = []
    for expert, start, end in experts:
        if chunk and end - chunk[0][1] > _ROWS_AT_ONCE:
            yield chunk[0][1], chunk[-1][2], chunk
            chunk = []
        chunk.append((expert, start, end))
    if chunk:
        yield chunk[0][1], chunk[-1][2], chunk


def expert_products(
    rows_RX: Tensor, weight_EYX: Tensor, bias_EY: Tensor | None, out_RY: Tensor, *, experts: Chunk
) -> None:
    """out = rows @ weight[e].T + bias[e] for the rows of a chunk of experts.

    weight [E, Y, X], of any strides, and bias [E, Y] in the dtype of rows. out [R, Y], which is overwritten, in the
    dtype of rows or, of 16-bit ones, in fp32.
    """
    dtype, alone = rows_RX.dtype, is_batch_invariant()
    free = weight_EYX[0].is_contiguous() and not alone
    few = _FEW_ROWS if free and dtype == torch.float32 and is_transposed_faster() else 0
    least_widened = _LEAST_WIDENED_ROWS if free and has_no_units_for(dtype) else rows_RX.shape[0] + 1
    counts = [end - start for _, start, end in experts]
    weight_EXY = weight_EYX.transpose(1, 2)
    # many views of one tensor are made together for what a few cost one by one
    views = weight_EXY.unbind() if 4 * len(experts) > weight_EXY.shape[0] else weight_EXY
    for (expert, _, _), count, rows, out in zip(
        experts, counts, rows_RX.split(counts), out_RY.split(counts), strict=True
    ):
        bias_Y = None if bias_EY is None else bias_EY[expert]
        if 1 < count <= few:
            _transposed(rows, weight_EYX[expert], bias_Y, out)
        elif count >= least_widened:
            _transposed(rows.float(), weight_EYX[expert], bias_Y, out)
        elif alone or out.dtype != dtype:
            out.copy_(rows_alone(functools.partial(_direct, views[expert], bias_Y), rows))
        elif bias_Y is None:
            torch.mm(rows, views[expert], out=out)
        else:
            torch.addmm(bias_Y, rows, views[expert], out=out)


def _direct(weight_XY: Tensor, bias_Y: Tensor | None, rows_RX: Tensor) -> Tensor:
    # to `out`: autocast would change the dtype of a result of its own
    out_RY = rows_RX.new_empty(rows_RX.shape[0], weight_XY.shape[1])
    if bias_Y is None:
        return torch.mm(rows_RX, weight_XY, out=out_RY)
    return torch.addmm(bias_Y, rows_RX, weight_XY, out=out_RY)


def _transposed(rows_RX: Tensor, weight_YX: Tensor, bias_Y: Tensor | None, out_RY: Tensor) -> None:
    """(weight @ rows.T).T + bias in fp32, the dtype of rows; a 16-bit weight is widened."""
    num_rows = rows_RX.shape[0]
    multiple = 4 if num_rows <= 4 else 8 if num_rows <= 8 else 16  # other row counts take up to twice as long
    rows_XP = torch.nn.functional.pad(rows_RX, (0, 0, 0, -num_rows % multiple)).t()
    out_YP = rows_RX.new_empty(weight_YX.shape[0], rows_XP.shape[1])
    if weight_YX.dtype == torch.float32:
        torch.mm(weight_YX, rows_XP, out=out_YP)
    else:
        height = max(1, _WIDENED // weight_YX.shape[1])
        wide = rows_RX.new_empty(min(height, weight_YX.shape[0]), weight_YX.shape[1])
        for part, out in zip(weight_YX.split(height), out_YP.split(height), strict=True):
            torch.mm(wide[: part.shape[0]].copy_(part), rows_XP, out=out)
    made_RY = out_YP[:, :num_rows].t()
    out_RY.copy_(made_RY if bias_Y is None else made_RY + bias_Y)


@functools.cache
def has_no_units_for(dtype: torch.dtype) -> bool:
    """Whether torch computes products of a 16-bit dtype without the processor's help, much slower than in fp32."""
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def is_transposed_faster() -> bool:
    """Whether the transposed fp32 product of few rows is faster than the direct one: by up to two where it is.

    MKL divides products of few rows badly among threads on processors of other makers; with one thread both are alike.
    Measured on AMD EPYC, 2 threads: 1.6 to 2 times at 4 to 32 rows, 1.1 to 1.3 up to 256.
    """
    return torch.get_num_threads() > 1 and _is_mkl_abroad()


@functools.cache
def _is_mkl_abroad() -> bool:
    """Whether products are MKL's on an x86 processor that is not Intel's."""
    return torch.backends.mkl.is_available() and _vendor() not in ("", "GenuineIntel")


def _vendor() -> str:
    """The maker's name of itself in an x86 processor, as Linux tells it; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    return found.group(1) if found else ""
