"""Which tokens a router decides clearly: two experts within rounding of each other may be swapped in any run.

A token that goes to another expert differs by far more than rounding. Errors are compared where stock eager could not
have changed the choice; the outputs of what is being judged play no part in this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .accuracy import Oracle


@contextlib.contextmanager
def _router_logits(module: nn.Module) -> Iterator[list[Tensor]]:
    """The logits [T, E] of each router of `module`, appended as they are computed by an eager forward."""
    seen: list[Tensor] = []

    def keep(_router: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output[0].detach().double())

    routers = [child for name, child in module.named_modules() if name.rpartition(".")[2] == "gate"]
    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def clear_choices(logits_TE: Tensor, exact_TE: Tensor, *, top_k: int) -> Tensor:
    """Tokens [T], bool, whose `top_k` experts of E are the same whatever errors the logits have.

    exact: logits [T, E] float64; logits [T, E] in any floating dtype differ from them by rounding, the largest
    difference is what every logit may be off by.
    """
    if exact_TE.shape[0] == 0 or top_k == exact_TE.shape[1]:
        return torch.ones(exact_TE.shape[0], dtype=torch.bool, device=exact_TE.device)
    error = (logits_TE.double() - exact_TE).abs().max()
    best_TE = exact_TE.sort(dim=-1, descending=True).values
    return best_TE[:, top_k - 1] - best_TE[:, top_k] > 2 * error


def reference(
    run: Callable[[Any, Tensor], Tensor], inputs: Tensor, *, module: nn.Module, exact: nn.Module, oracle: Oracle
) -> tuple[Tensor, Tensor]:
    """The float64 output [1, T, V] of `run(exact, inputs)`, and the tokens [T], bool, that all routers decide.

    `module` runs eagerly, `exact` is its counterpart in `oracle`; inputs [1, T] int64 or [1, T, H] floating.
    """
    with torch.no_grad(), _router_logits(module) as stock:
        run(module, inputs)
    with _router_logits(exact) as wide:
        output = oracle(lambda given: run(exact, given), inputs)
    clear_T = torch.ones(inputs.shape[1], dtype=torch.bool, device=inputs.device)
    for logits_TE, exact_TE in zip(stock, wide, strict=True):
        clear_T &= clear_choices(logits_TE, exact_TE, top_k=oracle.model.config.num_experts_per_tok)
    return output, clear_T
