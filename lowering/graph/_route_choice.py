"""What a router's top-k is made on: scores [T, E], plus a bias for the selection, masked by groups of experts.

Groups: E = G*S. Each group gets a score (its maximum, or the sum of its two largest), the best groups are kept, the
experts of the others are filled with -inf or 0. The mask is ones scattered over zeros [T, G], spread to the experts.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ..errors import ReasonCode
from ._route_scores import match_score
from .dataflow import (
    VIEWS,
    arguments,
    aten,
    cast_source,
    constant,
    describe,
    has_shape,
    is_last_dim,
    is_op,
    is_output,
    peel_casts,
    peel_copies,
    peel_views,
    refuse,
    require,
    same_value,
    tensor_of,
)


class Groups(NamedTuple):
    """The group options of RoutingSpec and the top-k that keeps groups."""

    options: dict[str, Any]
    topk: Node


class Choice(NamedTuple):
    """The parts of a selection input: `biased` [T, E] float32 is what is masked by groups, if there are any, and is
    scores [T, E] plus bias ([E] or [1, E]), if there is one.
    """

    biased: Node
    scores: Node
    bias: Node | None
    groups: Groups | None


class _Mask(NamedTuple):
    """`scores` [T, E] or [T, G, S] where `mask` keeps, `fill` elsewhere; `keeps`: a set mask keeps."""

    scores: Node
    mask: Node
    keeps: bool
    fill: float


def read_topk(topk: Node) -> tuple[Node, int]:
    """Input and K of a top-k of the largest values over the last dimension."""
    given = arguments(topk)
    require(bool(given["largest"]), "a top-k selects the smallest values", code=ReasonCode.OPTION)
    require(isinstance(given["k"], int) and given["k"] > 0, "a top-k does not select a constant number of values")
    require(is_last_dim(given["dim"], given["self"]), "a top-k is not over the experts but over another dimension")
    return given["self"], given["k"]


def read_choice(selected: Node) -> Choice:
    """Take the selection input [T, E], float32, apart."""
    require(
        tensor_of(selected).dtype == torch.float32,
        f"the selection is made on scores in {tensor_of(selected).dtype}, the op selects on float32",
        code=ReasonCode.DTYPE,
    )
    mask = _read_mask(selected)
    if mask is None:
        choice = peel_copies(selected)
        return Choice(choice, *without_bias(choice), None)
    choice = peel_views(mask.scores)
    require(has_shape(choice, tensor_of(selected).shape), "the masked scores are not a [T, E] matrix")
    bias = without_bias(choice)
    groups = _read_groups(mask, choice)
    # A mask that keeps every group has no effect.
    all_kept = groups.options["topk_group"] == groups.options["n_group"]
    return Choice(choice, *bias, None if all_kept else groups)


def without_bias(choice: Node) -> tuple[Node, Node | None]:
    """Take `scores + bias` with scores [T, E] and bias [E] or [1, E], any float dtypes, apart."""
    if not is_op(choice, aten.add.Tensor):
        return choice, None
    require(arguments(choice)["alpha"] == 1, "the selection bias has a factor", code=ReasonCode.OPTION)
    num_experts = tensor_of(choice).shape[1]
    found = []
    for scores, bias in (choice.args[:2], choice.args[1::-1]):
        if not isinstance(scores, Node) or not isinstance(bias, Node) or not tensor_of(bias).is_floating_point():
            continue
        if has_shape(bias, (num_experts,)) or has_shape(bias, (1, num_experts)):
            found.append((peel_copies(scores), bias))
    require(bool(found), "what is added to the scores is not one bias per expert", code=ReasonCode.OPTION)
    # With one token, both terms look like a bias.
    return next((pair for pair in found if match_score(pair[0])), found[0])


def _read_mask(selected: Node) -> _Mask | None:
    node = peel_views(selected)
    if is_op(node, aten.where.self):
        mask, kept, other = node.args
        fill, keeps = constant(other), True
        if fill is None:
            fill, keeps, kept = constant(kept), False, other
    elif is_op(node, aten.masked_fill):
        kept, mask, filled = node.args
        fill, keeps = constant(filled), False
    else:
        return None
    if fill is None or not isinstance(kept, Node) or not isinstance(mask, Node):
        refuse("the scores are replaced by something else than a constant where a mask says so")
    require(has_shape(node, tensor_of(kept).shape), "the mask repeats the scores")
    require(fill in (-math.inf, 0), f"masked experts get the score {fill}", code=ReasonCode.OPTION)
    return _Mask(kept, mask, keeps, fill)


def _read_groups(mask: _Mask, choice: Node) -> Groups:
    scatter, keeps = _read_scatter(mask)
    given = arguments(scatter)
    require(tensor_of(scatter).dim() == 2 and is_last_dim(given["dim"], scatter), "the group mask is not [T, G]")
    zeros_to_ones = constant(given["self"]) == 0 and constant(given.get("value")) not in (None, 0)
    require(zeros_to_ones, "the group mask is not ones scattered over zeros")
    require(keeps, "the chosen groups are masked and the others are kept", code=ReasonCode.OPTION)
    num_groups, num_experts = tensor_of(scatter).shape[1], tensor_of(choice).shape[1]
    if not isinstance(num_groups, int) or not isinstance(num_experts, int) or num_experts % num_groups:
        refuse("the groups are not of one constant size", code=ReasonCode.SHAPE)
    _check_spread(mask, scatter, size=num_experts // num_groups)
    index = peel_casts(given["index"])
    topk = index.args[0] if is_op(index, operator.getitem) else None
    if not is_op(topk, aten.topk) or not is_output(index, topk, index=1):
        refuse("the group mask does not come from a top-k")
    group_scores, kept = read_topk(topk)
    options = {
        "n_group": num_groups,
        "topk_group": kept,
        "group_score": _group_score(group_scores, choice, shape=(num_groups, num_experts // num_groups)),
        "group_fill": "0" if mask.fill == 0 else "-inf",
    }
    return Groups(options, topk)


def _spread(node: Any) -> tuple[Any, bool] | None:
    """The input of an op that only reshapes, repeats, casts or tests a mask of 0 and 1, and whether it negates it."""
    node = peel_copies(node)
    if is_op(node, *VIEWS, aten.expand) or (isinstance(node, Node) and cast_source(node) is not None):
        return node.args[0], False
    if is_op(node, aten.bitwise_not, aten.logical_not) and tensor_of(node).dtype == torch.bool:
        return node.args[0], True
    if is_op(node, aten.ne.Scalar, aten.gt.Scalar, aten.eq.Scalar) and node.args[1] == 0:
        return node.args[0], is_op(node, aten.eq)
    return None


def _read_scatter(mask: _Mask) -> tuple[Node, bool]:
    """The scatter at the root of a mask and whether its ones are what stays."""
    node, keeps = peel_copies(mask.mask), mask.keeps
    while not is_op(node, aten.scatter.value):
        step = _spread(node)
        if step is None:
            refuse(f"the mask of the scores comes from {describe(node)}, not from groups of experts")
        node, keeps = peel_copies(step[0]), keeps != step[1]
    return node, keeps


def _check_spread(mask: _Mask, scatter: Node, *, size: int) -> None:
    """Every step from the scatter [T, G] to the mask has one of the shapes in which group g covers experts g*S...: a
    repetition along another dimension would pass through another shape.
    """
    tokens, groups = tensor_of(scatter).shape
    shapes = ((tokens, groups), (tokens, groups, 1), (tokens, groups, size), (tokens, groups * size))
    node: Any = mask.mask
    while node is not scatter:
        require(any(has_shape(node, shape) for shape in shapes), "the group mask is not spread over its own experts")
        step = _spread(node)
        node = step[0] if step is not None else scatter


def _group_score(node: Node, choice: Node, *, shape: tuple[int, int]) -> str:
    """Name of the group score, computed over [T, G, S]."""
    node = peel_copies(node)
    if is_op(node, operator.getitem) and is_op(node.args[0], aten.max.dim) and node.args[1] == 0:
        node = node.args[0]
    require(is_op(node, aten.amax, aten.max.dim, aten.sum.dim_IntList), f"groups are scored by {describe(node)}")
    given = arguments(node)
    require(is_last_dim(given["dim"], given["self"]), "groups are not scored over their own experts")
    grouped, name = given["self"], "max"
    if is_op(node, aten.sum):
        name, values = "top2_sum", peel_copies(grouped)
        topk = values.args[0] if is_op(values, operator.getitem) else None
        if not is_op(topk, aten.topk) or not is_output(values, topk, index=0):
            refuse(f"groups are scored by the sum of {describe(values)}", code=ReasonCode.OPTION)
        grouped, count = read_topk(topk)
        require(count == 2, f"groups are scored by the sum of their {count} largest scores", code=ReasonCode.OPTION)
    rows = tensor_of(choice).shape[0]
    require(
        has_shape(grouped, (rows, *shape)) and same_value(peel_views(grouped), choice),
        "groups are not scored on the scores that the experts are selected by",
    )
    return name
