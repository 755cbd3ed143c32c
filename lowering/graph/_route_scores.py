"""Score functions of routers in decomposed ATen: softmax, sigmoid and sqrt(softplus) over the last dimension."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from .dataflow import (
    arguments,
    aten,
    has_no_elements,
    has_shape,
    is_last_dim,
    is_op,
    peel_casts,
    peel_copies,
    peel_views,
    same_value,
    tensor_of,
)


def match_score(node: Node) -> tuple[str, Node] | None:
    """Name of the score function in `RoutingSpec` and the node it is applied to, or None."""
    for name, match in _MATCHERS.items():
        inner = match(peel_copies(node))
        if isinstance(inner, Node):
            return name, inner
    return None


def is_row_reduction(node: Any, source: Any, *ops: Any) -> bool:
    """Whether `node` [..., 1] is a reduction of `source` [..., E] over its last dimension by one of `ops`.

    The kept dimension may come from keepdim or from a view. Casts around the sum are rounding and are passed over.
    """
    node = peel_casts(node)
    if is_op(node, aten.expand):
        node = peel_casts(node.args[0])
    if not isinstance(node, Node) or not has_shape(node, (*tensor_of(source).shape[:-1], 1)):
        return False
    node = peel_casts(peel_views(node))
    if is_op(node, operator.getitem) and node.args[1] == 0:
        node = node.args[0]  # the values of a maximum that also gives its index
    if not is_op(node, *ops):
        return False
    given = arguments(node)
    return is_last_dim(given["dim"], given["self"]) and same_value(peel_casts(given["self"]), peel_casts(source))


def _softmax(node: Node) -> Any:
    """x of `exp(x - max(x)) / sum(exp(x - max(x)))` or of an undecomposed softmax."""
    if is_op(node, aten._softmax, aten.softmax):
        given = arguments(node)
        return given["self"] if is_last_dim(given["dim"], node) else None
    if not is_op(node, aten.div.Tensor):
        return None
    exp = peel_copies(node.args[0])
    if not is_op(exp, aten.exp) or not is_row_reduction(node.args[1], exp, aten.sum.dim_IntList):
        return None
    shifted = peel_copies(exp.args[0])
    if has_no_elements(exp) and not is_op(shifted, aten.sub):
        return shifted  # torch 2.11 leaves the maximum out where there is nothing to take it of
    if not is_op(shifted, aten.sub.Tensor) or arguments(shifted)["alpha"] != 1:
        return None
    logits, largest = shifted.args[:2]
    return logits if is_row_reduction(largest, logits, aten.amax, aten.max.dim) else None


def _sigmoid(node: Node) -> Any:
    """x of `sigmoid(x)`."""
    return node.args[0] if is_op(node, aten.sigmoid.default) else None


def _sqrtsoftplus(node: Node) -> Any:
    """x of `sqrt(softplus(x))` with softplus' defaults, beta 1 and threshold 20."""
    inner = peel_copies(node.args[0]) if is_op(node, aten.sqrt.default) else None
    if is_op(inner, aten.softplus):
        given = arguments(inner)
        return given["self"] if (given["beta"], given["threshold"]) == (1, 20) else None
    if not is_op(inner, aten.where.self):
        return None
    is_large, logits, log1p = inner.args
    if not is_op(is_large, aten.gt.Scalar) or is_large.args[1] != 20 or not is_op(log1p, aten.log1p):
        return None
    exp = log1p.args[0]
    same = is_op(exp, aten.exp) and same_value(exp.args[0], logits) and same_value(is_large.args[0], logits)
    return logits if same else None


_MATCHERS = {"softmax": _softmax, "sigmoid": _sigmoid, "sqrtsoftplus": _sqrtsoftplus}
