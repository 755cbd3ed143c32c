"""`diffulex::moe_dispatch`: the slots in expert order, by a stable counting sort."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from .._checks import check_int, check_rank
from ..errors import MoERangeError, MoEShapeError
from ._library import register

_NAME = "diffulex::moe_dispatch"
_INT32_MAX = 2**31 - 1
_MOST_SLOTS = 2**31 - 2**17  # numbered in int32, and the kernels look up to 128 blocks beyond the last one
_Slots = tuple[Tensor, Tensor, Tensor]
Constants = dict[str, int | float | bool | str]

_FEW_SLOTS = 8192  # one kernel up to here
_LEAST_READ, _MOST_READ = 128, 4096  # ids a program of that kernel reads at a time
_LEAST_BINS, _MOST_BINS = 32, 2048  # experts that the two kernels count at once
_MOST_PROGRAMS = 128
_SORTED = 512  # slots a program sorts at a time
_COUNTS_READ = 16384  # counts a program adds up at a time


def _validate(ids_TK: Tensor, num_experts: int) -> None:
    check_rank(_NAME, "ids [T, K]", ids_TK, 2)
    check_int(_NAME, "ids", ids_TK)
    num_tokens, top_k = ids_TK.shape
    if isinstance(top_k, int) and top_k == 0:
        raise MoEShapeError.of(
            _NAME,
            expected="ids [T, K] with K >= 1",
            got=f"shape {tuple(ids_TK.shape)}",
            hint="Pass the ids of moe_route.",
        )
    if not 0 < num_experts < _INT32_MAX:
        raise MoERangeError.of(
            _NAME,
            expected="num_experts >= 1",
            got=f"num_experts={num_experts}",
            hint="Pass the number of experts of the layer.",
        )
    if isinstance(num_tokens, int) and num_tokens * top_k > _MOST_SLOTS:
        raise MoERangeError.of(
            _NAME,
            expected=f"at most {_MOST_SLOTS} slots",
            got=f"T*K = {num_tokens * top_k}",
            hint="Split the batch: slots are numbered in int32.",
        )


def _cpu(ids_TK: Tensor, num_experts: int) -> _Slots:
    _validate(ids_TK, num_experts)
    top_k = ids_TK.shape[1]
    ids_N = ids_TK.numpy().reshape(-1)
    unsigned_N = ids_N.view(np.uint32 if ids_N.dtype == np.int32 else np.uint64)  # negative ids become huge ones
    narrow = np.int16 if num_experts <= np.iinfo(np.int16).max else np.int32
    expert_N = np.minimum(unsigned_N, num_experts, dtype=unsigned_N.dtype).astype(narrow)
    order_N = expert_N.argsort(kind="stable")  # a radix sort for 16-bit keys, several times faster than torch.sort
    offsets_E1 = expert_N[order_N].searchsorted(np.arange(num_experts + 1, dtype=narrow)).astype(np.int32)
    order_N = order_N.astype(np.int32)
    token_N = order_N // np.int32(top_k)
    return torch.from_numpy(order_N), torch.from_numpy(token_N), torch.from_numpy(offsets_E1)


@dataclasses.dataclass(frozen=True)
class DispatchSchedule:
    """Constants and num_warps of the kernels; with `programs` there are two, `moe_dispatch_count` and `_place`.

    Without, one kernel: `moe_dispatch`, whose NUM_EXPERTS + 1 programs read all ids each.
    """

    constants: Constants
    num_warps: int
    programs: int = 0


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def dispatch_schedule(slots: int, num_experts: int, *, top_k: int) -> DispatchSchedule:
    """The schedule for about `slots` = T*K slots of ids [T, top_k]; right for any number of them.

    Measured on one H200: up to 8,192 slots one launch beats two; beyond, each id is better read twice than E times.
    """
    problem: Constants = {"NUM_EXPERTS": num_experts, "TOP_K": top_k, "ACC_TYPE": "tl.int32"}
    bins = max(_LEAST_BINS, _power_of_two(num_experts))
    if slots <= _FEW_SLOTS or bins > _MOST_BINS:
        block = min(_MOST_READ, max(_LEAST_READ, _power_of_two(max(1, slots))))
        return DispatchSchedule(problem | {"BLOCK": block}, 4)
    programs = max(2, min(_MOST_PROGRAMS, _power_of_two(-(-slots // _SORTED))))
    rows = min(programs, _COUNTS_READ // bins)
    constants = {"BINS": bins, "PROGRAMS": programs, "BLOCK": _SORTED, "ROWS": rows}
    return DispatchSchedule(problem | constants, 4, programs)


def _cuda(ids_TK: Tensor, num_experts: int) -> _Slots:
    from ..templates import standalone
    from ..templates.render import template_text

    _validate(ids_TK, num_experts)
    slots = ids_TK.numel()
    schedule = dispatch_schedule(slots, num_experts, top_k=ids_TK.shape[1])
    order_N, token_N = (ids_TK.new_empty(slots, dtype=torch.int32) for _ in range(2))
    offsets_E1 = ids_TK.new_empty(num_experts + 1, dtype=torch.int32)

    def launch(name: str, tensors: dict[str, Tensor], programs: int) -> None:
        standalone.launch(
            template_text(name),
            tensors,
            name=name,
            constants=schedule.constants,
            grid=(programs,),
            num_warps=schedule.num_warps,
            num_stages=1,
        )

    tensors = {"IDS": ids_TK.contiguous(), "ORDER": order_N, "TOKEN": token_N, "OUT": offsets_E1}
    if schedule.programs:
        bins = int(schedule.constants["BINS"])
        tensors["COUNTS"] = ids_TK.new_empty(schedule.programs, bins, dtype=torch.int32)
        launch("moe_dispatch_count", {"IDS": tensors["IDS"], "OUT": tensors["COUNTS"]}, schedule.programs)
        launch("moe_dispatch_place", tensors, schedule.programs)
    else:
        launch("moe_dispatch", tensors, num_experts + 1)
    return order_N, token_N, offsets_E1


def _fake(ids_TK: Tensor, num_experts: int) -> _Slots:
    _validate(ids_TK, num_experts)
    slots = ids_TK.shape[0] * ids_TK.shape[1]
    order_N, token_N = (ids_TK.new_empty(slots, dtype=torch.int32) for _ in range(2))
    return order_N, token_N, ids_TK.new_empty(num_experts + 1, dtype=torch.int32)


moe_dispatch = register("moe_dispatch", cpu=_cpu, cuda=_cuda, fake=_fake)
