"""The MoE layer under tensor parallelism: all ranks have the same tokens and add up what their weights give."""

from __future__ import annotations

import torch
from torch import Tensor

from lowering import ops
from lowering.reference.moe_block import ExpertWeights

from ...distributed.collectives import copy_to_ranks, of_first_rank, sum_of_ranks
from ...distributed.parallel import ParallelConfig
from ...distributed.static_sizes import mark_static
from .sharded import ShardedFusedMoE


class TPFusedMoE(ShardedFusedMoE):
    """Every rank calls the layer with the same tokens and gets the same result, after one all-reduce in fp32.

    `parallel.shard` "experts": w13 [E', J, H], w2 [E', H, I] of the rank's experts; "width": of all experts a slice of
    the width, w13 [E, J', H] and w2 [E, H, I'], where b2 [E, H] is the first rank's alone.

    The gradients of hidden states, router and everything replicated are complete on every rank. The noise of
    `routing.jitter` is the first rank's.
    """

    mode = "tp"

    def _prepare(self, parallel: ParallelConfig) -> None:
        self._group = parallel.group.group_name
        self._row_of_expert: Tensor | None = None
        if not self._split:
            rows = [-1] * (self.num_experts + 1)
            for row, expert in enumerate(self.owned_experts):
                rows[expert] = row
            self._row_of_expert = torch.tensor(rows, dtype=torch.int32, device=parallel.mesh.device_type)
            mark_static(self._row_of_expert)

    def run_experts(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """Weighted sum of the routed experts: [T, H] floating, for hidden [T, H], weights [T, K] and ids [T, K] int."""
        hidden_TH = copy_to_ranks(hidden_TH.to(self.w13.dtype), self._group)
        weights_TK = copy_to_ranks(weights_TK, self._group)
        if self._row_of_expert is not None:
            outside_TK = (ids_TK < 0) | (ids_TK >= self.num_experts)
            ids_TK = self._row_of_expert[torch.where(outside_TK, self.num_experts, ids_TK).long()]
        partial_TH = self._run_placed(hidden_TH, weights_TK, ids_TK)
        return sum_of_ranks(partial_TH, self._group).to(hidden_TH.dtype)

    def _noise(self, hidden_TH: Tensor) -> Tensor:
        return of_first_rank(super()._noise(hidden_TH), group=self._group)

    def _run_weighted(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> Tensor:
        """This rank's share of the sum, in fp32 or wider; told which slots are its own, compiled code skips others."""
        slots_NH = self._slots(hidden_TH, ids_TK, experts=experts)
        wide = torch.promote_types(slots_NH.dtype, torch.float32)
        if self._row_of_expert is None:  # all experts are here, and few slots have none
            return ops.moe_combine(slots_NH.to(wide), weights_TK)
        return ops.moe_combine(slots_NH.to(wide), weights_TK, ids_TK, len(self.owned_experts))
