"""Rows that an expert GEMM need not write: those of slots without an expert, where nobody reads them.

With experts on several ranks these are most rows: a rank has a place for every slot of every token.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from .. import ops  # noqa: F401  the ops have to exist
from ..graph.dataflow import arguments, cast_source, is_op, origin
from ..ops._library import ORDERING_OPS

_OPS = torch.ops.diffulex


def rest_unread(gemm: Node | None) -> bool:
    """Whether nobody reads what an expert GEMM makes of slots without an expert.

    `moe_expert_down` reads the rows of its own experts, and `moe_combine` with ids those of experts: if both follow the
    dispatch that this one follows.
    """
    if gemm is None or not is_op(gemm, _OPS.moe_expert_up, _OPS.moe_expert_down):
        return False
    order = origin(arguments(gemm)["order"])
    dispatch = order.args[0] if is_op(order, operator.getitem) else None
    if not is_op(dispatch, _OPS.moe_dispatch):
        return False
    return all(_skips(user, gemm, dispatch=dispatch, order=order) for user in gemm.users)


def _skips(user: Node, rows: Node, *, dispatch: Node, order: Node) -> bool:
    if user.target in _ordering() and rows not in user.args[1:]:
        return True
    if cast_source(user) is rows:
        return all(_skips(other, user, dispatch=dispatch, order=order) for other in user.users)
    if is_op(user, _OPS.moe_expert_down):
        given = arguments(user)
        return given["act"] is rows and given["b2"] is not rows and origin(given["order"]) is order
    if not is_op(user, _OPS.moe_combine):
        return False
    given, sorted_by = arguments(user), arguments(dispatch)
    alike = given["ids"] is not None and origin(given["ids"]) is origin(sorted_by["ids"])
    return alike and given["num_experts"] == sorted_by["num_experts"] and given["weights"] is not rows


def _ordering() -> set[object]:
    return {getattr(getattr(torch.ops, name.split("::")[0]), name.split("::")[1]).default for name in ORDERING_OPS}
