"""Rows computed one by one, where results may not depend on the batch: libraries choose kernels by the number of rows.

Vector loops, too, end in a scalar rest, whose functions round otherwise. Slow: it is there to be right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..state import is_batch_invariant


def rows_alone(function: Callable[..., Any], *rows: Tensor | None) -> Any:
    """`function` of tensors [N, ...] or None, any dtype: one call, or where results may not depend on the batch one for
    each row, with a copy of it, and what they give put together. Its result is a tensor [N, ...] or a tuple of them.

    A copy begins where an allocation does, so that no kernel is chosen by the row's own address.
    """
    count = next(tensor for tensor in rows if tensor is not None).shape[0]
    if count == 0 or not is_batch_invariant():
        return function(*rows)
    parts = [function(*(None if tensor is None else _copied(tensor, row) for tensor in rows)) for row in range(count)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _copied(rows: Tensor, row: int) -> Tensor:
    return rows[row : row + 1].clone(memory_format=torch.contiguous_format)
