"""Recognise a router's formula in a functional ATen graph, from the weights back to the logits.

A router picks K of E experts with one top-k and weighs them. Verified are: where the weights come from (the top-k's
values, or a gather at its indices; a score function after the selection; renormalised; scaled), what the selection is
made on, and what the scores are. Whatever is not verified is refused with a typed reason.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ..errors import ReasonCode
from ..spec import RoutingSpec
from ._route_choice import read_choice, read_topk, without_bias
from ._route_scores import is_row_reduction, match_score
from .dataflow import (
    arguments,
    aten,
    cast_source,
    constant,
    describe,
    has_shape,
    is_last_dim,
    is_op,
    is_output,
    origin,
    peel_casts,
    peel_copies,
    peel_widening,
    refuse,
    require,
    same_value,
    tensor_of,
)

_HALVES = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class RouteFormula:
    """A verified router: the value of `weights` [T, K] and the indices of `topk` [T, K] are what `diffulex::moe_route`
    computes under `spec` from `logits` [T, E] (float16, bfloat16, float32) and `bias` ([E] or [1, E], any float dtype).

    The values of `topk` are those of `selected` [T, E] at its indices; `group_topk` keeps groups, None without groups.
    """

    spec: RoutingSpec
    logits: Node
    bias: Node | None
    topk: Node
    weights: Node
    selected: Node
    group_topk: Node | None = None


class _Divisor(NamedTuple):
    """The sum that weights are divided by, with an eps that is added to it or that it is at least."""

    eps: float = 0.0
    mode: str = "add"


class _Weights(NamedTuple):
    """The end of a formula: K values picked from `source` [T, E], then `score` (None: applied before), and so on."""

    source: Node
    score: str | None
    divisor: _Divisor | None
    scale: float


def match_formula(weights: Node, topk: Node) -> RouteFormula:
    """Verify that `weights` [T, K], any float dtype, are the weights of the experts that `topk` selects.

    The weights of the result stand behind casts, views and runtime factors of the given ones. Raises `MatchError`.
    """
    selected, top_k = read_topk(topk)
    require(tensor_of(selected).dim() == 2, "the selection is not on a [T, E] matrix", code=ReasonCode.SHAPE)
    end = _behind_factors(weights, topk)
    require(has_shape(end, (tensor_of(selected).shape[0], top_k)), "the weights are not one per chosen expert")
    read = _read_weights(end, topk)
    if read.score is not None:
        return _score_after_selection(read, topk, end)
    choice = read_choice(selected)
    score, logits = _scores(choice.scores)
    logits, softcap = _uncapped(logits)
    options = choice.groups.options if choice.groups else {}
    stays = False
    if same_value(read.source, selected):
        # The weights are masked scores. Scores are never negative: filled with 0, a masked expert is chosen only in a
        # tie with a kept score of 0 and weighs 0. With "-inf" the op gives the same weights.
        stays = choice.bias is not None
        masked = stays and choice.groups is not None
        require(not masked, "the selection bias stays in the weights of masked scores", code=ReasonCode.OPTION)
        options = options and {**options, "group_fill": "-inf"}
    elif not same_value(peel_casts(read.source), choice.scores):
        stays = choice.bias is not None and same_value(peel_casts(read.source), choice.biased)
        require(stays, "the weights are gathered from another tensor than the scores of the selection")
    spec = _spec(top_k, score, read, softcap=softcap, bias_in_weights=stays, **options)
    _check_groups(spec, logits)
    group_topk = choice.groups.topk if choice.groups else None
    return RouteFormula(spec, logits, choice.bias, topk, end, choice.biased, group_topk)


def _spec(top_k: int, score: str, read: _Weights, **options: Any) -> RoutingSpec:
    eps, mode = read.divisor or _Divisor()
    renorm = 0.0 if read.divisor is None else 1.0
    return RoutingSpec(top_k, score, renorm=renorm, eps=eps, eps_mode=mode, scale=read.scale, **options)


def _score_after_selection(read: _Weights, topk: Node, end: Node) -> RouteFormula:
    """A score function of the chosen logits: the selection is on logits. A softmax over the chosen logits is the
    renormalised softmax over all.
    """
    selected, top_k = read_topk(topk)
    source, bias = peel_widening(read.source), None
    logits = _logits(selected)
    node = peel_copies(selected)
    if not same_value(source, logits) and is_op(node, aten.add.Tensor) and isinstance(node.args[1], Node):
        scores, bias = without_bias(node)
        logits = _logits(scores)
    same = same_value(source, logits) and (bias is None or tensor_of(selected).dtype == torch.float32)
    require(same, "the weights are picked from another tensor than the selection is made on")
    read = read._replace(divisor=_Divisor()) if read.score == "softmax" else read
    logits, softcap = _uncapped(logits)
    spec = _spec(top_k, str(read.score), read, softcap=softcap, select_on="logits")
    return RouteFormula(spec, logits, bias, topk, end, selected)


def _check_groups(spec: RoutingSpec, logits: Node) -> None:
    """Refuse where masked experts must be chosen, because too few are kept."""
    if spec.n_group > 1:
        kept = tensor_of(logits).shape[1] // spec.n_group * spec.topk_group
        detail = f"{spec.top_k} experts are chosen where the groups keep {kept}"
        require(spec.top_k <= kept, detail, code=ReasonCode.OPTION)


def _behind_factors(weights: Node, topk: Node) -> Node:
    """The node behind casts, views and factors that stay in the graph, applied to the op's weights: one runtime number
    for all weights (under dynamic=True a float attribute of the model is an input), a factor of each chosen expert.
    """
    while True:
        node = origin(weights)
        if is_op(node, aten.mul.Tensor):
            left, right = node.args
            if isinstance(left, Node) and _is_factor(right, topk):
                node = left
            elif isinstance(right, Node) and _is_factor(left, topk):
                node = right
        if node is weights:
            return node
        weights = node


def _is_factor(node: Any, topk: Node) -> bool:
    return _is_runtime_number(node) or _is_picked_per_expert(node, topk)


def _is_picked_per_expert(node: Any, topk: Node) -> bool:
    """Whether a node [T, K] is a vector [E] at the top-k's indices."""
    node = peel_casts(node)
    if not is_op(node, aten.index.Tensor):
        return False
    given = arguments(node)
    (ids, *others), is_vector = given["indices"], tensor_of(given["self"]).dim() == 1
    return is_vector and not others and is_output(peel_casts(ids), topk, index=1)


def _is_runtime_number(node: Any) -> bool:
    return isinstance(node, Node) and constant(node) is None and has_shape(node, ())


def _read_weights(end: Node, topk: Node) -> _Weights:
    node, scale = _without_scale(end)
    picked = _picked(node, topk)
    if picked is not None:
        return _Weights(*picked, divisor=None, scale=scale)
    require(is_op(node, aten.div.Tensor), f"the weights come from {describe(node)}")
    numerator, denominator = node.args
    picked = _picked(numerator, topk)
    if picked is None:
        refuse(f"the weights come from a division of {describe(numerator)}, which the top-k does not pick")
    source, score = picked
    require(score != "softmax", "a softmax over the chosen values is normalised again", code=ReasonCode.OPTION)
    return _Weights(source, score, divisor=_divisor(numerator, denominator), scale=scale)


def _without_scale(node: Node) -> tuple[Node, float]:
    """Peel `* c` with a constant c."""
    node = peel_casts(node)
    if not is_op(node, aten.mul.Tensor, aten.mul.Scalar):
        return node, 1.0
    for rest, factor in (node.args, node.args[::-1]):
        scale = constant(factor)
        if scale is not None and isinstance(rest, Node):
            return peel_casts(rest), float(scale)
    return refuse("the weights are scaled by a tensor", code=ReasonCode.OPTION)


def _picked(node: Any, topk: Node) -> tuple[Node, str | None] | None:
    """What the K values are picked from and the score function applied to them after the selection, if any."""
    node = peel_casts(node)
    source = _source(node, topk)
    if source is not None or not isinstance(node, Node):
        return None if source is None else (source, None)
    scored = match_score(node)
    if scored is None:
        return None
    source = _source(peel_widening(scored[1]), topk)
    return None if source is None else (source, scored[0])


def _source(node: Any, topk: Node) -> Node | None:
    """[T, E] where the node [T, K] is the top-k's values or a gather from [T, E] at its indices."""
    if is_output(node, topk, index=0):
        return arguments(topk)["self"]
    if is_op(node, aten.gather.default):
        given = arguments(node)
        if is_last_dim(given["dim"], given["self"]) and is_output(peel_casts(given["index"]), topk, index=1):
            return given["self"]
    return None


def _divisor(numerator: Any, denominator: Any) -> _Divisor:
    """The eps of `x / (sum(x) + eps)` or `x / max(sum(x), eps)`."""
    denominator, divisor = peel_casts(denominator), _Divisor()
    if is_op(denominator, aten.clamp_min.default, aten.clamp.default):
        given = arguments(denominator)
        least = constant(given["min"])
        if least is None or not 0 < least < math.inf or given.get("max") is not None:
            refuse("the sum of the weights is clamped, but not from below by a constant", code=ReasonCode.OPTION)
        denominator, divisor = given["self"], _Divisor(float(least), "clamp_min")
    elif is_op(denominator, aten.add.Tensor, aten.add.Scalar):
        added = constant(denominator.args[1])
        if added is None or arguments(denominator)["alpha"] != 1 or not 0 <= added < math.inf:
            refuse("what is added to the sum of the weights is no constant of at least 0", code=ReasonCode.OPTION)
        denominator, divisor = denominator.args[0], _Divisor(float(added))
    is_sum = is_row_reduction(denominator, numerator, aten.sum.dim_IntList)
    require(is_sum, "the weights are divided by something else than their sum over the chosen experts")
    return divisor


def _uncapped(logits: Node) -> tuple[Node, float]:
    """x and cap of logits `cap * tanh(x / cap)` in fp32; any others as they are, with 0."""
    if is_op(logits, aten.mul.Tensor, aten.mul.Scalar) and tensor_of(logits).dtype == torch.float32:
        for tanh, factor in (logits.args, logits.args[::-1]):
            cap = constant(factor)
            inner = tanh.args[0] if is_op(tanh, aten.tanh.default) else None
            if not cap or not 0 < cap < math.inf or not is_op(inner, aten.div.Tensor, aten.div.Scalar):
                continue
            if constant(inner.args[1]) == cap and isinstance(inner.args[0], Node):
                return _logits(inner.args[0]), float(cap)
    return logits, 0.0


def _scores(scores: Node) -> tuple[str, Node]:
    """Name of the score function and the logits."""
    scored = match_score(scores)
    if scored is not None:
        return scored[0], _logits(scored[1])
    source = cast_source(scores)
    rounded = source is not None and tensor_of(source).dtype in _HALVES
    require(not rounded, "the scores are rounded to 16 bits before the selection", code=ReasonCode.DTYPE)
    return refuse(
        f"the selection is made on {describe(scores)}, not on a score function of the logits that the op knows"
    )


def _logits(node: Node) -> Node:
    """The logits [T, E] in the dtype they were computed in."""
    logits = peel_widening(node)
    dtype = tensor_of(logits).dtype
    require(dtype in (*_HALVES, torch.float32), f"the logits are {dtype}", code=ReasonCode.DTYPE)
    require(tensor_of(logits).dim() == 2, "the logits are not a [T, E] matrix", code=ReasonCode.SHAPE)
    return logits
