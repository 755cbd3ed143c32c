"""Gradients of `moe_route`, in differentiable ATen: with respect to the logits, to the scale of each expert, and to the
bias where it stays in the weights. The choice itself has none. Rounded scores have the gradients of exact ones, since
Inductor would leave the rounding out.

Shapes: C = E + n_shared columns of the logits, W = K + n_shared columns of the results. An id >= C means nobody.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import RoutingSpec
from ._route_aten import capped, divisor_of, norm_of, pad_shared, raw_weights, scores_of, wide_dtype

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward needs: tensors as `route` takes them, and the ids it gave."""
    logits_TC, bias_E, ids_TK, *options, per_expert_scale_E = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.spec, ctx.given, ctx.num_options = RoutingSpec(*options), ids_TK is not None, len(options)
    bias_E = bias_E if ctx.spec.bias_in_weights else None
    ctx.save_for_backward(logits_TC, output[1], bias_E, per_expert_scale_E)


def backward(ctx: Any, grad_TW: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the op's arguments, None for those that have none."""
    grads = _gradients(grad_TW, *ctx.saved_tensors, spec=ctx.spec, given=ctx.given)
    return grads[0], grads[1], *[None] * (1 + ctx.num_options), grads[2]


def _gradients(
    grad_TW: Tensor,
    logits_TC: Tensor,
    ids_TW: Tensor,
    bias_E: Tensor | None,
    per_expert_scale_E: Tensor | None,
    *,
    spec: RoutingSpec,
    given: bool,
) -> Gradients:
    """Gradients of the logits [T, C], of the bias [E] and of the scale [E], in their dtypes."""
    num_columns, wide = logits_TC.shape[1], wide_dtype(logits_TC)
    ids_TW = ids_TW.long()
    index_TW = ids_TW.clamp(max=num_columns - 1) if given else ids_TW
    valid_TW = ids_TW < num_columns if given else None
    whole_rows = spec.score == "softmax"
    scores_TC = scores_of(capped(logits_TC, spec.softcap), "softmax") if whole_rows else None
    capped_TW = capped(logits_TC.gather(1, index_TW).to(wide), spec.softcap)
    scores_TW = scores_of(capped_TW, spec.score) if scores_TC is None else scores_TC.gather(1, index_TW)
    raw_TW = raw_weights(scores_TW, bias_E, index_TW, spec=spec)
    raw_TW = raw_TW if valid_TW is None else torch.where(valid_TW, raw_TW, 0.0)
    grad_TW = grad_TW.to(wide) * spec.scale
    grad_scale_E = None
    if per_expert_scale_E is not None:
        share_TW = grad_TW * (raw_TW / _divisor(raw_TW, valid_TW, spec) if spec.renorm else raw_TW)
        grad_scale_E = _per_expert(share_TW, ids_TW, num_columns, spec=spec, given=given).to(per_expert_scale_E.dtype)
        grad_TW = grad_TW * pad_shared(per_expert_scale_E.to(wide), spec, 1.0)[index_TW]
    if valid_TW is not None:
        grad_TW = torch.where(valid_TW, grad_TW, 0.0)
    if spec.renorm:
        grad_TW = _through_division(grad_TW, raw_TW, valid_TW, spec)
    grad_bias_E = None
    if bias_E is not None:
        grad_bias_E = _per_expert(grad_TW, ids_TW, num_columns, spec=spec, given=given).to(bias_E.dtype)
    if scores_TC is None:
        grad_TW = grad_TW * _slope(capped_TW, scores_TW, spec.score)
        grad_TC = _spread(grad_TW, ids_TW, num_columns, given=given)
    else:
        mean_T1 = (grad_TW * scores_TW).sum(1, keepdim=True)
        grad_TC = scores_TC * (_spread(grad_TW, ids_TW, num_columns, given=given) - mean_T1)
    if spec.softcap:
        grad_TC = grad_TC * (1 - (capped(logits_TC, spec.softcap) / spec.softcap).square())
    return grad_TC.to(logits_TC.dtype), grad_bias_E, grad_scale_E


def _per_expert(values_TW: Tensor, ids_TW: Tensor, num_columns: int, *, spec: RoutingSpec, given: bool) -> Tensor:
    """[E]: the sum over tokens of the values [T, W] of each expert."""
    return _spread(values_TW, ids_TW, num_columns, given=given)[:, : num_columns - spec.n_shared].sum(0)


def _divisor(raw_TW: Tensor, valid_TW: Tensor | None, spec: RoutingSpec) -> Tensor:
    """[T, 1]: what the weights are divided by; 1 where no id of a token is valid."""
    divisor_T1 = divisor_of(raw_TW, spec)
    return divisor_T1 if valid_TW is None else torch.where(valid_TW.any(1, keepdim=True), divisor_T1, 1.0)


def _through_division(grad_TW: Tensor, raw_TW: Tensor, valid_TW: Tensor | None, spec: RoutingSpec) -> Tensor:
    """The gradient of weights [T, W] before their division from the one after."""
    divisor_T1 = _divisor(raw_TW, valid_TW, spec)
    inner_T1 = (grad_TW * raw_TW).sum(1, keepdim=True) / divisor_T1
    if spec.eps and spec.eps_mode == "clamp_min":
        inner_T1 = torch.where(norm_of(raw_TW, spec) < spec.eps, 0.0, inner_T1)
    if spec.renorm == 1:
        grad_TW = (grad_TW - inner_T1) / divisor_T1
    else:
        grad_TW = (grad_TW - inner_T1 * _norm_slope(raw_TW, spec)) / divisor_T1
    return grad_TW if valid_TW is None else torch.where(valid_TW, grad_TW, 0.0)


def _norm_slope(raw_TW: Tensor, spec: RoutingSpec) -> Tensor:
    """d norm / d weight [T, W] of a p-norm: sign(w) (|w| / norm) ** (p - 1), and 0 at a weight of 0."""
    share_TW = raw_TW.abs() / norm_of(raw_TW, spec)
    share_TW = torch.where(raw_TW == 0, 1.0, share_TW).pow(spec.renorm - 1)
    return raw_TW.sign() * share_TW


def _spread(values_TW: Tensor, ids_TW: Tensor, num_columns: int, *, given: bool) -> Tensor:
    """[T, C]: the sum of the values [T, W] of each column; ids [T, W] int64 in [0, C], where C means none.

    Without atomics: equal ids of a token are added up where the first of them stands; the others go to column C.
    """
    if given:
        same_TWW = ids_TW.unsqueeze(2) == ids_TW.unsqueeze(1)
        values_TW = torch.where(same_TWW, values_TW.unsqueeze(1), 0.0).sum(2)
        ids_TW = torch.where(same_TWW.tril(-1).any(2), num_columns, ids_TW)
    zeros = values_TW.new_zeros(values_TW.shape[0], num_columns + int(given))
    return zeros.scatter(1, ids_TW, values_TW)[:, :num_columns]


def _slope(logits_TW: Tensor, scores_TW: Tensor, score: str) -> Tensor:
    """Derivative of an elementwise score, [T, W] fp32 or fp64."""
    if score == "sigmoid":
        return scores_TW * (1 - scores_TW)
    # softplus' / (2 sqrt(softplus)), and 0 where the score is 0
    return torch.where(scores_TW > 0, torch.sigmoid(logits_TW) / (2 * scores_TW), 0.0)
