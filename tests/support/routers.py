"""Routers written by hand, logits [T, E] to weights [T, K] and ids [T, K]: what `moe_route` covers, and what not.

`MATCHED` names the spec of each formula that is understood; `REFUSED` says why the others are not. Every function takes
logits and a bias per expert [E], used or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lowering.errors import ReasonCode
from lowering.spec import RoutingSpec

T, E, K, G = 13, 16, 3, 4
Routed = tuple[Tensor, Tensor]
Router = Callable[[Tensor, Tensor], Routed]


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1, dtype=torch.float32)


def _renormed(weights: Tensor, eps: float = 0.0) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + eps) if eps else weights / weights.sum(-1, keepdim=True)


def _group_mask(group_scores: Tensor, kept: int = 2) -> Tensor:
    """[T, E] with 1 for the experts of the best groups, as DeepSeek's code makes it."""
    index = torch.topk(group_scores, kept, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(group_scores)
    mask.scatter_(1, index, 1)
    return mask.unsqueeze(-1).expand(-1, G, E // G).reshape(-1, E)


def _top2(scores: Tensor, count: int = 2) -> Tensor:
    return scores.view(-1, G, E // G).topk(count, dim=-1)[0].sum(-1)


# --- understood -----------------------------------------------------------------------------------------------------


def softmax_topk(logits: Tensor, bias: Tensor) -> Routed:
    return torch.topk(_softmax(logits), K, dim=-1)


def softmax_topk_renorm(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), ids


def softmax_written_out(logits: Tensor, bias: Tensor) -> Routed:
    exp = (logits.float() - logits.float().max(-1, keepdim=True)[0]).exp()
    weights, ids = (exp / exp.sum(1).unsqueeze(1)).topk(K, 1)
    return weights / weights.sum(1)[:, None].expand_as(weights), ids


def softmax_gathered(logits: Tensor, bias: Tensor) -> Routed:
    ids = torch.topk(_softmax(logits), K)[1]
    return _softmax(logits).gather(1, ids).clone() * 0.5, ids


def topk_softmax(logits: Tensor, bias: Tensor) -> Routed:
    values, ids = torch.topk(logits, K, dim=-1)
    return torch.softmax(values, dim=1, dtype=values.dtype), ids


def topk_softmax_gathered(logits: Tensor, bias: Tensor) -> Routed:
    ids = torch.topk(logits.float(), K, dim=-1)[1]
    return logits.gather(1, ids).float().softmax(-1), ids


def sigmoid_bias(logits: Tensor, bias: Tensor) -> Routed:
    scores = torch.sigmoid(logits.float())
    ids = torch.topk(scores + bias, K, dim=1, sorted=False)[1]
    return _renormed(scores.gather(1, ids), 1e-6) * 2.5, ids


def sigmoid_twice(logits: Tensor, bias: Tensor) -> Routed:
    ids = torch.topk(bias[None] + logits.float().sigmoid(), K)[1]
    return 1.5 * logits.float().sigmoid().gather(-1, ids).to(logits.dtype), ids


def sigmoid_groups(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    choice = scores + bias
    choice = choice.masked_fill(~_group_mask(_top2(choice)).bool(), float("-inf"))
    ids = torch.topk(choice, K, dim=-1, sorted=False)[1]
    return _renormed(scores.gather(1, ids), 1e-20) * 2.5, ids


def sigmoid_groups_in_three_dims(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    groups = (scores + bias).view(-1, G, E // G)
    kept = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, groups.amax(-1).topk(2)[1], True)
    ids = torch.where(kept[..., None], groups, -math.inf).flatten(1).topk(K)[1]
    return _renormed(scores.gather(1, ids)), ids


def sigmoid_groups_filled_with_zero(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    choice = scores + bias
    ids = torch.topk(choice.masked_fill(_group_mask(_top2(choice)) == 0, 0.0), K)[1]
    return scores.gather(1, ids), ids


def sigmoid_every_group(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = scores.masked_fill(~_group_mask(_top2(scores), G).bool(), float("-inf")).topk(K)[1]
    return _renormed(scores.gather(1, ids)), ids


def softmax_groups(logits: Tensor, bias: Tensor) -> Routed:
    scores = _softmax(logits)
    mask = _group_mask(scores.view(-1, G, E // G).max(dim=-1).values)
    weights, ids = torch.topk(scores.masked_fill(~mask.bool(), 0.0), K, dim=-1, sorted=False)
    return weights * 16.0, ids


def sqrtsoftplus_bias(logits: Tensor, bias: Tensor) -> Routed:
    scores = torch.nn.functional.softplus(logits.float()).sqrt()
    ids = torch.topk(scores + bias, K)[1]
    return _renormed(scores.gather(1, ids), 1e-20), ids


def renorm_clamped(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return weights / weights.sum(-1, keepdim=True).clamp(min=0.5), ids


def scaled_per_expert(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return _renormed(weights) * bias[ids], ids


def bias_stays(logits: Tensor, bias: Tensor) -> Routed:
    return torch.topk(_softmax(logits) + bias, K)


def sigmoid_after_selection(logits: Tensor, bias: Tensor) -> Routed:
    values, ids = torch.topk(logits, K)
    return torch.sigmoid(values), ids


def sigmoid_after_biased_selection(logits: Tensor, bias: Tensor) -> Routed:
    logits = logits.float()
    ids = torch.topk(logits + bias, K, dim=-1)[1]
    return _renormed(logits.gather(1, ids).sigmoid()) * 2.5, ids


def sigmoid_capped(logits: Tensor, bias: Tensor) -> Routed:
    scores = torch.sigmoid(torch.tanh(logits.float() / 3.0) * 3.0)
    ids = torch.topk(scores, K)[1]
    return _renormed(scores.gather(1, ids)), ids


def softmax_capped_after_selection(logits: Tensor, bias: Tensor) -> Routed:
    values, ids = torch.topk(5.0 * (logits.float() / 5.0).tanh(), K)
    return values.softmax(-1), ids


def bias_stays_gathered(logits: Tensor, bias: Tensor) -> Routed:
    biased = logits.float().sigmoid() + bias
    ids = torch.topk(biased.masked_fill(~_group_mask(_top2(biased)).bool(), float("-inf")), K)[1]
    return _renormed(biased.gather(1, ids), 0.5), ids


def scaled_per_expert_and_by_two(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return bias[ids] * (weights * 2.0), ids


def _spec(score: str, *, renorm: bool = False, **options: float | int | str) -> RoutingSpec:
    return RoutingSpec(top_k=K, score=score, renorm=renorm, **options)  # type: ignore[arg-type]


MATCHED: dict[Router, RoutingSpec] = {
    softmax_topk: _spec("softmax"),
    softmax_topk_renorm: _spec("softmax", renorm=True),
    softmax_written_out: _spec("softmax", renorm=True),
    softmax_gathered: _spec("softmax", scale=0.5),
    topk_softmax: _spec("softmax", renorm=True, select_on="logits"),
    topk_softmax_gathered: _spec("softmax", renorm=True, select_on="logits"),
    sigmoid_after_selection: _spec("sigmoid", select_on="logits"),
    sigmoid_after_biased_selection: _spec("sigmoid", renorm=True, scale=2.5, select_on="logits"),
    sigmoid_capped: _spec("sigmoid", renorm=True, softcap=3.0),
    softmax_capped_after_selection: _spec("softmax", renorm=True, softcap=5.0, select_on="logits"),
    renorm_clamped: _spec("softmax", renorm=True, eps=0.5, eps_mode="clamp_min"),
    bias_stays: _spec("softmax", bias_in_weights=True),
    bias_stays_gathered: _spec("sigmoid", bias_in_weights=True, renorm=True, eps=0.5, n_group=G, topk_group=2),
    scaled_per_expert: _spec("softmax", renorm=True),
    scaled_per_expert_and_by_two: _spec("softmax", scale=2.0),
    sigmoid_bias: _spec("sigmoid", renorm=True, eps=1e-6, scale=2.5),
    sigmoid_twice: _spec("sigmoid", scale=1.5),
    sigmoid_groups: _spec("sigmoid", renorm=True, eps=1e-20, scale=2.5, n_group=G, topk_group=2),
    sigmoid_groups_in_three_dims: _spec("sigmoid", renorm=True, n_group=G, topk_group=2, group_score="max"),
    sigmoid_groups_filled_with_zero: _spec("sigmoid", n_group=G, topk_group=2, group_fill="0"),
    sigmoid_every_group: _spec("sigmoid", renorm=True),
    softmax_groups: _spec("softmax", scale=16.0, n_group=G, topk_group=2, group_score="max"),
    sqrtsoftplus_bias: _spec("sqrtsoftplus", renorm=True, eps=1e-20),
}
SCALED = {scaled_per_expert, scaled_per_expert_and_by_two}
BIASED = {
    sigmoid_bias,
    sigmoid_after_biased_selection,
    bias_stays,
    bias_stays_gathered,
    sigmoid_twice,
    sigmoid_groups,
    sigmoid_groups_in_three_dims,
    sigmoid_groups_filled_with_zero,
    sqrtsoftplus_bias,
}


# --- not understood, each one step away from a formula above ----------------------------------------------------------


def scores_changed_before_selection(logits: Tensor, bias: Tensor) -> Routed:
    return torch.topk(_softmax(logits) * bias, K)


def scores_squared(logits: Tensor, bias: Tensor) -> Routed:
    return torch.topk(_softmax(logits) ** 2, K)


def bias_per_token(logits: Tensor, bias: Tensor) -> Routed:
    return torch.topk(_softmax(logits) + logits[:, :1].float(), K)


def softmax_over_tokens(logits: Tensor, bias: Tensor) -> Routed:
    return torch.topk(logits.float().softmax(0), K)


def softmax_of_other_sum(logits: Tensor, bias: Tensor) -> Routed:
    exp = (logits - logits.amax(-1, keepdim=True)).exp()
    return torch.topk(exp / exp[:, :8].sum(-1, keepdim=True), K)


def softmax_of_other_maximum(logits: Tensor, bias: Tensor) -> Routed:
    exp = (logits - (2 * logits).amax(-1, keepdim=True)).exp()
    return torch.topk(exp / exp.sum(-1, keepdim=True), K)


def softplus_without_root(logits: Tensor, bias: Tensor) -> Routed:
    return torch.topk(torch.nn.functional.softplus(logits.float()), K)


def softplus_of_other_threshold(logits: Tensor, bias: Tensor) -> Routed:
    logits = logits.float()
    return torch.topk(torch.where(logits > 2, logits, logits.exp().log1p()).sqrt(), K)


def smallest(logits: Tensor, bias: Tensor) -> Routed:
    return torch.topk(_softmax(logits), K, largest=False)


def renorm_clamped_from_above(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return weights / weights.sum(-1, keepdim=True).clamp(min=0.1, max=0.5), ids


def renorm_clamped_to_zero(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits) + bias, K)
    return weights / weights.sum(-1, keepdim=True).clamp(min=0.0), ids


def scaled_at_other_ids(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return weights * bias[torch.topk(_softmax(logits) + bias, K)[1]], ids


def bias_stays_masked(logits: Tensor, bias: Tensor) -> Routed:
    biased = logits.float().sigmoid() + bias
    return torch.topk(biased.masked_fill(~_group_mask(_top2(biased)).bool(), 0.0), K)


def sigmoid_after_rounded_selection(logits: Tensor, bias: Tensor) -> Routed:
    logits = logits.bfloat16()
    ids = torch.topk(logits + bias.bfloat16(), K)[1]
    return logits.gather(1, ids).float().sigmoid(), ids


def softmax_of_logits_without_their_bias(logits: Tensor, bias: Tensor) -> Routed:
    ids = torch.topk(logits.float() + bias, K)[1]
    return (logits.float() * 2).gather(1, ids).softmax(-1), ids


def over_tokens(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), logits.shape[0], dim=0)
    return weights[:, :K], ids[:, :K]


def from_sort(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = _softmax(logits).sort(-1, descending=True)
    return weights[:, :K], ids[:, :K]


def ids_changed(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return weights, (ids + 1) % E


def ids_of_other_selection(logits: Tensor, bias: Tensor) -> Routed:
    return torch.topk(_softmax(logits), K)[0], torch.topk(_softmax(logits) + bias, K)[1]


def renorm_over_tokens(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return weights / weights.sum(0, keepdim=True), ids


def renorm_by_all(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    weights, ids = torch.topk(scores, K)
    return weights / scores.sum(-1, keepdim=True), ids


def renorm_by_squares(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return weights / (weights * weights).sum(-1, keepdim=True), ids


def renorm_by_maximum(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return weights / weights.amax(-1, keepdim=True), ids


def renorm_with_tensor_eps(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return weights / (weights.sum(-1, keepdim=True) + bias[:1]), ids


def renorm_less_eps(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return weights / (weights.sum(-1, keepdim=True) + -1e-3), ids


def renorm_with_infinite_eps(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return weights / (weights.sum(-1, keepdim=True) + float("inf")), ids


def renorm_of_scaled(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return (weights * 2) / weights.sum(-1, keepdim=True), ids


def renorm_twice(logits: Tensor, bias: Tensor) -> Routed:
    values, ids = torch.topk(logits.float(), K)
    return _renormed(values.softmax(-1), 0.5), ids


def scaled_per_slot(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return weights * bias[:K], ids


def bias_after_gather(logits: Tensor, bias: Tensor) -> Routed:
    weights, ids = torch.topk(_softmax(logits), K)
    return weights + bias[ids], ids


def bias_with_factor(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = torch.topk(torch.add(scores, bias, alpha=2), K)[1]
    return scores.gather(1, ids), ids


def gathered_from_other_scores(logits: Tensor, bias: Tensor) -> Routed:
    ids = torch.topk(_softmax(logits) + bias, K)[1]
    return logits.float().sigmoid().gather(1, ids), ids


def gathered_at_other_ids(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    return scores.gather(1, torch.topk(scores, K)[1]), torch.topk(scores + bias, K)[1]


def gathered_from_logits(logits: Tensor, bias: Tensor) -> Routed:
    ids = torch.topk(_softmax(logits) + bias, K)[1]
    return logits.gather(1, ids), ids


def softmax_of_other_logits(logits: Tensor, bias: Tensor) -> Routed:
    ids = torch.topk(logits, K)[1]
    return (logits + 1 + bias).gather(1, ids).softmax(-1), ids


def softmax_of_rounded_logits(logits: Tensor, bias: Tensor) -> Routed:
    values, ids = torch.topk(logits.float() + 0.1, K)
    return values.bfloat16().softmax(-1), ids


def softmax_of_gathered_rounded_logits(logits: Tensor, bias: Tensor) -> Routed:
    logits = logits.float() + bias
    ids = torch.topk(logits, K)[1]
    return logits.bfloat16().gather(1, ids).softmax(-1, dtype=torch.float32), ids


def rounded_scores(logits: Tensor, bias: Tensor) -> Routed:
    return torch.topk(torch.softmax(logits.bfloat16(), -1), K)


def rounded_then_widened_scores(logits: Tensor, bias: Tensor) -> Routed:
    return torch.topk(torch.softmax(logits.bfloat16(), -1).float(), K)


def double_scores(logits: Tensor, bias: Tensor) -> Routed:
    return torch.topk(logits.double().softmax(-1), K)


def double_logits(logits: Tensor, bias: Tensor) -> Routed:
    values, ids = torch.topk(logits.double() + 1, K)
    return values.softmax(-1), ids


def groups_inverted(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = scores.masked_fill(_group_mask(_top2(scores)).bool(), float("-inf")).topk(K)[1]
    return scores.gather(1, ids), ids


def groups_by_three(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = scores.masked_fill(~_group_mask(_top2(scores, 3)).bool(), float("-inf")).topk(K)[1]
    return scores.gather(1, ids), ids


def groups_by_mean(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    mask = _group_mask(scores.view(-1, G, E // G).sum(-1))
    ids = scores.masked_fill(~mask.bool(), float("-inf")).topk(K)[1]
    return scores.gather(1, ids), ids


def groups_by_other_scores(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = (scores + bias).masked_fill(~_group_mask(_top2(scores)).bool(), float("-inf")).topk(K)[1]
    return scores.gather(1, ids), ids


def groups_across(logits: Tensor, bias: Tensor) -> Routed:
    """Expert e belongs to group e % G here: the mask is repeated along the other dimension."""
    scores = logits.float().sigmoid()
    kept = torch.zeros(scores.shape[0], G).scatter(1, _top2(scores).topk(2)[1], 1)
    mask = kept.unsqueeze(1).expand(-1, E // G, G).reshape(-1, E)
    ids = scores.masked_fill(~mask.bool(), float("-inf")).topk(K)[1]
    return scores.gather(1, ids), ids


def groups_scattered_over_twos(logits: Tensor, bias: Tensor) -> Routed:
    """The mask is 1 or 2 everywhere, so it keeps every expert."""
    scores = logits.float().sigmoid()
    kept = torch.full((scores.shape[0], G), 2.0).scatter(1, _top2(scores).topk(2)[1], 1)
    mask = kept.unsqueeze(-1).expand(-1, G, E // G).reshape(-1, E)
    ids = scores.masked_fill(~mask.bool(), float("-inf")).topk(K)[1]
    return scores.gather(1, ids), ids


def groups_filled_with_less(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = scores.masked_fill(~_group_mask(_top2(scores)).bool(), -1.0).topk(K)[1]
    return scores.gather(1, ids), ids


def groups_filled_per_expert(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = torch.where(_group_mask(_top2(scores)).bool(), scores, bias).topk(K)[1]
    return scores.gather(1, ids), ids


def groups_too_few(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = scores.masked_fill(~_group_mask(_top2(scores), 1).bool(), float("-inf")).topk(E // G + 1)[1]
    return scores.gather(1, ids), ids


def mask_of_experts(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = scores.masked_fill(bias > 0, float("-inf")).topk(K)[1]
    return scores.gather(1, ids), ids


# router -> code and a part of the detail
REFUSED: dict[Router, tuple[ReasonCode, str]] = {
    scores_changed_before_selection: (ReasonCode.STRUCTURE, "made on aten.mul.Tensor"),
    scores_squared: (ReasonCode.STRUCTURE, "made on aten.pow"),
    bias_per_token: (ReasonCode.OPTION, "not one bias per expert"),
    softmax_over_tokens: (ReasonCode.STRUCTURE, "made on aten.div.Tensor"),
    softmax_of_other_sum: (ReasonCode.STRUCTURE, "made on aten.div.Tensor"),
    softmax_of_other_maximum: (ReasonCode.STRUCTURE, "made on aten.div.Tensor"),
    softplus_without_root: (ReasonCode.STRUCTURE, "something else than a constant where a mask"),
    softplus_of_other_threshold: (ReasonCode.STRUCTURE, "made on aten.sqrt.default"),
    smallest: (ReasonCode.OPTION, "smallest"),
    ids_of_other_selection: (ReasonCode.STRUCTURE, "the weights come from"),
    renorm_clamped_from_above: (ReasonCode.STRUCTURE, "something else than their sum"),
    renorm_clamped_to_zero: (ReasonCode.OPTION, "not from below by a constant"),
    scaled_at_other_ids: (ReasonCode.OPTION, "scaled by a tensor"),
    bias_stays_masked: (ReasonCode.OPTION, "bias stays in the weights of masked"),
    sigmoid_after_rounded_selection: (ReasonCode.STRUCTURE, "another tensor than the selection"),
    softmax_of_logits_without_their_bias: (ReasonCode.STRUCTURE, "another tensor than the selection"),
    renorm_over_tokens: (ReasonCode.STRUCTURE, "something else than their sum"),
    renorm_by_all: (ReasonCode.STRUCTURE, "something else than their sum"),
    renorm_by_squares: (ReasonCode.STRUCTURE, "something else than their sum"),
    renorm_by_maximum: (ReasonCode.STRUCTURE, "something else than their sum"),
    renorm_with_tensor_eps: (ReasonCode.OPTION, "added to the sum"),
    renorm_less_eps: (ReasonCode.OPTION, "added to the sum"),
    renorm_with_infinite_eps: (ReasonCode.OPTION, "added to the sum"),
    renorm_of_scaled: (ReasonCode.STRUCTURE, "division of aten.mul.Tensor"),
    renorm_twice: (ReasonCode.OPTION, "normalised again"),
    scaled_per_slot: (ReasonCode.OPTION, "scaled by a tensor"),
    bias_after_gather: (ReasonCode.STRUCTURE, "the weights come from aten.add.Tensor"),
    bias_with_factor: (ReasonCode.OPTION, "has a factor"),
    gathered_from_other_scores: (ReasonCode.STRUCTURE, "gathered from another tensor"),
    gathered_at_other_ids: (ReasonCode.STRUCTURE, "the weights come from aten.gather"),
    gathered_from_logits: (ReasonCode.STRUCTURE, "gathered from another tensor"),
    softmax_of_other_logits: (ReasonCode.STRUCTURE, "picked from another tensor"),
    softmax_of_rounded_logits: (ReasonCode.STRUCTURE, "the weights come from"),
    softmax_of_gathered_rounded_logits: (ReasonCode.STRUCTURE, "picked from another tensor"),
    rounded_scores: (ReasonCode.DTYPE, "torch.bfloat16"),
    rounded_then_widened_scores: (ReasonCode.DTYPE, "rounded to 16 bits"),
    double_scores: (ReasonCode.DTYPE, "torch.float64"),
    double_logits: (ReasonCode.DTYPE, "torch.float64"),
    groups_inverted: (ReasonCode.OPTION, "the chosen groups are masked"),
    groups_by_three: (ReasonCode.OPTION, "their 3 largest"),
    groups_by_mean: (ReasonCode.OPTION, "the sum of"),
    groups_by_other_scores: (ReasonCode.STRUCTURE, "not scored on the scores"),
    groups_across: (ReasonCode.STRUCTURE, "not spread over its own experts"),
    groups_scattered_over_twos: (ReasonCode.STRUCTURE, "not ones scattered over zeros"),
    groups_filled_with_less: (ReasonCode.OPTION, "get the score -1.0"),
    groups_filled_per_expert: (ReasonCode.STRUCTURE, "something else than a constant"),
    groups_too_few: (ReasonCode.OPTION, "the groups keep 4"),
    mask_of_experts: (ReasonCode.STRUCTURE, "not from groups of experts"),
}
# There is no top-k behind the ids of these.
REFUSED_IDS: dict[Router, tuple[ReasonCode, str]] = {
    over_tokens: (ReasonCode.STRUCTURE, "not from a top-k"),
    from_sort: (ReasonCode.STRUCTURE, "not from a top-k"),
    ids_changed: (ReasonCode.STRUCTURE, "not from a top-k"),
}
