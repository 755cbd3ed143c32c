"""Oracle of routing: one token at a time, every choice written out as a loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spec import RoutingSpec


def moe_route_reference(
    logits_TE: Tensor,
    spec: RoutingSpec,
    *,
    bias_E: Tensor | None = None,
    ids_TK: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """weights_TK [T, K] in `dtype` and ids_TK [T, K] int32 for logits [T, E] of any floating dtype.

    The K experts with the greatest score + bias [E], in descending order; the lowest index wins a tie and NaN counts as
    the greatest. Given ids [T, K] replace the selection; those outside [0, E) come back as E and weigh nothing.
    """
    num_tokens, num_experts = logits_TE.shape
    spec.check(num_experts)
    weights_TK = torch.zeros(num_tokens, spec.top_k, dtype=dtype)
    chosen_TK = torch.zeros(num_tokens, spec.top_k, dtype=torch.int32)
    for token in range(num_tokens):
        scores_E = _scores(logits_TE[token].to(dtype), spec.score)
        if ids_TK is not None:
            chosen = [i if 0 <= i < num_experts else num_experts for i in ids_TK[token].tolist()]
        else:
            biased_E = scores_E if bias_E is None else scores_E + bias_E.to(dtype)
            chosen = _greatest(_outside_groups_filled(biased_E, spec), spec.top_k)
        weights_TK[token] = _weights(scores_E, chosen, spec)
        chosen_TK[token] = torch.tensor(chosen)
    return weights_TK, chosen_TK


def _scores(logits_E: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return torch.softmax(logits_E, 0)
    if score == "sigmoid":
        return torch.sigmoid(logits_E)
    return torch.sqrt(torch.nn.functional.softplus(logits_E))


def _outside_groups_filled(biased_E: Tensor, spec: RoutingSpec) -> list[float]:
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
        group_scores.append(float(best[0] + best[1]) if top2 else float(best[0]))
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


def _weights(scores_E: Tensor, chosen: list[int], spec: RoutingSpec) -> Tensor:
    total = torch.zeros((), dtype=scores_E.dtype)
    for expert in chosen:
        if expert < len(scores_E):
            total = total + scores_E[expert]
    weights_K = torch.zeros(len(chosen), dtype=scores_E.dtype)
    for k, expert in enumerate(chosen):
        if expert < len(scores_E):
            weight = scores_E[expert] / (total + spec.eps) if spec.renorm else scores_E[expert]
            weights_K[k] = weight * spec.scale
    return weights_K
