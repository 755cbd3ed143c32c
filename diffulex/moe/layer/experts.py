"""The routed experts, once per implementation: `run(hidden, weights, ids, experts) -> [T, H]`."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from lowering import ops
from lowering.errors import MoEUnsupportedError
from lowering.reference.moe_block import ExpertWeights

from ..metadata import ExpertExecutionMetadata
from .spec import MoESpec


class Begun(Protocol):
    """Experts of some tokens of which the first step is done, so that something else can come before the rest.

    done  what the first step gave, [...] of any dtype
    mark  a small tensor [...] that the rest begins with: whoever wants it later passes a copy that is made later
    """

    @property
    def done(self) -> Tensor:
        """[...], any dtype."""

    @property
    def mark(self) -> Tensor:
        """[...], any dtype."""

    def rest(self, mark: Tensor) -> Tensor:
        """The slots [T*K, H] of `RunSlots`, floating, for `mark` or a copy of it."""


class RunSlots(Protocol):
    """An implementation of the routed experts, slot by slot, at once or in two steps."""

    def __call__(self, hidden_TH: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> Tensor:
        """[T*K, H] in the dtype of hidden [T, H], in slot order and without weights, for ids [T, K] int."""

    def first(self, hidden_TH: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> Begun:
        """The first step of the same, hidden [T, H] floating and ids [T, K] int; all of it where it has no steps."""


class RunExperts(Protocol):
    """An implementation of the routed experts."""

    def __call__(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> Tensor:
        """[T, H] in the dtype of hidden [T, H], for weights [T, K] floating and ids [T, K] int."""


@dataclasses.dataclass(frozen=True)
class HiddenUnits:
    """The first expert GEMM and its activation are done: act [N, I] in the order [N] and at the offsets [E+1]."""

    act_NI: Tensor
    order_N: Tensor
    offsets_E1: Tensor
    experts: ExpertWeights

    @property
    def done(self) -> Tensor:
        """The activations [N, I], in the dtype of the hidden states."""
        return self.act_NI

    @property
    def mark(self) -> Tensor:
        """The offsets [E+1] int32."""
        return self.offsets_E1

    def rest(self, mark: Tensor) -> Tensor:
        """The second GEMM: [N, H] in the dtype of the activations, in slot order."""
        return ops.moe_expert_down(self.act_NI, self.experts.w2_EHI, self.experts.b2_EH, self.order_N, mark)


@dataclasses.dataclass(frozen=True)
class SlotsByOps:
    """What each expert makes of each token through the ops, which torch.compile captures and fuses."""

    def first(self, hidden_TH: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> HiddenUnits:
        """Slots sorted by expert, and their first GEMM: hidden [T, H] floating, ids [T, K] int."""
        plan = ExpertExecutionMetadata.from_topk_ids(ids_TK, experts.w13_EJH.shape[0])
        order_N, offsets_E1 = plan.sorted_slot_ids, plan.seg_indptr
        act_NI = ops.moe_expert_up(
            hidden_TH,
            experts.w13_EJH,
            experts.b13_EJ,
            order_N,
            offsets_E1,
            plan.top_k,
            experts.act,
            experts.interleaved,
        )
        return HiddenUnits(act_NI, order_N, offsets_E1, experts)

    def __call__(self, hidden_TH: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> Tensor:
        """[T*K, H] in the dtype of hidden, in slot order and without weights.

        hidden [T, H] floating in the dtype of the experts, ids [T, K] int; slots of ids outside [0, E) are zero.
        """
        begun = self.first(hidden_TH, ids_TK, experts=experts)
        return begun.rest(begun.mark)


slots_by_ops = SlotsByOps()


def run_ops(hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> Tensor:
    """The experts through the ops, which torch.compile captures and fuses.

    hidden [T, H] floating, weights [T, K] floating, ids [T, K] int; ids outside [0, E) contribute nothing.
    Returns [T, H] in the dtype of hidden, which is that of the experts. Differentiable.
    """
    return ops.moe_combine(slots_by_ops(hidden_TH, ids_TK, experts=experts), weights_TK)


@dataclasses.dataclass(frozen=True)
class WholeSlots:
    """Nothing is left to be done: slots [N, H]."""

    slots_NH: Tensor

    @property
    def done(self) -> Tensor:
        """The slots [N, H] floating."""
        return self.slots_NH

    @property
    def mark(self) -> Tensor:
        """Nothing, [0] in the dtype of the slots."""
        return self.slots_NH.new_empty(0)

    def rest(self, mark: Tensor) -> Tensor:
        """The slots [N, H] floating."""
        return self.slots_NH


@dataclasses.dataclass(frozen=True)
class SlotsOf:
    """`slots_by_ops` through an implementation that only knows weighted sums: a token for each slot, of weight 1."""

    run: RunExperts

    def __call__(self, hidden_TH: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> Tensor:
        """[T*K, H] in the dtype of hidden [T, H], for ids [T, K] int."""
        slots_NH = hidden_TH.repeat_interleave(ids_TK.shape[1], dim=0)
        ones_N1 = hidden_TH.new_ones(slots_NH.shape[0], 1)
        return self.run(slots_NH, ones_N1, ids_TK.reshape(-1, 1), experts=experts)

    def first(self, hidden_TH: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> WholeSlots:
        """All of it, as what is known of `run` has no steps: slots of hidden [T, H] floating and ids [T, K] int."""
        return WholeSlots(self(hidden_TH, ids_TK, experts=experts))


def weighted_on_input(
    run: RunExperts, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, *, experts: ExpertWeights
) -> Tensor:
    """The experts of `run` with the weight multiplied on their input instead of their output (Llama 4).

    hidden [T, H] and weights [T, K] floating, ids [T, K] int. Returns [T, H] in the dtype of hidden.

    An activation is not linear, so weighting the input is not weighting the output. For K = 1 it is one product with
    the hidden states. For K > 1 a token has a different input for each of its experts: hidden is expanded to the slots
    [T*K, H], each a token of its own with one expert of weight 1, and the K results are added up.
    """
    num_tokens, top_k = ids_TK.shape
    inputs_TKH = hidden_TH.unsqueeze(1) * weights_TK.unsqueeze(2)
    inputs_NH = inputs_TKH.to(hidden_TH.dtype).reshape(num_tokens * top_k, hidden_TH.shape[1])
    ones_N1 = weights_TK.new_ones(num_tokens * top_k, 1)
    slots_NH = run(inputs_NH, ones_N1, ids_TK.reshape(num_tokens * top_k, 1), experts=experts)
    if top_k == 1:
        return slots_NH
    wide = torch.promote_types(slots_NH.dtype, torch.float32)
    return slots_NH.view(num_tokens, top_k, slots_NH.shape[1]).sum(1, dtype=wide).to(slots_NH.dtype)


@dataclasses.dataclass(frozen=True)
class WeightOnInput:
    """`weighted_on_input` of an implementation."""

    run: RunExperts

    def __call__(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> Tensor:
        """[T, H] in the dtype of hidden [T, H], for weights [T, K] floating and ids [T, K] int."""
        return weighted_on_input(self.run, hidden_TH, weights_TK, ids_TK, experts=experts)


def experts_function(spec: MoESpec) -> RunExperts:
    """The implementation a spec asks for; nothing falls back to another one.

    Raises `MoEUnsupportedError` where vLLM is asked for and is absent, has other signatures, or lacks what the spec
    needs.
    """
    if spec.moe_gemm_impl == "naive":
        from .experts_naive import run_naive  # loads Dynamo, to be kept out of graphs

        run: RunExperts = run_naive
    elif spec.moe_gemm_impl in ("vllm", "vllm_modular"):
        from ...integrations.vllm import vllm_experts

        run = vllm_experts(spec.moe_gemm_impl, spec.experts)
    else:
        run = run_ops
    return WeightOnInput(run) if spec.routing.apply_weight_on == "input" else run


def slots_function(spec: MoESpec) -> RunSlots:
    """The implementation a spec asks for, slot by slot; `MoEUnsupportedError` where it has none."""
    if spec.moe_gemm_impl == "triton":
        return slots_by_ops
    if spec.moe_gemm_impl == "naive":
        from .experts_naive import run_naive  # loads Dynamo, to be kept out of graphs

        return SlotsOf(run_naive)
    raise MoEUnsupportedError.of(
        "experts on several ranks",
        expected="moe_gemm_impl 'triton' or 'naive'",
        got=repr(spec.moe_gemm_impl),
        hint="vLLM's kernels run on one device here.",
    )
