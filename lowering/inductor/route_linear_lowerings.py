"""Inductor lowering of a router with its product: two kernels where tokens are few, else the product and `moe_route`.

As many programs as a device has multiprocessors add up parts of the product, and the routing adds up the parts. Where
results may not depend on the batch, there are the same parts for any number of tokens; they take at most 8 KiB a token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ops  # noqa: F401  the ops have to exist
from ..errors import Reason, ReasonCode
from ..graph.dataflow import arguments, has_shape, is_output, origin, outputs, tensor_of
from ..graph.uncovered import note_uncovered
from ..ops.moe_route import Constants, moe_route, route_columns, route_constants, split_options, triton_dtype
from ..ops.moe_route_linear import RouteLinearSchedule, route_linear_schedule
from ..report import layer_of, record
from ..spec import RoutingSpec
from ..state import is_batch_invariant
from . import _compat
from .early import begins_early, told
from .gemm_plan import rows_bound
from .lowerings import note, refusal
from .route_lowerings import empty, template

MOST_TOKENS = 512  # beyond, a library's product and a kernel that routes
_ANY_TOKENS = 16  # scheduled for at least where T is symbolic: tiles, which are right for any number of rows
_INVARIANT_TOKENS = 64  # scheduled for where results may not depend on T: tiles of 16 rows, H in a few stretches
_OPS = torch.ops.diffulex


@_compat.SymbolicGridFn
def _part_grid(splits: Any, tokens: Any, columns: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (cdiv(tokens, meta["BLOCK_T"]) * cdiv(columns, meta["BLOCK_C"]) * splits, 1, 1)


@_compat.SymbolicGridFn
def _sum_grid(tokens: Any, top_k: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (cdiv(tokens, meta["BLOCK_T"]), 1, 1)


def _dispatch(route: torch.fx.Node, num_experts: int) -> torch.fx.Node | None:
    """A `moe_dispatch` that sorts the slots of a `moe_route_linear`."""
    for dispatch in route.graph.find_nodes(op="call_function", target=_OPS.moe_dispatch.default):
        given = arguments(dispatch)
        ids = origin(given["ids"])
        ours = is_output(ids, route, index=1)
        if ours and has_shape(given["ids"], tensor_of(ids).shape) and given["num_experts"] == num_experts:
            return dispatch
    return None


def _most_tokens(hidden: Any, top_k: int, dispatch: torch.fx.Node | None) -> float:
    """How many rows [T, H] the graph being lowered is for, by its expert GEMMs where T is symbolic."""
    num_tokens = hidden.get_size()[0]
    known = _compat.known_size(num_tokens)
    if known is not None:
        return known
    rows = rows_bound(num_tokens * top_k, dispatch, device=hidden.get_device())
    return math.inf if rows is None else rows // top_k


def _refusal(hidden: Any, tokens: float) -> Reason | None:
    """Why hidden [T, H], up to so many rows of it, is left to the library's product, or None."""
    reason = refusal(hidden, dtypes=(torch.float16, torch.bfloat16))
    most_tokens = math.inf if is_batch_invariant() else MOST_TOKENS
    if reason is None and not 0 < tokens <= most_tokens:
        most = "any number of" if tokens == math.inf else f"up to {tokens}"
        reason = Reason(ReasonCode.SCHEDULE, f"for {most} tokens, kernels of its own for 1 to {MOST_TOKENS}")
    return reason


def _apart(
    route: torch.fx.Node, product_dtype: torch.dtype, logits_dtype: torch.dtype, *, options: tuple[Any, ...]
) -> Any:
    """The product as it stood in the graph, and `moe_route`."""

    def parts(
        hidden_TH: Tensor,
        weight_EH: Tensor,
        linear_bias_E: Tensor | None,
        bias_E: Tensor | None,
        scale_E: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight_HE = weight_EH.t()
        if linear_bias_E is not None:
            logits_TE = torch.addmm(linear_bias_E, hidden_TH, weight_HE)
        elif product_dtype == hidden_TH.dtype:
            logits_TE = torch.mm(hidden_TH, weight_HE)
        else:
            logits_TE = torch.mm(hidden_TH, weight_HE, out_dtype=product_dtype)
        return *moe_route(logits_TE.to(logits_dtype), bias_E, None, *options, scale_E), logits_TE

    given = arguments(route)
    names = ("hidden", "weight", "linear_bias", "bias", "per_expert_scale")
    return _compat.inline(parts, [given[name] for name in names])


def _part(hidden: Any, weight: Any, schedule: RouteLinearSchedule, *, constants: Constants) -> Any:
    """The sums [SPLIT, T, columns] fp32 of hidden [T, H] and weight [E, H]."""
    problem = {name: constants[name] for name in ("NUM_EXPERTS", "N_GROUP", "GROUPS_POW2", "GROUP_POW2")}
    columns = int(problem["GROUPS_POW2"]) * int(problem["GROUP_POW2"])
    size = [int(schedule.part["SPLIT"]), hidden.get_size()[0], columns]
    return _compat.run_template(
        template("moe_route_linear_part", _part_grid),
        _compat.realize_inputs(hidden, weight),
        _compat.fixed_layout(hidden, torch.float32, size),
        num_warps=schedule.num_warps,
        num_stages=schedule.num_stages,
        constants=problem | {"WIDTH_H": _compat.static_size(weight.get_size()[1])} | schedule.part,
        early=begins_early(hidden.get_device()),
    )


def _sum(inputs: list[Any], logits: Any, schedule: RouteLinearSchedule, *, constants: Constants) -> tuple[Any, Any]:
    """Weights and ids [T, K]: `inputs` are the sums and what the router reads, `logits` [T, E] are written if given."""
    num_tokens, top_k = inputs[0].get_size()[1], int(constants["TOP_K"])
    ids = empty(inputs[0], [num_tokens, top_k], dtype=torch.int32)
    written = [_compat.realize_inputs(one) for one in (logits, ids) if one is not None]
    early = begins_early(ids.get_device())
    weights = _compat.run_template(
        template("moe_route_linear_sum", _sum_grid),
        [*map(_compat.realize_inputs, inputs), *written],
        _compat.fixed_layout(ids, torch.float32, [num_tokens, top_k]),
        num_warps=1,
        num_stages=1,
        constants=constants | schedule.total | {"KEEP_LOGITS": logits is not None},
        mutated_inputs=written,
        early=early,
    )
    note("moe_route", f"triton moe_route_linear {schedule}{told(early)}")
    return weights, ids


@_compat.register_lowering(_OPS.moe_route_linear.default, type_promotion_kind=None)
def _moe_route_linear(
    hidden: Any,
    weight: Any,
    linear_bias: Any,
    bias: Any,
    product_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    *options: Any,
) -> Any:
    node = _compat.current_fx_node()
    assert node is not None
    options, scale = split_options(options)
    spec = RoutingSpec(*options)
    num_experts, width = map(_compat.static_size, weight.get_size())
    tokens = _most_tokens(hidden, spec.top_k, _dispatch(node, num_experts))
    reason = _refusal(hidden, tokens)
    if reason is not None:
        record("plan", "route_linear", layer=layer_of(node), outcome="a product beside the router", reason=reason)
        note_uncovered("the router's product", reason, layer=layer_of(node))
        return _apart(node, product_dtype, logits_dtype, options=options)
    constants = route_constants(
        spec,
        num_experts,
        logits=logits_dtype,
        bias=None if bias is None else bias.get_dtype(),
        per_expert_scale=scale is not None,
    )
    if is_batch_invariant():
        tokens = _INVARIANT_TOKENS
    elif _compat.known_size(hidden.get_size()[0]) is None:
        tokens = max(tokens, _ANY_TOKENS)
    schedule = route_linear_schedule(int(tokens), route_columns(spec, num_experts), hidden=width)
    partial = _part(hidden, weight, schedule, constants=constants)
    wanted = ((True, linear_bias), (constants["HAS_BIAS"] or constants["BIAS_WEIGHS"], bias), (True, scale))
    inputs = [partial, *(tensor for is_read, tensor in wanted if is_read and tensor is not None)]
    logits = empty(hidden, [hidden.get_size()[0], num_experts], dtype=product_dtype) if outputs(node, 2) else None
    constants = constants | {
        "HAS_LINEAR_BIAS": linear_bias is not None,
        "LOGITS_DTYPE": triton_dtype(None if product_dtype == torch.float32 else product_dtype),
    }
    weights, ids = _sum(inputs, logits, schedule, constants=constants)
    return weights, ids, logits
