"""Gradients of ops, in torch's own autograd and in the transforms of `torch.func`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from ..errors import MoEUnsupportedError


def register_gradients(
    library: torch.library.Library,
    name: str,
    *,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None,
) -> None:
    """What `torch.library.register_autograd` does, for an op `name` of the library without keyword-only arguments, and
    `torch.func` besides, which wants an `autograd.Function` whose forward has no context.

    Derivatives in forward mode raise `MoEUnsupportedError`.
    """
    op = getattr(getattr(torch.ops, library.ns), name).default
    stock = make_autograd_impl(op, Info(backward, setup_context))
    defaults = [argument.default_value for argument in op._schema.arguments]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if setup_context is not None:
            setup_context(ctx=ctx, inputs=inputs, output=output)

    def forward(*args: Any) -> Any:
        # a transform around this one differentiates this call, although autograd functions run without gradients
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def no_tangent(ctx: Any, *tangents: Any) -> NoReturn:
        raise MoEUnsupportedError.of(
            f"{library.ns}::{name}",
            expected="derivatives in reverse mode",
            got="a tangent, as of torch.func.jvp or jacfwd",
            hint="Use torch.func.vjp, jacrev or grad.",
        )

    members = {"forward": forward, "setup_context": keep, "backward": backward, "jvp": no_tangent}
    function: Any = type(f"_{name}", (_SingleLevelFunction,), {key: staticmethod(f) for key, f in members.items()})

    def kernel(keys: Any, *args: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()
        if transformed or forward_ad._current_level >= 0:  # where torch would lose the tangents without a word
            with enable_single_level_autograd_function():
                return function.apply(*args, *defaults[len(args) :])  # the dispatcher leaves out what equals a default
        return stock(keys, *args)

    library.impl(name, kernel, "Autograd", with_keyset=True)
