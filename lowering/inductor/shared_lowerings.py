"""Inductor lowerings of the stages with a shared expert: its tiles in the experts' kernel, or products beside it.

In the kernel it costs no launch and fills the routed experts' waves, but it gets their tiles, which are for few rows an
expert, while it has a row for every token. So it goes there while its row tiles are few, or always, where results may
not depend on the batch: products of a library could.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .. import ops  # noqa: F401  the ops have to exist
from ..activation import canonical, intermediate_size
from ..errors import Reason, ReasonCode
from ..graph.dataflow import arguments
from ..graph.uncovered import note_uncovered
from ..ops.moe_expert_up_shared import shared_expert_up
from ..report import layer_of, record
from ..schedule.schedule import Schedule
from ..state import is_batch_invariant
from ..templates.eager import down_variant, up_variant
from ..templates.render import ExpertGemmVariant
from . import _compat
from .lowerings import SharedTiles, expert_gemm, gemm_schedule, refusal
from .unsorted_slots import is_in_place

_OPS = torch.ops.diffulex
MAX_ROW_TILES = 16  # of a shared expert in the routed experts' kernel


def _layout_refusal(routed: tuple[Any, Any], shared: tuple[Any, ...]) -> Reason | None:
    """Why shared operands (A [T, D], weights [S, D]) cannot be read like the routed ones (A and weights), or None."""
    nodes = _compat.realize_inputs(*routed, *shared)
    names = ("hidden", "the experts' weights", "the shared expert's input", *["its weights"] * (len(shared) - 1))
    for name, node in zip(names, nodes, strict=True):
        stride = node.get_stride()[-1]
        if _compat.known_size(stride) != 1:
            return Reason(ReasonCode.LAYOUT, f"rows of {name} are not consecutive in memory, last stride {stride}")
    strides = {tuple(node.get_stride()) for node in nodes[3:]}
    return None if len(strides) == 1 else Reason(ReasonCode.LAYOUT, f"gate and up have strides {sorted(strides)}")


def _size_refusal(schedule: Schedule, max_rows: int | None, top_k: int) -> Reason | None:
    if is_batch_invariant():
        return None
    row_tiles = math.inf if max_rows is None else -(-max_rows // top_k // schedule.block_m)
    if schedule.loop.tma or row_tiles > MAX_ROW_TILES:
        detail = f"{schedule} for up to {row_tiles} row tiles, in the experts' kernel at most {MAX_ROW_TILES}"
        return Reason(ReasonCode.SCHEDULE, detail)
    return None


def _tiles(
    variant: ExpertGemmVariant, routed: tuple[Any, Any], shared: tuple[Any, ...], *, order: Any, top_k: int
) -> tuple[Reason | None, Schedule | None, SharedTiles | None]:
    """(why the shared products stand beside the kernel, or None; the schedule; the shared tiles)."""
    reason, rows = refusal(routed[0]), order.get_size()[0]
    if reason is None and variant.bias:
        reason = Reason(ReasonCode.LAYOUT, "the experts have a bias")
    if reason is None and variant.interleaved:
        reason = Reason(ReasonCode.LAYOUT, "gate and up rows of the experts alternate")
    if reason is None and _compat.known_size(rows) == 0:
        reason = Reason(ReasonCode.SCHEDULE, "no tokens")
    reason = reason or _layout_refusal(routed, shared)
    if reason is not None:
        return reason, None, None
    schedule, max_rows = gemm_schedule(routed[1], rows, act=variant.act, with_shared=is_batch_invariant())
    # slots in place get another loop from the kernel's lowering, which says why
    reason = _size_refusal(schedule.ungrouped() if is_in_place(order) else schedule, max_rows, top_k)
    return reason, schedule, SharedTiles(shared[0], shared[1:], top_k)


def _note_beside(stage: str, reason: Reason) -> None:
    node = _compat.current_fx_node()
    layer = layer_of(node) if node is not None else ""
    record("plan", "shared_expert", layer=layer, outcome=f"{stage} products beside the experts", reason=reason)
    note_uncovered(f"the shared expert's {stage} products", reason, layer=layer)


def _beside(function: Callable[..., Any], *names: str) -> Any:
    """The shared expert's products as Inductor lowers them."""
    node = _compat.current_fx_node()
    assert node is not None
    return _compat.inline(function, [arguments(node)[name] for name in names])


@_compat.register_lowering(_OPS.moe_expert_up_shared.default, type_promotion_kind=None)
def _moe_expert_up_shared(
    hidden: Any,
    w13: Any,
    b13: Any,
    order: Any,
    offsets: Any,
    shared_hidden: Any,
    shared_w1: Any,
    shared_w3: Any,
    top_k: int,
    act: str,
    interleaved: bool = False,
) -> Any:
    act = canonical(act)
    variant = up_variant(hidden.get_dtype(), act=act, bias=b13 is not None, interleaved=interleaved, shared=True)
    shared = (shared_hidden, shared_w1, *([] if shared_w3 is None else [shared_w3]))
    reason, schedule, tiles = _tiles(variant, (hidden, w13), shared, order=order, top_k=top_k)
    if reason is not None:
        _note_beside("up", reason)
        routed = _compat.lowerings[_OPS.moe_expert_up.default](
            hidden, w13, b13, order, offsets, top_k, act, interleaved
        )
        names = ("shared_hidden", "shared_w1", "shared_w3")
        return routed, _beside(lambda x, w1, w3: shared_expert_up(x, w1, w3, act=act), *names)
    width = intermediate_size(act, _compat.static_size(w13.get_size()[1]))
    inputs = [hidden, w13, order, offsets]
    return expert_gemm(
        "moe_expert_up", variant, inputs=inputs, top_k=top_k, width=width, schedule=schedule, shared=tiles
    )


@_compat.register_lowering(_OPS.moe_expert_down_shared.default, type_promotion_kind=None)
def _moe_expert_down_shared(
    act: Any, w2: Any, b2: Any, order: Any, offsets: Any, shared: Any, shared_w2: Any, top_k: int
) -> Any:
    variant = down_variant(act.get_dtype(), bias=b2 is not None, shared=True)
    reason, schedule, tiles = _tiles(variant, (act, w2), (shared, shared_w2), order=order, top_k=top_k)
    if reason is not None:
        _note_beside("down", reason)
        routed = _compat.lowerings[_OPS.moe_expert_down.default](act, w2, b2, order, offsets)
        return routed, _beside(lambda x, w2: x @ w2.t(), "shared", "shared_w2")
    width = _compat.static_size(w2.get_size()[1])
    inputs = [act, w2, order, offsets]
    return expert_gemm("moe_expert_down", variant, inputs=inputs, top_k=1, width=width, schedule=schedule, shared=tiles)
