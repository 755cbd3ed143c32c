"""The dispatcher of static shapes: no size depends on the routing, the host reads nothing, nothing is dropped."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lowering import ops

from ...distributed.collectives import all_gather, all_to_all, gather
from .base_dispatcher import DispatcherOutput, ExchangePlan, TokenDispatcher


@dataclasses.dataclass(frozen=True)
class StaticDispatchMetadata:
    """What `combine` needs, for a capacity of C tokens a rank and R = ranks * C received rows.

    num_tokens    T tokens of this rank
    slot_ranks    [T, K] int32, the rank of each slot's expert; -1 for none
    weights       [T, K] floating
    recv_weights  [R, K] floating, with gradient
    """

    num_tokens: int
    slot_ranks: Tensor
    weights: Tensor
    recv_weights: Tensor


def _padded(tensor: Tensor, rows: int, *, fill: int = 0) -> Tensor:
    """[T, X] -> [rows, X] in the same dtype, filled up at the end; one graph for a full and a partly filled tensor."""
    return torch.cat((tensor, tensor.new_full((rows, tensor.shape[1]), fill)))[:rows]


class StaticDispatcher(TokenDispatcher[StaticDispatchMetadata]):
    """Every token travels once per rank, whatever its experts, into a place fixed by its rank and its number.

    Capacity: a rank brings at most C = `plan.max_tokens` tokens to a call, and each rank keeps room for C of every
    rank, for all of them may choose its experts. So nothing is ever dropped; a call with more tokens is refused. As
    that room is exchanged whole, the exchange is an all-gather of [C, H]; rows of no local expert are skipped by the
    grouped GEMMs. The way back is one all-to-all of [R, K, H] (`exact`: per slot, which equals a single rank's result
    bitwise, and so do the gradients of the experts; that of the hidden states adds up per rank, not per slot), or of
    sums [R, H] in fp32.
    """

    def __init__(self, plan: ExchangePlan) -> None:
        super().__init__(plan)
        assert plan.max_tokens is not None, "ParallelConfig.check asks for max_tokens_per_rank"
        self.capacity = plan.max_tokens
        self.exact = plan.parallel.exact

    def _dispatch(
        self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> DispatcherOutput[StaticDispatchMetadata]:
        known_TK = self._known(ids_TK)
        slot_ranks_TK = self.rank_of_expert[known_TK]
        recv_RH = all_gather(_padded(hidden_TH, self.capacity), self.size, group=self.group)
        known_CK = _padded(known_TK.int(), self.capacity, fill=self.num_experts)
        known_RK = gather(known_CK, self.size, group=self.group).long()
        rows_RK = torch.where(self.rank_of_expert[known_RK] == self.rank, self.row_of_expert[known_RK], -1)
        weights_CK = _padded(weights_TK, self.capacity)
        if self.exact:  # they are applied where they are; what travels is for the record
            weights_RK = gather(weights_CK.detach(), self.size, group=self.group)
        else:
            weights_RK = all_gather(weights_CK, self.size, group=self.group)
        metadata = StaticDispatchMetadata(hidden_TH.shape[0], slot_ranks_TK, weights_TK, weights_RK)
        return DispatcherOutput(metadata, recv_RH, rows_RK, weights_RK)

    def _num_slots(self, metadata: StaticDispatchMetadata) -> int:
        return self.size * self.capacity * self.plan.top_k

    def _combine(self, slots_NH: Tensor, metadata: StaticDispatchMetadata) -> Tensor:
        return self._of_slots(slots_NH, metadata) if self.exact else self._of_sums(slots_NH, metadata)

    def _back(self, rows: Tensor) -> Tensor:
        splits = [rows.shape[0] // self.size] * self.size
        return all_to_all(rows, splits, send=splits, group=self.group)

    def _of_slots(self, slots_NH: Tensor, metadata: StaticDispatchMetadata) -> Tensor:
        """Each slot's result from the rank of its expert, and zeros where there is none."""
        ranks_N = metadata.slot_ranks.reshape(-1)
        slot_N = torch.arange(ranks_N.shape[0], device=ranks_N.device)
        place_N = ranks_N.clamp(min=0).long() * (self.capacity * self.plan.top_k) + slot_N
        back_NH = self._back(slots_NH).index_select(0, place_N)
        return ops.moe_combine(torch.where((ranks_N >= 0).unsqueeze(1), back_NH, 0.0), metadata.weights)

    def _of_sums(self, slots_NH: Tensor, metadata: StaticDispatchMetadata) -> Tensor:
        """A sum per token and rank, added up in the order of the ranks."""
        wide = torch.promote_types(slots_NH.dtype, torch.float32)
        sums_RH = self._back(ops.moe_combine(slots_NH.to(wide), metadata.recv_weights))
        sums_CH = sums_RH.unflatten(0, (self.size, self.capacity)).sum(0)
        tokens_T = torch.arange(metadata.num_tokens, device=sums_CH.device)  # a slice has a graph of its own when full
        return sums_CH.index_select(0, tokens_T).to(slots_NH.dtype)
