"""Whether two runs of a module return the same, and how what went wrong in one is told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowering.errors import Reason, ReasonCode

# of the norm of what the module itself returns; roundings, summed in another order, stay below
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# what code of others raises that does not run on inputs made up for it; what else there is, memory that is spent and
# mistakes of this package among it, goes through
FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


def told(error: Exception) -> str:
    """The type of an error and the first line of its message; errors that say nothing about the module are raised."""
    if isinstance(error, torch.OutOfMemoryError | RecursionError):
        raise error
    return f"{type(error).__name__}: {error}".splitlines()[0]


def difference(ours: Any, stock: Any, *, slack: float = 1.0) -> Reason | None:
    """Why two nested values of tensors are not equal up to rounding. slack: a factor on what rounding is allowed."""
    (got, shape), (wanted, wanted_shape) = pytree.tree_flatten(ours), pytree.tree_flatten(stock)
    if shape != wanted_shape:
        return Reason(ReasonCode.UNLIKE, "it returns values of another structure")
    for mine, own in zip(got, wanted, strict=True):
        if isinstance(own, Tensor) != isinstance(mine, Tensor):
            return Reason(ReasonCode.UNLIKE, "it returns values of another structure")
        problem = _tensor_difference(mine, own, slack) if isinstance(own, Tensor) else None
        if problem is not None:
            return problem
    return None


def _tensor_difference(mine: Tensor, own: Tensor, slack: float) -> Reason | None:
    if (mine.shape, mine.dtype) != (own.shape, own.dtype):
        got, wanted = f"{mine.dtype} {tuple(mine.shape)}", f"{own.dtype} {tuple(own.shape)}"
        return Reason(ReasonCode.UNLIKE, f"it returns {got} where the module returns {wanted}")
    if not own.is_floating_point():
        return None if torch.equal(mine, own) else Reason(ReasonCode.UNLIKE, "it returns other integers")
    size, error = own.double().norm().item(), (mine.double() - own.double()).norm().item()
    if not 0 < size < float("inf"):
        return Reason(ReasonCode.UNVERIFIED, "its output on a random input is zero or not finite: are weights loaded?")
    if error <= TOLERANCES.get(own.dtype, 0.0) * slack * size:
        return None
    return Reason(ReasonCode.UNLIKE, f"outputs on a random input differ by {error / size:.1e} of their size")
