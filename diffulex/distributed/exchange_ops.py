"""Where the ops stand through which ranks exchange something: `diffulex_exchange::name`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
) -> Any:
    """The default overload of an op that `function` computes on every device.

    Every rank takes part, whatever becomes of the results: a compiler that left it out where a rank has no tokens, and
    so no use for them, would have the others wait for that rank.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=tags)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.fx.has_side_effect(op)
    return op
