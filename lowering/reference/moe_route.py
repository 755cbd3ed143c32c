"""Oracle of routing: one token at a time, every choice written out as a loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spec import RoutingSpec


def moe_route_reference(
    logits_TC: Tensor,
    spec: RoutingSpec,
    *,
    bias_E: Tensor | None = None,
    ids_TK: Tensor | None = None,
    per_expert_scale_E: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """weights_TW [T, K + n_shared] in `dtype` and ids_TW [T, K + n_shared] int32 for logits [T, E + n_shared] of any
    floating dtype.

    The K experts with the greatest score + bias [E], in descending order; the lowest index wins a tie and NaN counts as
    the greatest. Given ids [T, K] replace the selection; those outside [0, E) come back as E + n_shared and weigh
    nothing. Shared columns follow, with ids E, E + 1, ... The scale [E] multiplies the weights last.
    """
    num_tokens, num_columns = logits_TC.shape
    num_experts = num_columns - spec.n_shared
    spec.check(num_experts)
    score_dtype = logits_TC.dtype if spec.score_dtype == "logits" else getattr(torch, spec.score_dtype)
    biased_dtype = score_dtype if bias_E is None else torch.promote_types(score_dtype, bias_E.dtype)
    weights_TW = torch.zeros(num_tokens, spec.top_k + spec.n_shared, dtype=dtype)
    chosen_TW = torch.zeros(num_tokens, spec.top_k + spec.n_shared, dtype=torch.int32)
    for token in range(num_tokens):
        capped_C = _capped(logits_TC[token].to(dtype), spec.softcap)
        scores_C = _rounded(_scores(capped_C, spec.score), score_dtype)
        biased_E = scores_C[:num_experts]
        if bias_E is not None:
            biased_E = _rounded(biased_E + bias_E.to(dtype), biased_dtype)
        on_E = biased_E
        if spec.select_on == "logits":
            on_E = capped_C[:num_experts] if bias_E is None else capped_C[:num_experts] + bias_E.to(dtype)
        if ids_TK is not None:
            chosen = [i if 0 <= i < num_experts else num_columns for i in ids_TK[token].tolist()]
        else:
            rounded_to = biased_dtype if spec.select_on == "scores" else dtype
            chosen = _greatest(_outside_groups_filled(on_E, spec, rounded_to), spec.top_k)
        chosen += range(num_experts, num_columns)
        weighed_C = torch.cat([biased_E, scores_C[num_experts:]]) if spec.bias_in_weights else scores_C
        weights_TW[token] = _weights(weighed_C, chosen, spec)
        for k in range(spec.top_k):
            if per_expert_scale_E is not None and chosen[k] < num_experts:
                weights_TW[token, k] *= per_expert_scale_E[chosen[k]].to(dtype)
        chosen_TW[token] = torch.tensor(chosen)
    return weights_TW, chosen_TW


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).to(values.dtype) if dtype in (torch.float16, torch.bfloat16) else values


def _capped(logits_C: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits_C / softcap) if softcap else logits_C


def _scores(logits_C: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return torch.softmax(logits_C, 0)
    if score == "sigmoid":
        return torch.sigmoid(logits_C)
    return torch.sqrt(torch.nn.functional.softplus(logits_C))


def _outside_groups_filled(biased_E: Tensor, spec: RoutingSpec, rounded_to: torch.dtype) -> list[float]:
    """Selection scores, with `group_fill` for the experts of the groups that were not kept."""
    values = biased_E.tolist()
    if spec.n_group == 1:
        return values
    size = len(values) // spec.n_group
    group_scores = []
    for group in range(spec.n_group):
        members = biased_E[group * size : (group + 1) * size]
        best = [members[i] for i in _greatest(members.tolist(), min(2, size))]
        top2 = spec.group_score == "top2_sum" and size > 1
        group_scores.append(float(_rounded(best[0] + best[1], rounded_to)) if top2 else float(best[0]))
    kept = _greatest(group_scores, spec.topk_group)
    return [value if i // size in kept else float(spec.group_fill) for i, value in enumerate(values)]


def _greatest(values: list[float], count: int) -> list[int]:
    """Indices of the `count` greatest values, descending; the lowest index among equals, NaN above everything."""
    chosen: list[int] = []
    for _ in range(count):
        best = -1
        for index, value in enumerate(values):
            if index not in chosen and (best < 0 or _above(value, values[best])):
                best = index
        chosen.append(best)
    return chosen


def _above(value: float, other: float) -> bool:
    if math.isnan(other):
        return False
    return math.isnan(value) or value > other


def _weights(scores_C: Tensor, chosen: list[int], spec: RoutingSpec) -> Tensor:
    valid = [k for k, column in enumerate(chosen) if column < len(scores_C)]
    chosen_V = scores_C[[chosen[k] for k in valid]]
    divisor = _divisor(chosen_V, spec) if spec.norm else torch.ones((), dtype=scores_C.dtype)
    weights_W = torch.zeros(len(chosen), dtype=scores_C.dtype)
    for k, weight in zip(valid, chosen_V, strict=True):
        weights_W[k] = weight / divisor * spec.scale
    return weights_W


def _divisor(chosen_V: Tensor, spec: RoutingSpec) -> Tensor:
    total = torch.zeros((), dtype=chosen_V.dtype if spec.norm == 1 else torch.float64)
    for weight in chosen_V:
        total = total + (weight if spec.norm == 1 else weight.double().abs() ** spec.norm)
    norm = (total if spec.norm == 1 else total ** (1 / spec.norm)).to(chosen_V.dtype)
    if not spec.eps:
        return norm
    return norm + spec.eps if spec.eps_mode == "add" else torch.clamp_min(norm, spec.eps)
