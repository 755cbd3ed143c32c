"""The one place where the ops' schemas stand. `Library.define` costs a third of `custom_op` per eager call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ._gradients import register_gradients

NAMESPACE = "diffulex"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# flexible_layout: the lowerings read strides themselves, so Inductor must not insert copies of the weights.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

_ROUTE_OPTIONS = (
    "int top_k, str score='softmax', int n_group=1, int topk_group=1,"
    " str group_score='top2_sum', str group_fill='-inf', float renorm=1.0, float eps=0.0, float scale=1.0,"
    " float softcap=0.0, str score_dtype='float32', str select_on='scores', bool bias_in_weights=False,"
    " str eps_mode='add', int n_shared=0, Tensor? per_expert_scale=None"
)
SCHEMAS = {
    "moe_route": f"(Tensor logits, Tensor? bias, Tensor? ids, {_ROUTE_OPTIONS}) -> (Tensor weights, Tensor ids)",
    "moe_route_linear": (
        "(Tensor hidden, Tensor weight, Tensor? linear_bias, Tensor? bias, ScalarType product_dtype,"
        f" ScalarType logits_dtype, {_ROUTE_OPTIONS}) -> (Tensor weights, Tensor ids, Tensor logits)"
    ),
    "moe_dispatch": "(Tensor ids, int num_experts) -> (Tensor order, Tensor token, Tensor offsets)",
    "moe_expert_up": (
        "(Tensor hidden, Tensor w13, Tensor? b13, Tensor order, Tensor offsets, int top_k,"
        " str act='identity', bool interleaved=False) -> Tensor"
    ),
    "moe_expert_down": "(Tensor act, Tensor w2, Tensor? b2, Tensor order, Tensor offsets) -> Tensor",
    "moe_expert_grad_weight": (
        "(Tensor left, Tensor right, Tensor? left_index, Tensor? right_index, Tensor offsets) -> Tensor"
    ),
    "moe_combine": "(Tensor slots, Tensor weights, Tensor? ids=None, int num_experts=0) -> Tensor",
    "moe_expert_up_shared": (
        "(Tensor hidden, Tensor w13, Tensor? b13, Tensor order, Tensor offsets, Tensor shared_hidden, Tensor shared_w1,"
        " Tensor? shared_w3, int top_k, str act, bool interleaved=False) -> (Tensor act, Tensor shared)"
    ),
    "moe_expert_down_shared": (
        "(Tensor act, Tensor w2, Tensor? b2, Tensor order, Tensor offsets, Tensor shared, Tensor shared_w2, int top_k)"
        " -> (Tensor slots, Tensor shared)"
    ),
}

# other ops, by name, whose first argument says what comes before them, and is not read
ORDERING_OPS: set[str] = set()

# other ops, by name, which all ranks call in one order: their last argument, `follows`, takes the last output of the op
# before
FOLLOWING_OPS: set[str] = set()

# called whenever a fake function runs, that is while a graph with our ops is traced
TRACE_HOOKS: list[Callable[[], None]] = []


for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=_TAGS)


def register(
    name: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register the implementations of `diffulex::name` and return its default overload."""
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")

    @functools.wraps(fake)
    def traced(*args: Any, **kwargs: Any) -> Any:
        for hook in TRACE_HOOKS:
            hook()
        return fake(*args, **kwargs)

    torch.library.register_fake(f"{NAMESPACE}::{name}", traced, lib=LIBRARY)
    if backward is not None:
        register_gradients(LIBRARY, name, backward=backward, setup_context=setup_context)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_composite(name: str, function: Callable[..., Any]) -> Any:
    """Register `diffulex::name` as what `function` makes of other ops, gradients included; its default overload."""
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    return getattr(getattr(torch.ops, NAMESPACE), name).default
