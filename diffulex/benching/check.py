"""Whether a peer computes what it should, seen before it is timed: the ratio rule on a sample of its rows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lowering.activation import evaluate, split_gate
from lowering.errors import MoEUnsupportedError

from ..cli.accuracy import ErrorRatio, error_ratio
from .inputs import Inputs, route
from .layers import Layer

MOST_ROWS = 64
_YARDSTICKS = ("eager", "grouped_mm")
_SHARE_OF_MEMORY = 0.5  # of what is free, for one expert in the wide dtype


@dataclasses.dataclass(frozen=True)
class Verdict:
    """ratio: by the ratio rule, with its `problem`; relative: Frobenius error over the norm of the exact rows."""

    ratio: ErrorRatio
    relative: float = float("nan")

    @property
    def problem(self) -> str:
        """What is wrong, or nothing."""
        return self.ratio.problem


def spread(tokens: int, rows: int) -> Tensor:
    """At most `rows` different indices [R] int64 into T tokens, evenly from the first to the last."""
    return torch.linspace(0, tokens - 1, min(tokens, rows)).round().long().unique()


def exact_rows(layer: Layer, inputs: Inputs, *, source: str, dtype: torch.dtype) -> Tensor:
    """The layer's output [T, H] in a wide dtype, expert by expert, from the weights and the formula alone.

    From ids and weights in the dtype of the layer, or from logits fp32, routed in the wide dtype.
    """
    experts = layer.weights()
    ids_TK, weights_TK = inputs.ids_TK, inputs.weights_TK
    if source == "logits":
        weights_TK, ids_TK = route(inputs.logits_TE.to(dtype), ids_TK.shape[1], dtype=dtype)
    out_TH = torch.zeros(inputs.hidden_TH.shape, dtype=dtype, device=inputs.hidden_TH.device)
    for expert in ids_TK.unique().tolist():
        token_N, k_N = torch.where(ids_TK == expert)
        pre_NJ = functional.linear(inputs.hidden_TH[token_N].to(dtype), experts.w13_EJH[expert].to(dtype))
        if experts.b13_EJ is not None:
            pre_NJ += experts.b13_EJ[expert].to(dtype)
        gate_NI, up_NI = split_gate(pre_NJ, experts.act, interleaved=experts.interleaved)
        slots_NH = functional.linear(evaluate(experts.act, gate_NI, up_NI), experts.w2_EHI[expert].to(dtype))
        if experts.b2_EH is not None:
            slots_NH += experts.b2_EH[expert].to(dtype)
        out_TH.index_add_(0, token_N, slots_NH * weights_TK[token_N, k_N, None].to(dtype))
    return out_TH


class Checker:
    """The sampled rows of one cell, with what they should be and what eager torch makes of them in the layer's dtype.

    At most 64 rows, spread over the tokens; where one input set has fewer, over several sets.
    """

    def __init__(self, layer: Layer, inputs: Sequence[Inputs], *, source: str) -> None:
        tokens = inputs[0].hidden_TH.shape[0]
        self._sets = min(len(inputs), -(-MOST_ROWS // tokens))
        self._index_R = spread(tokens, MOST_ROWS // self._sets).to(layer.device)
        self._shape, self._dtype = inputs[0].hidden_TH.shape, layer.dtype
        sampled = [one.rows(self._index_R) for one in inputs[: self._sets]]
        wide = _wide_dtype(layer)
        self._exact = [exact_rows(layer, one, source=source, dtype=wide).double() for one in sampled]
        self._eager = _eager_rows(layer, [_routed(one, source) for one in sampled], exact=self._exact)

    def __call__(self, call: Callable[[int], Tensor]) -> Verdict:
        """The verdict on `call`, which returns [T, H] in the layer's dtype for the input set of a number."""
        found = []
        for number in range(self._sets):
            out_TH = call(number)
            if out_TH.shape != self._shape or out_TH.dtype != self._dtype:
                got, wanted = (f"{list(s)} {d}" for s, d in ((out_TH.shape, out_TH.dtype), (self._shape, self._dtype)))
                return Verdict(ErrorRatio(None, None, f"{got}, expected {wanted}"))
            found.append(out_TH[self._index_R])
        exact, mine = torch.cat(self._exact), torch.cat(found).double()
        ratio = error_ratio(found, self._eager, oracle=self._exact)
        return Verdict(ratio, float((mine - exact).norm() / exact.norm()))


def _eager_rows(
    layer: Layer, sampled: Sequence[tuple[Tensor, Tensor, Tensor]], *, exact: Sequence[Tensor]
) -> list[Tensor]:
    """What eager torch makes of the rows: by transformers' loop or its grouped_mm, whichever errs more on average.

    They round at different places, and both are right.
    """
    outs = [[layer.with_implementation(name)(*one) for one in sampled] for name in _YARDSTICKS]
    return max(outs, key=lambda out: sum(float((mine - one).abs().sum()) for mine, one in zip(out, exact, strict=True)))


def _routed(inputs: Inputs, source: str) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, ids, weights) as eager torch has them."""
    if source == "topk":
        return inputs.hidden_TH, inputs.ids_TK, inputs.weights_TK
    weights_TK, ids_TK = route(inputs.logits_TE, inputs.ids_TK.shape[1], dtype=inputs.hidden_TH.dtype)
    return inputs.hidden_TH, ids_TK, weights_TK


def free_memory(device: torch.device) -> int:
    """Bytes of memory of the device that nobody uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in file}
    except FileNotFoundError:  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 1024 * kilobytes["MemAvailable"]


def _wide_dtype(layer: Layer) -> torch.dtype:
    """fp64, or fp32 where an expert in fp64 takes too much of the memory that is left."""
    spec = layer.case.spec
    matrices = 3 if spec.gated else 2
    needed, free = 8 * matrices * spec.hidden_size * spec.intermediate_size, free_memory(layer.device)
    if needed <= _SHARE_OF_MEMORY * free:
        return torch.float64
    if layer.dtype == torch.float32:
        raise MoEUnsupportedError.of(
            "bench",
            expected=f"memory for one expert in float64, {needed} bytes, to check float32 with",
            got=f"{free} bytes free on {layer.device}",
            hint="Use --dtype bf16, or a smaller shape.",
        )
    return torch.float32
