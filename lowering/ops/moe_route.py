"""`diffulex::moe_route`: logits to expert ids and weights, for every router that `RoutingSpec` describes.

One rule for ties in every implementation: the lowest expert index wins, and ids come in descending order of what they
were selected on. NaN counts as the greatest value, as in `torch.topk`, and stays in its row.

Ids given instead of a choice that lie outside [0, E) come back as the number of columns C of the logits, with weight 0.
The scale of each expert [E] multiplies the weights last; it and a bias that stays in the weights have gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_float, check_int, check_rank, check_size
from ..spec import GROUP_SCORES, OP_OPTIONS, SCORES, RoutingSpec
from ..state import is_batch_invariant
from ._library import register
from ._route_aten import Routing, rounding, route, wide_dtype
from ._route_backward import backward, setup_context
from ._rows import rows_alone

_NAME = "diffulex::moe_route"
_NUM_OPTIONS = len(OP_OPTIONS)
ANY_TOKENS = 64  # scheduled for where their number is not known, or may not matter
Constants = dict[str, int | float | bool | str]

# --- checks ------------------------------------------------------------------------------------------------------


def split_options(options: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """The options of the spec and the scale of each expert; what stands at its default may be missing at the end."""
    return options[:_NUM_OPTIONS], options[_NUM_OPTIONS] if len(options) > _NUM_OPTIONS else None


@functools.lru_cache(maxsize=1024)
def _checked_spec(num_columns: int, options: tuple[Any, ...]) -> RoutingSpec:
    spec = RoutingSpec(*options)
    spec.check(num_columns - spec.n_shared)
    return spec


def _check_per_expert(name: str, values_E: Tensor, logits_TC: Tensor, num_experts: int) -> None:
    check_rank(_NAME, f"{name} [E]", values_E, 1)
    check_float(_NAME, name, values_E)
    check_device(_NAME, ("logits", logits_TC), (name, values_E))
    check_size(_NAME, f"length of {name} = E", values_E.shape[0], num_experts)


def _validate(
    logits_TC: Tensor, bias_E: Tensor | None, ids_TK: Tensor | None, options: tuple[Any, ...]
) -> tuple[RoutingSpec, Tensor | None]:
    check_rank(_NAME, "logits [T, E]", logits_TC, 2)
    check_float(_NAME, "logits", logits_TC)
    num_tokens, num_columns = logits_TC.shape
    options, per_expert_scale_E = split_options(options)
    static = isinstance(num_columns, int)  # a symbolic E cannot be a cache key; T is never asked for
    spec = _checked_spec(num_columns, options) if static else RoutingSpec(*options)
    num_experts = num_columns - spec.n_shared
    if not static:
        spec.check(num_experts)
    if bias_E is not None:
        _check_per_expert("bias", bias_E, logits_TC, num_experts)
    if per_expert_scale_E is not None:
        _check_per_expert("per_expert_scale", per_expert_scale_E, logits_TC, num_experts)
    if ids_TK is not None:
        check_rank(_NAME, "ids [T, K]", ids_TK, 2)
        check_int(_NAME, "ids", ids_TK)
        check_device(_NAME, ("logits", logits_TC), ("ids", ids_TK))
        check_size(_NAME, "rows of ids = T", ids_TK.shape[0], num_tokens)
        check_size(_NAME, "columns of ids = top_k", ids_TK.shape[1], spec.top_k)
    return spec, per_expert_scale_E


def _cpu(logits_TC: Tensor, bias_E: Tensor | None, ids_TK: Tensor | None, *options: Any) -> Routing:
    spec, per_expert_scale_E = _validate(logits_TC, bias_E, ids_TK, options)

    def routed(logits_TC: Tensor, ids_TK: Tensor | None) -> Routing:
        return route(logits_TC, bias_E, ids_TK, per_expert_scale_E, spec=spec)

    return rows_alone(routed, logits_TC, ids_TK)  # type: ignore[no-any-return]


# --- generated kernel --------------------------------------------------------------------------------------------


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def triton_dtype(dtype: torch.dtype | None) -> str:
    """How a kernel's text spells a dtype, None included."""
    return "None" if dtype is None else f"tl.{str(dtype).removeprefix('torch.')}"


def route_columns(spec: RoutingSpec, num_experts: int) -> int:
    """Columns of a tile of logits: each group, and the number of groups, filled up to a power of two."""
    return _power_of_two(spec.n_group) * _power_of_two(num_experts // spec.n_group)


@functools.lru_cache(maxsize=1024)
def route_constants(
    spec: RoutingSpec,
    num_columns: int,
    *,
    logits: torch.dtype,
    bias: torch.dtype | None = None,
    ids: bool = False,
    per_expert_scale: bool = False,
) -> Constants:
    """Constants of `moe_route.jinja` that follow from the problem: dtypes of logits [T, C] and of a bias [E] if there
    is one, whether ids [T, K] are given, whether there is a scale [E].

    A group takes a power of two of columns; without groups all experts are one group.
    """
    num_experts = num_columns - spec.n_shared
    group_size = num_experts // spec.n_group
    weighs = bias is not None and spec.bias_in_weights
    return {
        "HAS_BIAS": bias is not None and not ids,
        "BIAS_WEIGHS": weighs,
        "HAS_EXPERT_SCALE": per_expert_scale,
        "GIVEN_IDS": ids,
        "NUM_EXPERTS": num_experts,
        "NUM_SHARED": spec.n_shared,
        "SHARED_POW2": _power_of_two(max(1, spec.n_shared)),
        "TOP_K": spec.top_k,
        "WIDTH_POW2": _power_of_two(spec.num_weights),
        "SOFTCAP": float(spec.softcap),
        "SCORE": SCORES.index(spec.score),
        "SCORE_DTYPE": triton_dtype(rounding(spec, logits)),
        "BIASED_DTYPE": triton_dtype(rounding(spec, logits, bias)),
        "ON_LOGITS": spec.select_on == "logits",
        "N_GROUP": spec.n_group,
        "TOPK_GROUP": spec.topk_group,
        "GROUPS_POW2": _power_of_two(spec.n_group),
        "GROUP_POW2": _power_of_two(group_size),
        "TOP2": group_size > 1 and GROUP_SCORES[1] == spec.group_score,
        "FILL_ZERO": spec.group_fill == "0",
        "RENORM": float(spec.renorm),
        "CLAMP_MIN": spec.eps_mode == "clamp_min" and spec.eps > 0,
        "EPS": float(spec.eps),
        "SCALE": float(spec.scale),
    }


def route_schedule(num_tokens: int, num_columns: int) -> tuple[Constants, int]:
    """BLOCK_T of `moe_route.jinja` and num_warps for about `num_tokens`; right for any number of them.

    One warp a program, so that no reduction crosses warps; several rows where tokens are plenty, to overlap them.
    """
    values = 512 if num_tokens > 1024 else 128
    return {"BLOCK_T": max(1, min(values // _power_of_two(num_columns), _power_of_two(max(1, num_tokens))))}, 1


def _cuda(logits_TC: Tensor, bias_E: Tensor | None, ids_TK: Tensor | None, *options: Any) -> Routing:
    from ..templates import standalone
    from ..templates.render import route_text

    spec, per_expert_scale_E = _validate(logits_TC, bias_E, ids_TK, options)
    if logits_TC.dtype == torch.float64:
        return route(logits_TC, bias_E, ids_TK, per_expert_scale_E, spec=spec)
    num_tokens, num_columns = logits_TC.shape
    weights_TW = logits_TC.new_empty(num_tokens, spec.num_weights, dtype=torch.float32)
    out_TW = logits_TC.new_empty(num_tokens, spec.num_weights, dtype=torch.int32)
    constants = route_constants(
        spec,
        num_columns,
        logits=logits_TC.dtype,
        bias=None if bias_E is None else bias_E.dtype,
        ids=ids_TK is not None,
        per_expert_scale=per_expert_scale_E is not None,
    )
    # sums over the columns are in an order that the layout of a tile decides
    schedule, num_warps = route_schedule(ANY_TOKENS if is_batch_invariant() else num_tokens, num_columns)
    named = {"LOGITS": logits_TC, "BIAS": bias_E, "EXPERT_SCALE": per_expert_scale_E, "IDS_IN": ids_TK}
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
    standalone.launch(
        route_text(),
        {**tensors, "IDS": out_TW, "OUT": weights_TW},
        name="moe_route",
        constants=constants | schedule,
        grid=(-(-num_tokens // int(schedule["BLOCK_T"])),),
        num_warps=num_warps,
        num_stages=1,
    )
    return weights_TW, out_TW


# --- fake function -----------------------------------------------------------------------------------------------


def _fake(logits_TC: Tensor, bias_E: Tensor | None, ids_TK: Tensor | None, *options: Any) -> Routing:
    spec, _ = _validate(logits_TC, bias_E, ids_TK, options)
    shape = (logits_TC.shape[0], spec.num_weights)
    return logits_TC.new_empty(shape, dtype=wide_dtype(logits_TC)), logits_TC.new_empty(shape, dtype=torch.int32)


moe_route = register("moe_route", cpu=_cpu, cuda=_cuda, fake=_fake, setup_context=setup_context, backward=backward)
