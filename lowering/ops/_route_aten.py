"""Routing in ATen: the CPU kernel of `moe_route`, and fp64 on CUDA. Options that are at their defaults cost no call.

Shapes: C = E + n_shared columns of the logits, W = K + n_shared columns of the results. An id >= C means nobody.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import torch
from torch import Tensor

from ..spec import RoutingSpec

Routing = tuple[Tensor, Tensor]

# One call of a stable sort beats the dozen calls that make keys as long as there are few values.
_SORT_VALUES = 2048


def wide_dtype(logits_TC: Tensor) -> torch.dtype:
    """What scores of logits [T, C] of any float dtype are computed in: fp64 for fp64, else fp32."""
    return torch.float64 if logits_TC.dtype == torch.float64 else torch.float32


def rounding(spec: RoutingSpec, logits: torch.dtype, bias: torch.dtype | None = None) -> torch.dtype | None:
    """The 16-bit dtype that scores, or with `bias` that scores plus a bias of this dtype, are rounded to, or None."""
    if spec.score_dtype == "float32":
        return None
    dtype = logits if spec.score_dtype == "logits" else getattr(torch, spec.score_dtype)
    dtype = dtype if bias is None else torch.promote_types(dtype, bias)
    return dtype if dtype.itemsize == 2 else None


def rounded(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Values [T, C] fp32 or fp64, rounded to a dtype, or as they are for None."""
    return values if dtype is None else values.to(dtype).to(values.dtype)


def capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), fp32 or fp64, any shape [T, C]; logits of any float dtype as they are for 0."""
    return torch.tanh(logits.to(wide_dtype(logits)) / softcap) * softcap if softcap else logits


def scores_of(capped_TC: Tensor, score: str) -> Tensor:
    """Scores [T, C] fp32 or fp64 of capped logits [T, C] of any float dtype."""
    wide = wide_dtype(capped_TC)
    if score == "softmax":
        return torch.softmax(capped_TC, 1, dtype=wide)
    if score == "sigmoid":
        return torch.sigmoid(capped_TC.to(wide))
    return torch.nn.functional.softplus(capped_TC.to(wide)).sqrt()


def greatest(values_TX: Tensor, count: int) -> Tensor:
    """Indices [T, count] int64 of the greatest values [T, X] (fp32, fp64), descending; the lowest index wins a tie."""
    if values_TX.dtype == torch.float64 or values_TX.is_cuda or values_TX.numel() <= _SORT_VALUES:
        return values_TX.sort(dim=1, descending=True, stable=True).indices[:, :count]
    # One int64 key per value, none equal: its bits, arranged so that the greatest come first, above its index. NumPy's
    # vectorised sort of these costs less than torch.topk, which leaves ties in any order.
    values = values_TX.numpy()
    bits = values.view(np.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    np.copyto(bits, 0x7FFFFFFF, where=values != values)
    keys = np.empty(values.shape, np.int64)
    halves = keys.view(np.int32).reshape(*values.shape, 2)
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    halves[..., low] = np.arange(values.shape[1], dtype=np.int32)
    np.invert(bits, out=halves[..., high])
    keys.sort(axis=1)
    return torch.from_numpy(halves[:, :count, low].astype(np.int64))


def _top2_sum(values_TGS: Tensor) -> Tensor:
    """[T, G]: the sum of the two greatest of [T, G, S] fp32 or fp64; NaN is the greatest."""
    if values_TGS.is_cuda or values_TGS.numel() <= _SORT_VALUES:
        return values_TGS.topk(2).values.sum(2)
    ordered_TGS = torch.from_numpy(np.sort(values_TGS.numpy(), axis=2))  # a tenth of the time of topk
    return ordered_TGS[:, :, -1] + ordered_TGS[:, :, -2]


def _fill_groups(biased_TE: Tensor, spec: RoutingSpec, rounded_to: torch.dtype | None) -> Tensor:
    """The experts outside the topk_group best groups get group_fill. [T, E] to [T, E] fp32 or fp64."""
    num_experts = biased_TE.shape[1]
    biased_TGS = biased_TE.reshape(-1, spec.n_group, num_experts // spec.n_group)
    if spec.group_score == "top2_sum" and biased_TGS.shape[2] > 1:
        group_TG = rounded(_top2_sum(biased_TGS), rounded_to)
    else:
        group_TG = biased_TGS.amax(2)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, greatest(group_TG, spec.topk_group), True)
    return torch.where(kept_TG.unsqueeze(2), biased_TGS, float(spec.group_fill)).flatten(1)


def _selected(
    capped_TC: Tensor, scores_TC: Tensor, bias_E: Tensor | None, *, spec: RoutingSpec, logits: torch.dtype
) -> Tensor:
    """Indices [T, K] int64 of the chosen experts."""
    on_logits = spec.select_on == "logits"
    on_TE = capped_TC.to(scores_TC.dtype) if on_logits else scores_TC
    rounded_to = None if on_logits else rounding(spec, logits, None if bias_E is None else bias_E.dtype)
    if spec.n_shared:
        on_TE = on_TE[:, : -spec.n_shared].contiguous()
    if bias_E is not None:
        on_TE = rounded(on_TE + bias_E.to(on_TE.dtype), rounded_to)
    if spec.n_group > 1:
        on_TE = _fill_groups(on_TE, spec, rounded_to)
    return greatest(on_TE, spec.top_k)


def _with_shared(ids_TK: Tensor, num_experts: int, spec: RoutingSpec) -> Tensor:
    """Ids [T, K] int64 and behind them those of the shared columns, [T, W]."""
    if not spec.n_shared:
        return ids_TK
    shared_S = torch.arange(num_experts, num_experts + spec.n_shared, device=ids_TK.device)
    return torch.cat([ids_TK, shared_S.expand(ids_TK.shape[0], -1)], 1)


def pad_shared(values_E: Tensor, spec: RoutingSpec, fill: float) -> Tensor:
    """Values [C] per column from those of the experts [E], any dtype."""
    return torch.nn.functional.pad(values_E, (0, spec.n_shared), value=fill) if spec.n_shared else values_E


def norm_of(weights_TW: Tensor, spec: RoutingSpec) -> Tensor:
    """[T, 1]: the p-norm of weights [T, W] fp32 or fp64, p = spec.renorm; the plain sum for p = 1. Differentiable."""
    if spec.renorm == 1:
        return weights_TW.sum(1, keepdim=True)
    size_TW = weights_TW.abs()
    peak_T1 = size_TW.detach().amax(1, keepdim=True)  # without it the powers of small weights vanish
    peak_T1 = torch.where((peak_T1 > 0) & (peak_T1 < math.inf), peak_T1, 1.0)
    # the power of 0 has no finite slope for p < 1
    power_TW = torch.where(size_TW == 0, 0.0, torch.where(size_TW == 0, 1.0, size_TW / peak_T1).pow(spec.renorm))
    total_T1 = power_TW.sum(1, keepdim=True)
    root_T1 = torch.where(total_T1 == 0, 1.0, total_T1).pow(1 / spec.renorm)
    return torch.where(total_T1 == 0, 0.0, root_T1 * peak_T1)


def divisor_of(weights_TW: Tensor, spec: RoutingSpec) -> Tensor:
    """[T, 1] fp32 or fp64: what weights [T, W] are divided by, the norm and its eps."""
    norm_T1 = norm_of(weights_TW, spec)
    if not spec.eps:
        return norm_T1
    return norm_T1 + spec.eps if spec.eps_mode == "add" else norm_T1.clamp_min(spec.eps)


def raw_weights(scores_TW: Tensor, bias_E: Tensor | None, index_TW: Tensor, *, spec: RoutingSpec) -> Tensor:
    """Weights [T, W] before the division from the scores [T, W] at columns [T, W] int64: plus the bias if it weighs."""
    if bias_E is None or not spec.bias_in_weights:
        return scores_TW
    bias_C = pad_shared(bias_E.to(scores_TW.dtype), spec, 0.0)
    return scores_TW + bias_C[index_TW]


def route(
    logits_TC: Tensor,
    bias_E: Tensor | None,
    ids_TK: Tensor | None,
    per_expert_scale_E: Tensor | None,
    *,
    spec: RoutingSpec,
) -> Routing:
    """weights [T, W] fp32 (fp64 for fp64) and ids [T, W] int32 of logits [T, C] of any float dtype, bias [E], given ids
    [T, K] int and scales [E].
    """
    num_columns = logits_TC.shape[1]
    num_experts = num_columns - spec.n_shared
    capped_TC = capped(logits_TC, spec.softcap)
    rounded_to = rounding(spec, logits_TC.dtype)
    scores_TC = rounded(scores_of(capped_TC, spec.score), rounded_to)
    if ids_TK is None:
        valid_TW = None
        selected_TK = _selected(capped_TC, scores_TC, bias_E, spec=spec, logits=logits_TC.dtype)
        index_TW = _with_shared(selected_TK, num_experts, spec)
        # sort keeps the strides of what it sorts, and the op's ids have rows one after the other
        out_TW = index_TW.to(torch.int32, memory_format=torch.contiguous_format)
        weights_TW = scores_TC.gather(1, index_TW)
    else:
        inside_TK = (ids_TK >= 0) & (ids_TK < num_experts)
        given_TW = _with_shared(torch.where(inside_TK, ids_TK, num_columns).long(), num_experts, spec)
        out_TW = given_TW.to(torch.int32, memory_format=torch.contiguous_format)
        valid_TW = given_TW < num_columns
        index_TW = torch.where(valid_TW, given_TW, 0)
        weights_TW = scores_TC.gather(1, index_TW).masked_fill_(~valid_TW, 0)
    if spec.bias_in_weights and bias_E is not None:
        weights_TW = raw_weights(weights_TW, bias_E, index_TW, spec=spec)
        weights_TW = rounded(weights_TW, rounding(spec, logits_TC.dtype, bias_E.dtype))
        if valid_TW is not None:
            weights_TW = weights_TW.masked_fill(~valid_TW, 0)
    if spec.renorm:
        weights_TW = weights_TW / divisor_of(weights_TW, spec)
        if valid_TW is not None:  # 0 / 0 where no id of a token is valid
            weights_TW.masked_fill_(~valid_TW, 0)
    if spec.scale != 1:
        weights_TW = weights_TW.mul_(spec.scale)
    if per_expert_scale_E is not None:
        scale_C = pad_shared(per_expert_scale_E.to(weights_TW.dtype), spec, 1.0)
        weights_TW = weights_TW * scale_C[index_TW]
        if valid_TW is not None:  # 0 times an infinite scale
            weights_TW.masked_fill_(~valid_TW, 0)
    return weights_TW, out_TW
