"""Swapping one module: its class is replaced, its output compared with what it was, and put back where they differ."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowering.errors import Reason, ReasonCode

from .form import Adapted, Candidate, adapted_class

# of the norm of what the module itself returns; roundings, summed in another order, stay below
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def swap(module: nn.Module, candidate: Candidate) -> None:
    """Give the module, and the children that go with it, the classes of a form."""
    for name, form in (*candidate.children, ("", candidate.form)):
        part: Any = module.get_submodule(name)
        part.__class__ = adapted_class(form, type(part), options=candidate.options)
        part.prepare()


def unswap(module: nn.Module) -> None:
    """Give each adapted module in and below this one its own class back."""
    for part in module.modules():
        if isinstance(part, Adapted):
            part.restore()
            part.__class__ = part.stock


def try_swap(module: nn.Module, candidate: Candidate) -> Reason | None:
    """Swap the module if it then computes on a random input what it does now; otherwise leave it, and say why."""
    with _quiet(module):
        try:
            inputs = candidate.sample(module, torch.Generator().manual_seed(0))
            wanted = candidate.run(module, inputs)
        except Exception as error:
            return Reason(ReasonCode.UNVERIFIED, f"its own forward fails on a random input: {_told(error)}")
        swap(module, candidate)
        try:
            problem = _difference(candidate.run(module, inputs), wanted)
        except Exception as error:
            problem = Reason(ReasonCode.UNLIKE, f"the ops fail on a random input: {_told(error)}")
    if problem is not None:
        unswap(module)
    return problem


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextlib.contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast; all as before afterwards, the random state included."""
    modes = {part: part.training for part in module.modules()}
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(sorted(devices, key=str)):
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def _difference(ours: Any, stock: Any) -> Reason | None:
    (got, shape), (wanted, wanted_shape) = pytree.tree_flatten(ours), pytree.tree_flatten(stock)
    if shape != wanted_shape:
        return Reason(ReasonCode.UNLIKE, "it returns values of another structure")
    for mine, own in zip(got, wanted, strict=True):
        if not isinstance(own, Tensor):
            continue
        problem = _tensor_difference(mine, own)
        if problem is not None:
            return problem
    return None


def _tensor_difference(mine: Tensor, own: Tensor) -> Reason | None:
    if (mine.shape, mine.dtype) != (own.shape, own.dtype):
        got, wanted = f"{mine.dtype} {tuple(mine.shape)}", f"{own.dtype} {tuple(own.shape)}"
        return Reason(ReasonCode.UNLIKE, f"it returns {got} where the module returns {wanted}")
    if not own.is_floating_point():
        return None if torch.equal(mine, own) else Reason(ReasonCode.UNLIKE, "it returns other integers")
    size, error = own.double().norm().item(), (mine.double() - own.double()).norm().item()
    if not 0 < size < float("inf"):
        return Reason(ReasonCode.UNVERIFIED, "its output on a random input is zero or not finite: are weights loaded?")
    if error <= TOLERANCES.get(own.dtype, 0.0) * size:
        return None
    return Reason(ReasonCode.UNLIKE, f"outputs on a random input differ by {error / size:.1e} of their size")
