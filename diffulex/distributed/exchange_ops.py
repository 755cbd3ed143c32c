"""Where the ops stand through which ranks exchange something: `diffulex_exchange::name`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowering.ops._gradients import register_gradients
from lowering.ops._library import FOLLOWING_OPS

NAMESPACE = "diffulex_exchange"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(
    schema: str,
    function: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = (),
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define an op that `function` computes on every device, and return what calls it with the schema's arguments.

    Every rank takes part, whatever becomes of the results, and all of them in one order: a compiler that left the op
    out where a rank has no tokens, and so no use for them, or put it before another that it does not depend on, would
    have ranks wait for one another. So it counts as having side effects, and the op has one more argument, `follows`,
    for the last output of the op before it, a tensor [0] that says nothing: `order_pass` gives it in every graph.
    """
    name, _, _ = schema.partition("(")
    given, _, returned = schema.partition(" -> ")
    several = returned.startswith("(")
    _LIBRARY.define(f"{given[:-1]}, Tensor? follows=None) -> ({returned.strip('()')}, Tensor)", tags=tags)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    count = len(op._schema.arguments) - 1

    def marked(of: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> tuple[Any, ...]:
            results = of(*args[:count])
            results = results if several else (results,)
            return *results, _first_tensor(results).new_empty(0, dtype=torch.int32)

        return run

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        if setup_context is not None:
            setup_context(ctx, inputs[:count], output[:-1] if several else output[0])

    _LIBRARY.impl(name, marked(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", marked(fake), lib=_LIBRARY)
    if backward is not None:
        back = backward
        register_gradients(
            _LIBRARY, name, backward=lambda ctx, *grads: (*back(ctx, *grads[:-1]), None), setup_context=keep
        )
    torch.fx.has_side_effect(op)
    FOLLOWING_OPS.add(f"{NAMESPACE}::{name}")

    def call(*args: Any) -> Any:
        results = op(*args)
        return results[:-1] if several else results[0]

    return call


def _first_tensor(results: Sequence[Any]) -> Tensor:
    return results[0] if isinstance(results[0], Tensor) else _first_tensor(results[0])
