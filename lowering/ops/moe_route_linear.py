"""`diffulex::moe_route_linear`: a router's product and `moe_route` of it, for few tokens in kernels of their own.

The product of hidden [T, H] and weight [E, H], with a bias [E] of its own or without, is summed wide and rounded to
`product_dtype`; `moe_route` reads it in `logits_dtype`. The op is what these parts compute, and its gradients are
theirs; a compiled graph gets two kernels where tokens are few.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .._checks import check_device, check_float, check_rank, check_same, check_size
from ..errors import MoEDtypeError
from ._library import register_composite
from .moe_route import Constants, moe_route

_NAME = "diffulex::moe_route_linear"

# the schedule
_PROGRAMS = 128  # about one on each multiprocessor
_DOT_DEPTH = 64  # H is cut into stretches that are multiples of this
_MOST_READ = 2048  # sums that are added up for a token, over all stretches
_FEWEST_PROGRAMS = 32  # without matrix units
_MOST_ROWS, _MOST_LOGITS = 8, 128  # of one program that routes all rows
_IN_FLIGHT = 64  # sums a thread of the second kernel loads at a time


def _validate(hidden_TH: Tensor, weight_EH: Tensor, linear_bias_E: Tensor | None, product_dtype: torch.dtype) -> None:
    check_rank(_NAME, "hidden [T, H]", hidden_TH, 2)
    check_rank(_NAME, "weight [E, H]", weight_EH, 2)
    check_float(_NAME, "hidden", hidden_TH)
    check_same(_NAME, ("hidden", hidden_TH), ("weight", weight_EH))
    check_size(_NAME, "H of weight", weight_EH.shape[1], hidden_TH.shape[1])
    if product_dtype != torch.promote_types(product_dtype, hidden_TH.dtype):
        raise MoEDtypeError.of(
            _NAME,
            expected=f"a product_dtype that holds every {hidden_TH.dtype}",
            got=str(product_dtype),
            hint="Pass the dtype of hidden, or torch.float32.",
        )
    if linear_bias_E is not None:
        check_rank(_NAME, "linear_bias [E]", linear_bias_E, 1)
        check_size(_NAME, "length of linear_bias = E", linear_bias_E.shape[0], weight_EH.shape[0])
        check_device(_NAME, ("hidden", hidden_TH), ("linear_bias", linear_bias_E))


def _composite(
    hidden_TH: Tensor,
    weight_EH: Tensor,
    linear_bias_E: Tensor | None,
    bias_E: Tensor | None,
    product_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _validate(hidden_TH, weight_EH, linear_bias_E, product_dtype)
    hidden_TH, weight_EH = hidden_TH.to(product_dtype), weight_EH.to(product_dtype)
    if linear_bias_E is None:
        logits_TE = torch.mm(hidden_TH, weight_EH.t())
    else:
        logits_TE = torch.addmm(linear_bias_E.to(product_dtype), hidden_TH, weight_EH.t())
    return *moe_route(logits_TE.to(logits_dtype), bias_E, None, *options), logits_TE


# --- generated kernels -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RouteLinearSchedule:
    """Constants of `moe_route_linear_part` and of `moe_route_linear_sum`, besides those of `route_constants`.

    num_warps and num_stages are those of the first; the second has one warp, so that no reduction crosses warps.
    """

    part: Constants
    total: Constants
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        tile = "x".join(str(self.part[name]) for name in ("BLOCK_T", "BLOCK_C", "BLOCK_K"))
        return f"{tile}/{self.part['SPLIT']} {self.num_warps} warps"


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _depth_of(stretch: int, most: int) -> int:
    """The greatest power of two that divides a stretch, at most `most`."""
    return min(most, stretch & -stretch)


def route_linear_schedule(tokens: int, columns: int, *, hidden: int) -> RouteLinearSchedule:
    """For at most `tokens` >= 1 rows of width `hidden`, and `columns`: experts, each group filled up to a power of two.

    Measured on one H100 for E, H of 128, 2048; 256, 2048; 256, 7168; 8, 4096 and 1 to 256 tokens; what the rule picks
    is within 4 % of the best of the 1 to 4 schedules that were timed for each, where it was one of them.

    - One token: a program for each column, on the CUDA cores; with few experts H is split, for 32 programs. With few
      experts that goes for up to 8 tokens (8 experts, 4 tokens: 3.9 us, by tiles of 16 rows 6.0), and one program
      routes all rows.
    - Else tiles of 16 rows, of 64 from 65 tokens on (few experts: 16), and of 16, 32 or 64 columns, 64 for more than 16
      rows of 4096 or wider. H is split so that there are 128 programs, but at most 2048 sums are read for a token.
    """
    few = tokens == 1 or (tokens <= _MOST_ROWS and tokens * columns <= _MOST_LOGITS)
    part = _few_rows(_power_of_two(tokens), columns, hidden) if few else _tiles(tokens, columns, hidden)
    block_t, block_c, block_k, split = (int(part[name]) for name in ("BLOCK_T", "BLOCK_C", "BLOCK_K", "SPLIT"))
    rows = block_t if few else max(1, min(128 // columns, _power_of_two(tokens)))
    unroll = max(1, min(split, _IN_FLIGHT * 32 // (rows * columns)))
    stretch = -(-hidden // (split * block_k)) * block_k
    wide = block_t * block_c == 64 * 64 and columns > 128
    return RouteLinearSchedule(
        part,
        {"BLOCK_T": rows, "SPLIT": split, "UNROLL": unroll},
        num_warps=8 if wide else 4,
        num_stages=max(1, min(4, stretch // block_k)) if part["DOT"] else 1,
    )


def _few_rows(rows: int, columns: int, hidden: int) -> Constants:
    split = max(1, min(_FEWEST_PROGRAMS // columns, hidden // 256))
    even = _depth_of(hidden // split, 8192 // rows) if hidden % split == 0 else 1
    depth = min(even, 2048) if even >= 256 else min(1024, _power_of_two(hidden))
    return {"BLOCK_T": rows, "BLOCK_C": 1, "BLOCK_K": depth, "SPLIT": split, "DOT": False}


def _tiles(tokens: int, columns: int, hidden: int) -> Constants:
    block_t = 64 if tokens > 64 and columns > 16 else 16
    wanted = 16 if tokens <= 16 else 32 if tokens <= 64 and hidden < 4096 else 64
    block_c = max(8, min(wanted, columns))
    tiles = -(-tokens // block_t) * -(-columns // block_c)
    blocks = -(-hidden // _DOT_DEPTH)
    split = min(_power_of_two(max(1, -(-_PROGRAMS // tiles))), max(1, _MOST_READ // columns), blocks)
    stretch = -(-blocks // split)
    block_k = _depth_of(stretch * _DOT_DEPTH, 64 if block_t == 64 else 128)
    return {
        "BLOCK_T": block_t,
        "BLOCK_C": block_c,
        "BLOCK_K": block_k,
        "SPLIT": -(-blocks // stretch),
        "DOT": True,
    }


moe_route_linear = register_composite("moe_route_linear", _composite)
