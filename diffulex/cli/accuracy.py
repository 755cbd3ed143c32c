"""The ratio rule: an error against an fp64 oracle, as a multiple of the error eager torch makes in the same dtype.

No tolerance is chosen by hand. Mean error at most 1.1 times, largest at most 2 times and one rounding of the largest
value; 10 times both for float32, where eager is too close to exact to be a scale. NaN and infinities are at the same
places.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_LIMITS = {torch.float32: (10.0, 10.0)}
_LIMITS_16_BIT = (1.1, 2.0)
_KINDS = (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf))


class Widen(TorchFunctionMode):
    """Models compute norms and router scores in float32 whatever their dtype; here that means float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = pytree.tree_map_only(torch.dtype, _wider, (args, kwargs or {}))
        return func(*args, **kwargs)


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else dtype


class Oracle:
    """A float64 copy of a transformers model that runs eagerly, with transformers' plain loop over the experts."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).double()
        self.model.set_experts_implementation("eager")

    def __call__(self, function: Any, *args: Any) -> Tensor:
        """`function(*args)`, which returns a tensor [...] of float64 and may use the parts of `self.model`."""
        args = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
        with torch.no_grad(), Widen():
            return function(*args)


@dataclasses.dataclass(frozen=True)
class ErrorRatio:
    """Our error over eager's in two norms, None where there is nothing to compare; `problem`: what breaks the rule."""

    mean: float | None
    largest: float | None
    problem: str = ""

    def __str__(self) -> str:
        if self.mean is None or self.largest is None:
            return "empty"
        return f"{self.mean:.2f} / {self.largest:.2f}"


def error_ratio(ours: Sequence[Tensor], eager: Sequence[Tensor], *, oracle: Sequence[Tensor]) -> ErrorRatio:
    """Compare outputs of several inputs as one: ours and eager [...] of one dtype, oracle [...] float64, in pairs.

    Where there are values but none is finite, nothing is compared, and that is a problem.
    """
    if [tuple(t.shape) for t in ours] != [tuple(t.shape) for t in oracle]:
        return ErrorRatio(None, None, f"shapes {_shapes(ours)}, expected {_shapes(oracle)}")
    if {t.dtype for t in ours} != {t.dtype for t in eager}:
        return ErrorRatio(None, None, f"{ours[0].dtype}, eager returns {eager[0].dtype}")
    mine, stock, exact = (torch.cat([t.detach().flatten() for t in tensors]) for tensors in (ours, eager, oracle))
    found = compare_errors(mine, stock, oracle=exact)
    if mine.numel() and found.mean is None and not found.problem:
        return dataclasses.replace(found, problem=f"none of {mine.numel()} values is finite")
    return found


def mask_problem(ours: Tensor, oracle: Tensor) -> str:
    """What is not alike in the NaN and the infinities of two tensors [...] of one shape and dtype, or nothing."""
    for name, kind in _KINDS:
        here, there = kind(ours), kind(oracle)
        if not torch.equal(here, there):
            return f"{name} at {int(here.sum())} places, the oracle has {int(there.sum())}"
    return ""


def compare_errors(ours: Tensor, eager: Tensor, *, oracle: Tensor) -> ErrorRatio:
    """The rule for ours and eager [...] of one dtype and oracle [...] float64, all of one shape.

    Eager's error counts as at least that of the oracle rounded once to the dtype: luck is no scale. Where eager alone
    is not finite ours is held to the scale of the other places.
    """
    rounded = oracle.to(ours.dtype)
    if misplaced := mask_problem(ours, rounded):
        return ErrorRatio(None, None, misplaced)
    finite = rounded.isfinite()
    if not finite.any():
        return ErrorRatio(None, None)
    error, rounding, scale = (
        (tensor[places].double() - oracle[places]).abs()
        for tensor, places in ((ours, finite), (rounded, finite), (eager, finite & eager.isfinite()))
    )
    scale = torch.cat([scale, scale.new_zeros(0 if scale.numel() else 1)])
    band = torch.finfo(ours.dtype).eps * oracle[finite].abs().max()
    mean_limit, max_limit = _LIMITS.get(ours.dtype, _LIMITS_16_BIT)
    mean_scale, max_scale = max(scale.mean(), rounding.mean()), max(scale.max(), rounding.max())
    problem = ""
    if error.mean() > mean_limit * mean_scale:
        problem = f"mean error over {mean_limit} x eager's: {error.mean():.3g}, eager's {mean_scale:.3g}"
    elif error.max() > max_limit * max_scale + band:
        problem = f"largest error over {max_limit} x eager's: {error.max():.3g}, eager's {max_scale:.3g}"
    return ErrorRatio(_over(error.mean(), mean_scale), _over(error.max(), max_scale), problem)


def _over(error: Tensor, scale: Tensor) -> float:
    return float(error / scale) if scale > 0 else float(error > 0)


def _shapes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors)
