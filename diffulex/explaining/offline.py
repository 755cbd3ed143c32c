"""The report of a model on a device that is not there."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowering.report import collect

from ..explanation import Report, make_report
from .kernels import named


def explain_offline(model: nn.Module, **inputs: Any) -> Report:
    """What the compiler does with each MoE layer on an H100, in inference as one graph; nothing runs, no GPU is needed.

    inputs: keyword inputs; tensors [B, S] or [T, H] of any dtype may be on the CPU, on the meta device or fake, and so
    may the weights. Times are those that are predicted. Raises what `lowering.inductor.offline.offline_source` raises.
    """
    from lowering.inductor.offline import offline_source  # here, not above: this loads a part of the compiler

    with collect() as decisions:
        code = offline_source(model, inputs)
    return make_report(model, named(decisions, code.calls), graphs=1, breaks=0)
