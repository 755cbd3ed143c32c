"""The MoE layer under expert parallelism: each rank owns experts and has tokens of its own, which travel."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowering.errors import MoEUnsupportedError
from lowering.reference.moe_block import ExpertWeights

from ...distributed.parallel import ParallelConfig
from ..dispatcher import ExchangePlan, build_token_dispatcher
from .sharded import ShardedFusedMoE
from .spec import MoESpec

if TYPE_CHECKING:
    from ..dispatcher.static_dispatcher import StaticDispatcher


class _TakesPart(torch.autograd.Function):
    """Hidden states or weights that ask for gradients because the experts do.

    The way back is an exchange that all ranks make or none, and a rank without tokens has hidden states of no history.
    """

    @staticmethod
    def forward(ctx: Any, given: Tensor, asks: Tensor) -> Tensor:
        return given.view_as(given)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class EPFusedMoE(ShardedFusedMoE):
    """Every rank calls the layer with its own tokens, any number of them, and gets their results.

    w13  [E', J, H], w2 [E', H, I], b13 and b2: the experts `owned_experts` of this rank

    Shared experts, latent projections and null experts are computed where the token is. With the dispatchers "naive"
    and "static" the routed experts give bitwise what a single rank gives for the tokens of all ranks together
    (`ParallelConfig.exact`): on CPUs where rows of the weights are multiples of 64 bytes, as GEMMs there round by the
    alignment of what they read; on CUDA where hidden states and experts are less than 8192 wide, or batch-invariant, as
    specialised warps add up wider ones by the rows of all experts. Every rank takes part in every forward and backward
    pass. Where some experts have more to do, `ExpertLoad` and `plan_placement` of `diffulex.distributed` make a
    placement.
    """

    mode = "ep"

    def _prepare(self, parallel: ParallelConfig) -> None:
        self._copies = tuple(parallel.experts_of(self.num_experts).replicas)
        self.dispatcher: Any = build_token_dispatcher(
            parallel.dispatcher, _plan(self.spec, parallel, dtype=self.w13.dtype)
        )

    @classmethod
    def _check_backend(cls, spec: MoESpec, parallel: ParallelConfig) -> None:
        if parallel.dispatcher == "deepep":
            from ..dispatcher.deepep_dispatcher import check_deepep

            check_deepep(_plan(spec, parallel))

    def run_experts(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """Weighted sum of the routed experts: [T, H] floating, for hidden [T, H], weights [T, K] and ids [T, K] int.

        Raises `MoEUnsupportedError` where experts that have copies are to be trained.
        """
        held = (self.w13, self.w2, self.b13, self.b2)
        asks = next((t for t in held if t is not None and t.requires_grad), None) if torch.is_grad_enabled() else None
        if self._copies and asks is not None:
            raise MoEUnsupportedError.of(
                type(self).__name__,
                expected="no gradients of experts that are on several ranks",
                got=f"copies of the experts {list(self._copies)[:8]}",
                hint="Call it under torch.no_grad(), or train with a placement without replicas.",
            )
        hidden_TH = hidden_TH.to(self.w13.dtype)
        if asks is not None:
            hidden_TH, weights_TK = (
                t if t.requires_grad else _TakesPart.apply(t, asks) for t in (hidden_TH, weights_TK)
            )
        return self._run_placed(hidden_TH, weights_TK, ids_TK)

    def _run_weighted(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> Tensor:
        if self.parallel.chunks > 1 and not torch.is_grad_enabled():
            static: StaticDispatcher = self.dispatcher
            first = functools.partial(self._slots.first, experts=experts)
            return static.run_in_parts(hidden_TH, ids_TK, weights_TK, first=first)
        sent = self.dispatcher.dispatch(hidden_TH, ids_TK, weights_TK)
        try:
            slots_NH = self._slots(sent.recv_hidden_states, sent.recv_local_expert_ids, experts=experts)
            return self.dispatcher.combine(slots_NH, sent.metadata)
        except BaseException:  # nobody will take what is owed, and the next call is a turn of its own
            self.dispatcher.reset()
            raise

    def extra_repr(self) -> str:
        """The sizes here and in all, and how tokens travel, for `print(model)`."""
        return f"{super().extra_repr()}, dispatcher={self.parallel.dispatcher!r}: {self.dispatcher.transport}"


def _plan(spec: MoESpec, parallel: ParallelConfig, *, dtype: torch.dtype | None = None) -> ExchangePlan:
    """Weighted inputs differ from slot to slot, so slots travel as tokens of one expert."""
    row_bytes = None if dtype is None else spec.experts.hidden_size * dtype.itemsize
    num_experts, top_k, most = spec.experts.num_experts, spec.routing.top_k, parallel.max_tokens_per_rank
    if spec.routing.apply_weight_on == "input":
        return ExchangePlan(parallel, num_experts, 1, None if most is None else most * top_k, top_k, row_bytes)
    return ExchangePlan(parallel, num_experts, top_k, most, row_bytes=row_bytes)
