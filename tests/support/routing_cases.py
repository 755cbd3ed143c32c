"""Calls of `moe_route` over the whole space of `RoutingSpec`, and how two implementations of it are compared.

Where rounding decides, implementations may differ: a token counts only where every decision is clear, that is where no
two values it compares are closer than their errors, unless they come from equal inputs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowering.ops import moe_route
from lowering.reference.moe_route import moe_route_reference
from lowering.spec import EPS_MODES, GROUP_FILLS, GROUP_SCORES, SCORE_DTYPES, SCORES, SELECTS, RoutingSpec

from .inputs import LOW_DTYPES

KINDS = ("normal", "grid", "equal", "special", "extreme")
_CLOSE, _TINY = 2e-5, 1e-33
_SPECIAL = (math.nan, -math.nan, math.inf, -math.inf, 0.0)
_EXTREME = (-1e30, -1e4, -90.0, 0.0, 90.0, 1e4, 1e30, -math.inf)


def values(kind: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """normal; grid: many ties; equal: nothing but ties; special: with NaN of both signs and infinities; extreme."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "grid":
        return (torch.randint(-4, 5, shape, generator=generator) / 2).to(dtype)
    if kind == "equal":
        return torch.full(shape, 0.25, dtype=dtype)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    if kind in ("special", "extreme"):
        some = torch.tensor(_SPECIAL if kind == "special" else _EXTREME, dtype=torch.float64)
        choice = torch.randint(0, 16, shape, generator=generator)
        drawn = torch.where(choice < len(some), some[choice.clamp(max=len(some) - 1)], drawn)
    return drawn.to(dtype)


def given_ids(tokens: int, top_k: int, num_experts: int, seed: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
    """Ids [T, K]: duplicates, and some outside [0, E)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, num_experts + 2, (tokens, top_k), generator=generator).to(dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class RoutingCase:
    """One call: logits [T, E + n_shared], bias [E], given ids [T, K], scale [E], all on the CPU."""

    spec: RoutingSpec
    logits: Tensor
    bias: Tensor | None = None
    ids: Tensor | None = None
    scale: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.logits.shape[1] - self.spec.n_shared

    def __repr__(self) -> str:
        tensors = {"bias": self.bias, "ids": self.ids, "scale": self.scale}
        told = ", ".join(f"{name}={None if t is None else t.tolist()}" for name, t in tensors.items())
        dtypes = f"{self.logits.dtype}, bias {None if self.bias is None else self.bias.dtype}"
        return f"RoutingCase({self.spec!r}, logits={self.logits.tolist()}, {told}, {dtypes})"

    def args(self, device: str = "cpu") -> tuple[Any, ...]:
        """Arguments of the op."""
        tensors = [None if t is None else t.to(device) for t in (self.logits, self.bias, self.ids, self.scale)]
        return *tensors[:3], *self.spec.op_args(), tensors[3]

    def run(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Weights and ids [T, K + n_shared] of the op."""
        return moe_route(*self.args(device))

    def reference(self, dtype: torch.dtype, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and ids of the oracle, computed in `dtype`, for these ids [T, K] if given."""
        ids = self.ids if ids is None else ids
        tensors = {"bias_E": self.bias, "ids_TK": ids, "per_expert_scale_E": self.scale}
        return moe_route_reference(self.logits, self.spec, dtype=dtype, **tensors)


@st.composite
def routing_specs(draw: st.DrawFn) -> tuple[RoutingSpec, int]:
    """A spec and a number of experts it has a meaning for: one expert, groups of one, k = E and all others."""
    n_group = draw(st.integers(1, 4))
    num_experts = n_group * draw(st.integers(1, 5))
    spec = RoutingSpec(
        top_k=draw(st.integers(1, num_experts)),
        score=draw(st.sampled_from(SCORES)),
        n_group=n_group,
        topk_group=draw(st.integers(1, n_group)),
        group_score=draw(st.sampled_from(GROUP_SCORES)),
        group_fill=draw(st.sampled_from(GROUP_FILLS)),
        renorm=draw(st.sampled_from([0.0, 1.0, 1.0, 2.0, 0.5, 3.5])),
        eps=draw(st.sampled_from([0.0, 1e-20, 1e-2, 0.75])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5, 30.0])),
        score_dtype=draw(st.sampled_from(SCORE_DTYPES)),
        select_on=draw(st.sampled_from(SELECTS)),
        bias_in_weights=draw(st.booleans()),
        eps_mode=draw(st.sampled_from(EPS_MODES)),
        n_shared=draw(st.integers(0, 3)),
        renorm_if_k1=draw(st.booleans()),
    )
    return spec, num_experts


@st.composite
def routing_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = LOW_DTYPES) -> RoutingCase:
    """Calls of 0 to 5 tokens."""
    spec, num_experts = draw(routing_specs())
    tokens, seed = draw(st.integers(0, 5)), draw(st.integers(0, 2**16))
    kinds, some_dtype = st.sampled_from(KINDS), st.sampled_from(dtypes)
    logits = values(draw(kinds), (tokens, num_experts + spec.n_shared), seed, draw(some_dtype))
    bias = values(draw(kinds), (num_experts,), seed + 1, draw(some_dtype)) if draw(st.booleans()) else None
    scale = values(draw(kinds), (num_experts,), seed + 2, draw(some_dtype)) if draw(st.booleans()) else None
    id_dtype = draw(st.sampled_from([None, None, torch.int32, torch.int64]))
    ids = None if id_dtype is None else given_ids(tokens, spec.top_k, num_experts, seed, id_dtype)
    return RoutingCase(spec, logits, bias, ids, scale)


# --- comparison ------------------------------------------------------------------------------------------------------


def assert_same(ours: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], *, rtol: float = 1e-6) -> None:
    """Equal ids [T, K] and near weights [T, K]."""
    (weights, ids), (wanted_weights, wanted_ids) = ours, wanted
    assert ids.dtype == torch.int32
    assert torch.equal(ids.cpu(), wanted_ids)
    torch.testing.assert_close(weights.cpu(), wanted_weights, rtol=rtol, atol=1e-12, equal_nan=True)


def assert_same_route(ours: tuple[Tensor, Tensor], case: RoutingCase) -> None:
    """Results [T, W] of the op on the CPU: ids equal to those of the oracle in the same dtype, all of them."""
    weights, ids = case.reference(torch.promote_types(case.logits.dtype, torch.float32))
    clear = [t for t in range(len(weights)) if _divides_clearly(case, t)]
    assert ours[1].dtype == torch.int32 and torch.equal(ours[1], ids)
    torch.testing.assert_close(ours[0][clear], weights[clear], rtol=1e-5, atol=1e-12, equal_nan=True)


def assert_alike(ours: tuple[Tensor, Tensor], case: RoutingCase) -> None:
    """fp32 results [T, W] of another implementation on any device: those of the oracle, on every clear token."""
    weights, ids = (result.cpu() for result in ours)
    clear = [t for t in range(len(weights)) if _is_clear(case, t)]
    wanted_weights, wanted_ids = case.reference(torch.float32)
    assert torch.equal(ids[clear], wanted_ids[clear]), (ids[clear], wanted_ids[clear])
    for token in clear:
        wanted = wanted_weights[token]
        largest = wanted[wanted.isfinite()].abs().max().item() if wanted.isfinite().any() else 0.0
        torch.testing.assert_close(weights[token], wanted, rtol=2e-4, atol=2e-5 * largest + _TINY, equal_nan=True)


def _close(first: float, second: float) -> bool:
    """Whether two finite values may come out in another order."""
    if not math.isfinite(first) or not math.isfinite(second):
        return False
    return abs(first - second) <= _CLOSE * max(abs(first), abs(second)) + _TINY


def _rounds_clearly(value: float, error: float, dtype: torch.dtype) -> bool:
    if not math.isfinite(value) or dtype.itemsize != 2:
        return True
    pair = torch.tensor([value - error, value + error], dtype=torch.float64).to(dtype)
    return bool(pair[0] == pair[1])


def _is_clear(case: RoutingCase, token: int) -> bool:
    """Whether rounding errors cannot change the ids and hardly the weights of a token."""
    scores, bias = _scores_and_bias(case, token)
    score_dtype, biased_dtype = _dtypes(case)
    if any(0 < abs(score) < _TINY or not _rounds_clearly(score, _CLOSE * score, score_dtype) for score in scores):
        return False
    for score, added in zip(scores, bias, strict=False):
        if not _rounds_clearly(_round(score, score_dtype) + added, _CLOSE * abs(score), biased_dtype):
            return False
    return (case.ids is not None or _chosen_clearly(case, token)) and _divides_clearly(case, token)


def _scores_and_bias(case: RoutingCase, token: int) -> tuple[list[float], list[float]]:
    """Exact scores of all columns of a token and the bias of the experts."""
    num_experts = case.num_experts
    spec = RoutingSpec(num_experts, case.spec.score, renorm=0.0, softcap=case.spec.softcap, n_shared=case.spec.n_shared)
    every = torch.arange(num_experts).unsqueeze(0)
    scores = moe_route_reference(case.logits[token : token + 1], spec, ids_TK=every)[0][0].tolist()
    return scores, [0.0] * num_experts if case.bias is None else case.bias.double().tolist()


def _dtypes(case: RoutingCase) -> tuple[torch.dtype, torch.dtype]:
    """What scores and biased scores are rounded to."""
    score = case.logits.dtype if case.spec.score_dtype == "logits" else getattr(torch, case.spec.score_dtype)
    return score, score if case.bias is None else torch.promote_types(score, case.bias.dtype)


def _divides_clearly(case: RoutingCase, token: int) -> bool:
    """Whether no weight, and not their sum, is what is left of greater terms that cancel."""
    scores, bias = _scores_and_bias(case, token)
    ids = case.reference(torch.float32)[1][token].tolist()
    added = [bias[e] if case.spec.bias_in_weights and e < case.num_experts else 0.0 for e in ids]
    pairs = [(scores[e], b) for e, b in zip(ids, added, strict=True) if e < len(scores)]
    terms = [abs(s) + abs(b) for s, b in pairs]
    if not all(math.isfinite(term) for term in terms):
        return True
    if any(abs(s + b) < 1e-3 * term for (s, b), term in zip(pairs, terms, strict=True) if b):
        return False
    return not terms or (sum(terms) > 1e-30 and abs(sum(map(sum, pairs))) >= 0.1 * sum(terms))


def _round(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=torch.float64).to(dtype).item() if dtype.itemsize == 2 else value


def _chosen_clearly(case: RoutingCase, token: int) -> bool:
    """Whether no two experts, and no two groups, of different inputs are close in what they are selected on."""
    spec, num_experts = case.spec, case.num_experts
    scores, bias = _scores_and_bias(case, token)
    score_dtype, biased_dtype = _dtypes(case)
    inputs = list(zip(case.logits[token].double().tolist(), bias, strict=False))
    if spec.select_on == "logits":
        capped = [spec.softcap * math.tanh(z / spec.softcap) if spec.softcap else z for z, _ in inputs]
        on, biased_dtype = [z + b for z, b in zip(capped, bias, strict=True)], torch.float32
    else:
        on = [_round(_round(s, score_dtype) + b, biased_dtype) for s, b in zip(scores, bias, strict=False)]
    if spec.n_group > 1 and any(_close(value, 0.0) for value in on):
        return False
    rounded = biased_dtype.itemsize == 2
    for first in range(num_experts):
        for second in range(first):
            equal = inputs[first] == inputs[second] or (rounded and on[first] == on[second])
            if not equal and _close(on[first], on[second]):
                return False
    size = num_experts // spec.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(spec.n_group)]
    best = [sorted((on[e] for e in group), reverse=True)[:2] for group in groups]
    sums = [sum(pair) if spec.group_score == "top2_sum" else pair[0] for pair in best]
    if not all(_rounds_clearly(v, _CLOSE * sum(map(abs, p)), biased_dtype) for v, p in zip(sums, best, strict=True)):
        return False
    for first in range(spec.n_group):
        for second in range(first):
            same = sorted(inputs[e] for e in groups[first]) == sorted(inputs[e] for e in groups[second])
            span = max(map(abs, (*best[first], *best[second])))
            if not same and math.isfinite(span) and abs(sums[first] - sums[second]) <= _CLOSE * span + _TINY:
                return False
    return True
