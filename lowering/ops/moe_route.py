"""`diffulex::moe_route`: logits to expert ids and weights, for every router that `RoutingSpec` describes.

One rule for ties in every implementation: the lowest expert index wins, and ids come in descending order of what they
were selected on. NaN counts as the greatest value, as in `torch.topk`, and stays in its row.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MoEUnsupportedError
from ..spec import GROUP_SCORES, SCORES, RoutingSpec
from ._checks import check_device, check_float, check_int, check_rank, check_size
from ._library import register

_NAME = "diffulex::moe_route"
_Routing = tuple[Tensor, Tensor]
Constants = dict[str, int | float | bool | str]

# --- checks ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _checked_spec(num_experts: int, options: tuple[Any, ...]) -> RoutingSpec:
    spec = RoutingSpec(*options)
    spec.check(num_experts)
    return spec


def _validate(logits_TE: Tensor, bias_E: Tensor | None, ids_TK: Tensor | None, options: tuple[Any, ...]) -> RoutingSpec:
    check_rank(_NAME, "logits [T, E]", logits_TE, 2)
    check_float(_NAME, "logits", logits_TE)
    num_tokens, num_experts = logits_TE.shape
    if len(options) > 9 and tuple(options[9:]) not in (
        RoutingSpec(1).op_args()[9:],
        (*RoutingSpec(1).op_args()[9:], None),
    ):
        hint = "Leave softcap and what follows it at the defaults."
        raise MoEUnsupportedError.of(_NAME, expected="an option the kernels have", got=str(options[9:]), hint=hint)
    static = isinstance(num_experts, int)  # a symbolic E cannot be a cache key; T is never asked for
    options = options[:15]
    spec = _checked_spec(num_experts, options) if static else RoutingSpec(*options)
    if not static:
        spec.check(num_experts)
    if bias_E is not None:
        check_rank(_NAME, "bias [E]", bias_E, 1)
        check_float(_NAME, "bias", bias_E)
        check_device(_NAME, ("logits", logits_TE), ("bias", bias_E))
        check_size(_NAME, "length of bias = E", bias_E.shape[0], num_experts)
    if ids_TK is not None:
        check_rank(_NAME, "ids [T, K]", ids_TK, 2)
        check_int(_NAME, "ids", ids_TK)
        check_device(_NAME, ("logits", logits_TE), ("ids", ids_TK))
        check_size(_NAME, "rows of ids = T", ids_TK.shape[0], num_tokens)
        check_size(_NAME, "columns of ids = top_k", ids_TK.shape[1], spec.top_k)
    return spec


def _wide(logits_TE: Tensor) -> torch.dtype:
    return torch.float64 if logits_TE.dtype == torch.float64 else torch.float32


# --- ATen implementation: CPU, and fp64 on CUDA ------------------------------------------------------------------

# One call of a stable sort beats the dozen calls that make keys as long as there are few values.
_SORT_VALUES = 2048


def _scores(logits: Tensor, score: str) -> Tensor:
    wide = _wide(logits)
    if score == "softmax":
        return torch.softmax(logits, 1, dtype=wide)
    if score == "sigmoid":
        return torch.sigmoid(logits.to(wide))
    return torch.nn.functional.softplus(logits.to(wide)).sqrt()


def _greatest(values_TX: Tensor, count: int) -> Tensor:
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


def _selected(scores_TE: Tensor, bias_E: Tensor | None, spec: RoutingSpec) -> Tensor:
    biased_TE = scores_TE if bias_E is None else scores_TE + bias_E.to(scores_TE.dtype)
    if spec.n_group > 1:
        biased_TE = _fill_groups(biased_TE, spec)
    return _greatest(biased_TE, spec.top_k)


def _top2_sum(values_TGS: Tensor) -> Tensor:
    """[T, G]: the sum of the two greatest of [T, G, S] fp32 or fp64; NaN is the greatest."""
    if values_TGS.is_cuda or values_TGS.numel() <= _SORT_VALUES:
        return values_TGS.topk(2).values.sum(2)
    ordered_TGS = torch.from_numpy(np.sort(values_TGS.numpy(), axis=2))  # a tenth of the time of topk
    return ordered_TGS[:, :, -1] + ordered_TGS[:, :, -2]


def _fill_groups(biased_TE: Tensor, spec: RoutingSpec) -> Tensor:
    """The experts outside the topk_group best groups get group_fill. [T, E] to [T, E] fp32 or fp64."""
    biased_TGS = biased_TE.view(-1, spec.n_group, biased_TE.shape[1] // spec.n_group)
    if spec.group_score == "top2_sum" and biased_TGS.shape[2] > 1:
        group_TG = _top2_sum(biased_TGS)
    else:
        group_TG = biased_TGS.amax(2)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, _greatest(group_TG, spec.topk_group), True)
    return torch.where(kept_TG.unsqueeze(2), biased_TGS, float(spec.group_fill)).flatten(1)


def _aten(logits_TE: Tensor, bias_E: Tensor | None, ids_TK: Tensor | None, spec: RoutingSpec) -> _Routing:
    scores_TE = _scores(logits_TE, spec.score)
    if ids_TK is None:
        valid_TK = None
        index_TK = _selected(scores_TE, bias_E, spec)
        out_TK = index_TK.to(torch.int32)
        weights_TK = scores_TE.gather(1, index_TK)
    else:
        num_experts = logits_TE.shape[1]
        valid_TK = (ids_TK >= 0) & (ids_TK < num_experts)
        out_TK = torch.where(valid_TK, ids_TK, num_experts).to(torch.int32)
        weights_TK = scores_TE.gather(1, torch.where(valid_TK, ids_TK, 0).long()).masked_fill_(~valid_TK, 0)
    if spec.renorm:
        total_T1 = weights_TK.sum(1, keepdim=True)
        weights_TK = weights_TK / (total_T1.add_(spec.eps) if spec.eps else total_T1)
        if valid_TK is not None:  # 0 / 0 where no id of a token is valid
            weights_TK.masked_fill_(~valid_TK, 0)
    return (weights_TK if spec.scale == 1 else weights_TK.mul_(spec.scale)), out_TK


def _cpu(logits_TE: Tensor, bias_E: Tensor | None, ids_TK: Tensor | None, *options: Any) -> _Routing:
    return _aten(logits_TE, bias_E, ids_TK, _validate(logits_TE, bias_E, ids_TK, options))


# --- generated kernel --------------------------------------------------------------------------------------------


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def route_constants(spec: RoutingSpec, num_experts: int, *, bias: bool, ids: bool) -> Constants:
    """Constants of `moe_route.jinja` that follow from the problem: logits [T, E], bias [E] or not, ids [T, K] or not.

    A group takes a power of two of columns; without groups all experts are one group.
    """
    group_size = num_experts // spec.n_group
    return {
        "HAS_BIAS": bias and not ids,
        "GIVEN_IDS": ids,
        "NUM_EXPERTS": num_experts,
        "TOP_K": spec.top_k,
        "K_POW2": _power_of_two(spec.top_k),
        "SCORE": SCORES.index(spec.score),
        "N_GROUP": spec.n_group,
        "TOPK_GROUP": spec.topk_group,
        "GROUPS_POW2": _power_of_two(spec.n_group),
        "GROUP_POW2": _power_of_two(group_size),
        "TOP2": group_size > 1 and GROUP_SCORES[1] == spec.group_score,
        "FILL_ZERO": spec.group_fill == "0",
        "RENORM": spec.renorm,
        "EPS": float(spec.eps),
        "SCALE": float(spec.scale),
    }


def route_schedule(num_tokens: int, num_experts: int) -> tuple[Constants, int]:
    """BLOCK_T of `moe_route.jinja` and num_warps for about `num_tokens`; right for any number of them.

    One warp a program, so that no reduction crosses warps; several rows where tokens are plenty, to overlap them.
    """
    values = 512 if num_tokens > 1024 else 128
    return {"BLOCK_T": max(1, min(values // _power_of_two(num_experts), _power_of_two(max(1, num_tokens))))}, 1


def _cuda(logits_TE: Tensor, bias_E: Tensor | None, ids_TK: Tensor | None, *options: Any) -> _Routing:
    from ..templates import standalone
    from ..templates.render import template_text

    spec = _validate(logits_TE, bias_E, ids_TK, options)
    if logits_TE.dtype == torch.float64:
        return _aten(logits_TE, bias_E, ids_TK, spec)
    num_tokens, num_experts = logits_TE.shape
    weights_TK = logits_TE.new_empty(num_tokens, spec.top_k, dtype=torch.float32)
    out_TK = logits_TE.new_empty(num_tokens, spec.top_k, dtype=torch.int32)
    tensors = {"LOGITS": logits_TE, "IDS": out_TK, "OUT": weights_TK}
    if ids_TK is not None:
        tensors["IDS_IN"] = ids_TK
    elif bias_E is not None:
        tensors["BIAS"] = bias_E
    schedule, num_warps = route_schedule(num_tokens, num_experts)
    standalone.launch(
        template_text("moe_route"),
        tensors,
        name="moe_route",
        constants=route_constants(spec, num_experts, bias=bias_E is not None, ids=ids_TK is not None) | schedule,
        grid=(-(-num_tokens // int(schedule["BLOCK_T"])),),
        num_warps=num_warps,
        num_stages=1,
    )
    return weights_TK, out_TK


# --- fake and backward -------------------------------------------------------------------------------------------


def _fake(logits_TE: Tensor, bias_E: Tensor | None, ids_TK: Tensor | None, *options: Any) -> _Routing:
    spec = _validate(logits_TE, bias_E, ids_TK, options)
    shape = (logits_TE.shape[0], spec.top_k)
    return logits_TE.new_empty(shape, dtype=_wide(logits_TE)), logits_TE.new_empty(shape, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Routing) -> None:
    logits_TE, _, ids_TK, *options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits_TE, output[1])
    ctx.spec, ctx.given = RoutingSpec(*options[:15]), ids_TK is not None


def _spread(values_TK: Tensor, ids_TK: Tensor, num_experts: int, given: bool) -> Tensor:
    """[T, E]: the sum of the values [T, K] of each expert; ids [T, K] int64 in [0, E], where E means none.

    Without atomics: equal ids of a token are added up where the first of them stands; the others go to column E.
    """
    if given:
        same_TKK = ids_TK.unsqueeze(2) == ids_TK.unsqueeze(1)
        values_TK = torch.where(same_TKK, values_TK.unsqueeze(1), 0.0).sum(2)
        ids_TK = torch.where(same_TKK.tril(-1).any(2), num_experts, ids_TK)
    zeros = values_TK.new_zeros(values_TK.shape[0], num_experts + int(given))
    return zeros.scatter(1, ids_TK, values_TK)[:, :num_experts]


def _slope(logits_TK: Tensor, scores_TK: Tensor, score: str) -> Tensor:
    """Derivative of an elementwise score, [T, K] fp32 or fp64."""
    if score == "sigmoid":
        return scores_TK * (1 - scores_TK)
    # softplus' / (2 sqrt(softplus)), and 0 where the score is 0
    return torch.where(scores_TK > 0, torch.sigmoid(logits_TK) / (2 * scores_TK), 0.0)


def _backward(ctx: Any, grad_TK: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    logits_TE, ids_TK = ctx.saved_tensors
    spec, given = ctx.spec, ctx.given
    num_experts, wide = logits_TE.shape[1], _wide(logits_TE)
    ids_TK = ids_TK.long()
    inside_TK = ids_TK.clamp(max=num_experts - 1) if given else ids_TK
    logits_TK = logits_TE.gather(1, inside_TK).to(wide)
    scores_TE = _scores(logits_TE, "softmax") if spec.score == "softmax" else None
    scores_TK = _scores(logits_TK, spec.score) if scores_TE is None else scores_TE.gather(1, inside_TK)
    grad_TK = grad_TK.to(wide) * spec.scale
    valid_TK = ids_TK < num_experts if given else None
    chosen_TK = scores_TK if valid_TK is None else torch.where(valid_TK, scores_TK, 0.0)
    if spec.renorm:
        total_T1 = chosen_TK.sum(1, keepdim=True) + spec.eps
        if valid_TK is not None:
            total_T1 = torch.where(valid_TK.any(1, keepdim=True), total_T1, 1.0)
        grad_TK = (grad_TK - (grad_TK * chosen_TK).sum(1, keepdim=True) / total_T1) / total_T1
    if valid_TK is not None:
        grad_TK = torch.where(valid_TK, grad_TK, 0.0)
    if scores_TE is None:
        grad_TE = _spread(grad_TK * _slope(logits_TK, scores_TK, spec.score), ids_TK, num_experts, given)
    else:
        mean_T1 = (grad_TK * scores_TK).sum(1, keepdim=True)
        grad_TE = scores_TE * (_spread(grad_TK, ids_TK, num_experts, given) - mean_T1)
    return grad_TE.to(logits_TE.dtype), *[None] * 18


moe_route = register("moe_route", cpu=_cpu, cuda=_cuda, fake=_fake, setup_context=_setup_context, backward=_backward)
