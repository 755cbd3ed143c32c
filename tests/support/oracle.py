"""How outputs are compared: our error against an fp64 oracle, as a multiple of the error eager torch makes.

Eager torch in the same dtype sets the scale, so no tolerance is ever chosen by hand: two norms, mean and max, and the
same places finite, infinite and NaN.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# fp64 has no wider oracle: results must agree to a few thousand roundings of the largest value.
NEAR_EXACT = 1e-12


def _check_alike(ours: Tensor, other: Tensor, name: str) -> None:
    assert ours.shape == other.shape, f"shape {tuple(ours.shape)}, {name} has {tuple(other.shape)}"
    assert ours.device == other.device, f"on {ours.device}, {name} on {other.device}"


def assert_near_exact(ours: Tensor, oracle: Tensor, *, what: str = "output") -> None:
    """Two fp64 results of any shape agree to `NEAR_EXACT` of the largest magnitude, with equal NaN and inf masks."""
    from diffulex.cli.accuracy import mask_problem  # here, not above: some tests begin without diffulex

    assert ours.dtype == oracle.dtype == torch.float64, f"{what}: {ours.dtype}, oracle in {oracle.dtype}"
    _check_alike(ours, oracle, "oracle")
    misplaced = mask_problem(ours, oracle)
    assert not misplaced, f"{what}: {misplaced}"
    finite = oracle.isfinite()
    if finite.any():
        error, scale = (ours - oracle)[finite].abs().max().item(), oracle[finite].abs().max().item()
        assert error <= NEAR_EXACT * scale, f"{what}: error {error:.3g}, scale {scale:.3g}"


def assert_oracle_ratio(ours: Tensor, eager: Tensor, oracle: Tensor, *, what: str = "output") -> None:
    """Our error against the fp64 oracle is at most a small multiple of what eager torch makes in the same dtype.

    ours and eager of one shape and dtype, oracle fp64. Mean error <= 1.1x, max error <= 2x + one rounding band of the
    dtype; 10x in both norms for fp32; near exact for fp64. Masks of NaN and infinities equal those of the oracle.
    """
    from diffulex.cli.accuracy import compare_errors

    assert ours.dtype == eager.dtype, f"{what}: {ours.dtype}, eager made {eager.dtype}"
    assert oracle.dtype == torch.float64, f"{what}: the oracle is in {oracle.dtype}"
    _check_alike(ours, eager, "eager")
    if ours.dtype == torch.float64:
        assert_near_exact(ours, oracle, what=what)
        return
    _check_alike(ours, oracle, "oracle")
    problem = compare_errors(ours.detach(), eager.detach(), oracle=oracle.detach()).problem
    assert not problem, f"{what}: {problem}"


def joined(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """The function with all its outputs, of any shapes [N, H] and one dtype, in one vector."""
    return lambda *args: torch.cat([value.flatten() for value in function(*args)])


def random_like(tensor: Tensor, *, seed: int = 9) -> Tensor:
    """Normal values of the shape, dtype and device of a tensor; the same on every device, without a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype).to(tensor.device)


def gradients(function: Callable[..., Tensor], args: tuple[Any, ...], grad: Tensor) -> dict[int, Tensor]:
    """d sum(function(*args) * grad) for each argument that asks for a gradient, by position; zeros where unused."""
    wanted = {i: a for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad}
    out = function(*args)
    assert out.shape == grad.shape, f"shape {tuple(out.shape)}, gradient {tuple(grad.shape)}"
    if not out.requires_grad:
        return {i: torch.zeros_like(a) for i, a in wanted.items()}
    found = torch.autograd.grad(out, list(wanted.values()), grad.to(out.dtype), allow_unused=True)
    return {i: torch.zeros_like(a) if g is None else g for (i, a), g in zip(wanted.items(), found, strict=True)}


class CountOps(TorchDispatchMode):
    """Counts the calls of `torch.ops.diffulex` inside the block, by name: `.calls["moe_expert_up"]`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "diffulex":
            self.calls[func._schema.name.removeprefix("diffulex::")] += 1
        return func(*args, **(kwargs or {}))
