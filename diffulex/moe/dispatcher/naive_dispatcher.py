"""The reference dispatcher: each slot travels, with exact splits, which the host reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lowering import ops

from ...distributed.collectives import exchange
from ...distributed.slots import exchange_rows, send_rows
from ..metadata import DispatchMetadata
from .base_dispatcher import DispatcherOutput, TokenDispatcher


@dataclasses.dataclass(frozen=True)
class NaiveDispatchMetadata(DispatchMetadata):
    """The record of an exchange of slots, and what the sender keeps.

    order_N       [N] int32, slots by rank of their expert, those of no expert last
    weights_TK    [T, K] floating
    """

    order_N: Tensor
    weights_TK: Tensor


class _SlotsOfTokens(torch.autograd.Function):
    """hidden [T, H] -> the rows [N, H] of slots in an order [N] whose tokens [N] are given; the gradient adds a token's
    slots one after the other, in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, order_N: Tensor, token_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_N)
        ctx.shape = (hidden_TH.shape[0], top_k, hidden_TH.shape[1])
        return hidden_TH.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None, None, None]:
        (order_N,) = ctx.saved_tensors
        slots_TKH = _InPlace.apply(grad_NH, order_N).view(ctx.shape)
        wide = torch.promote_types(grad_NH.dtype, torch.float32)
        return slots_TKH.sum(1, dtype=wide).to(grad_NH.dtype), None, None, None


class _InPlace(torch.autograd.Function):
    """Rows [N, H] of slots in an order [N] -> in that of the slots. A gather, which a kernel behind it takes in."""

    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, order_N: Tensor) -> Tensor:
        ctx.save_for_backward(order_N)
        numbers_N = torch.arange(order_N.shape[0], dtype=order_N.dtype, device=order_N.device)
        return rows_NH.index_select(0, torch.empty_like(order_N).scatter_(0, order_N.long(), numbers_N))

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None]:
        (order_N,) = ctx.saved_tensors
        return grad_NH.index_select(0, order_N), None


class NaiveA2ADispatcher(TokenDispatcher[NaiveDispatchMetadata]):
    """Each slot travels to the rank of its expert and back, through `all_to_all_single` with exact splits.

    A rank receives the slots of rank 0, then of rank 1, and so on, each in their order, so every expert multiplies the
    same matrix as on a single rank that has the tokens of all, one rank's after the other's; the results come back per
    slot and are weighted once, where they came from. Result and gradients equal that single rank's bitwise, as far as
    the GEMMs do not round by the alignment of their arguments or by the rows of other experts.

    Splits are read on the host, in an op: `torch.compile(fullgraph=True)` holds the call in one graph, whose rows here
    have an unbacked size; without it, where Dynamo's `capture_dynamic_output_shape_ops` is off, the graph breaks there.
    """

    def _dispatch(
        self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> DispatcherOutput[NaiveDispatchMetadata]:
        """All that has a shape before the splits are known comes first: compiled code makes kernels of it."""
        ranks_TK, rows_TK = self._chosen(self._known(ids_TK))
        order_N, token_N, offsets_R1 = ops.moe_dispatch(ranks_TK, self.size)
        words_N = weights_TK.detach().float().reshape(-1).view(torch.int32)
        details_N3 = torch.stack((rows_TK.view(-1)[order_N], token_N, words_N[order_N]), dim=1)
        counts_R = (offsets_R1[1:] - offsets_R1[:-1]).long()
        ones = [1] * self.size
        both_2R = torch.stack((counts_R, exchange(counts_R, ones, send=ones, group=self.group)))
        rows_NH = _SlotsOfTokens.apply(hidden_TH, order_N, token_N, weights_TK.shape[1])
        recv_RH, details_R3, splits_2R = send_rows(rows_NH, details_N3, splits_2R=both_2R, group=self.group)
        rows_R, tokens_R, words_R = details_R3.unbind(1)
        weights_R = words_R.contiguous().view(torch.float32)
        received = (recv_RH, rows_R, tokens_R, weights_R)
        metadata = NaiveDispatchMetadata(
            hidden_TH.shape[0], splits_2R, *received, order_N=order_N, weights_TK=weights_TK
        )
        return DispatcherOutput(metadata, recv_RH, rows_R.unsqueeze(1), weights_R.unsqueeze(1))

    def _num_slots(self, metadata: NaiveDispatchMetadata) -> int:
        return metadata.total_recv_slots

    def _combine(self, slots_NH: Tensor, metadata: NaiveDispatchMetadata) -> Tensor:
        """Slots in their places, with zeros where there is no expert, and their weighted sums."""
        count = metadata.order_N.shape[0]
        back_NH = exchange_rows(slots_NH, metadata.splits_2R, count=count, back=True, group=self.group)
        return ops.moe_combine(_InPlace.apply(back_NH, metadata.order_N), metadata.weights_TK)
