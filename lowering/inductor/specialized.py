"""Expert GEMMs whose warps are specialised: their kernel is in Gluon, which Inductor's templates do not hold, so that a
graph calls it as an op of its own.
"""

from __future__ import annotations

from typing import Any

from ..errors import Reason, ReasonCode
from ..ops import expert_gemm_specialized
from ..schedule.schedule import GemmShape, Schedule, numbers_of
from ..templates.eager import specialized_refusal
from ..templates.render import ExpertGemmVariant
from . import _compat


def refuses_specialized(variant: ExpertGemmVariant, shape: GemmShape) -> Reason | None:
    """Why the graph being lowered cannot call such a kernel of a scheduled variant of this shape, or None."""
    if _compat.is_backward():
        return Reason(ReasonCode.SCHEDULE, "a kernel of Inductor's takes the derivatives behind it along")
    if not _compat.calls_python():
        return Reason(ReasonCode.WRAPPER, "the C++ wrapper has no kernels in Gluon")
    return specialized_refusal(variant, shape)


def lower_specialized(inputs: list[Any], *, variant: ExpertGemmVariant, schedule: Schedule) -> Any:
    """The call of a scheduled variant, of IR nodes A, W, ORDER and OFFSETS; [N, I] or [N, H]."""
    return _compat.fallback(
        expert_gemm_specialized, *inputs, variant.act, variant.gather, variant.unread, list(numbers_of(schedule))
    )
