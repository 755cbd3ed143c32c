"""The reference dispatcher: each slot travels, with exact splits, which the host reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lowering import ops

from ...distributed.collectives import all_to_all, exchange
from ..metadata import DispatchMetadata
from .base_dispatcher import DispatcherOutput, TokenDispatcher


@dataclasses.dataclass(frozen=True)
class NaiveDispatchMetadata(DispatchMetadata):
    """The record of an exchange of slots, and what the sender keeps.

    sent_slots    [S] int32, the slots that were sent, by rank of their expert
    weights_TK    [T, K] floating
    """

    sent_slots: Tensor
    weights_TK: Tensor


class _SlotsOfTokens(torch.autograd.Function):
    """hidden [T, H] -> the rows [S, H] of given slots; the gradient adds a token's slots in their order, in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, slots_S: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slots_S)
        ctx.shape = (hidden_TH.shape[0], top_k, hidden_TH.shape[1])
        return hidden_TH.index_select(0, slots_S // top_k)

    @staticmethod
    def backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor, None, None]:
        (slots_S,) = ctx.saved_tensors
        tokens, top_k, hidden = ctx.shape
        grad_NH = grad_SH.new_zeros(tokens * top_k, hidden).index_copy(0, slots_S.long(), grad_SH)
        wide = torch.promote_types(grad_SH.dtype, torch.float32)
        return grad_NH.view(tokens, top_k, hidden).sum(1, dtype=wide).to(grad_SH.dtype), None, None


class NaiveA2ADispatcher(TokenDispatcher[NaiveDispatchMetadata]):
    """Each slot travels to the rank of its expert and back, through `all_to_all_single` with exact splits.

    A rank receives the slots of rank 0, then of rank 1, and so on, each in their order, so every expert multiplies the
    same matrix as on a single rank that has the tokens of all, one rank's after the other's; the results come back per
    slot and are weighted once, where they came from. Result and gradients equal that single rank's bitwise, as far as
    the GEMMs do not round by the alignment of their arguments.

    Splits are read on the host: compiled code breaks its graph here.
    """

    @torch.compiler.disable(reason="the splits of an exchange with exact splits are read on the host")
    def _dispatch(
        self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> DispatcherOutput[NaiveDispatchMetadata]:
        known_TK = self._known(ids_TK)
        ranks_TK, rows_TK = self._chosen(known_TK)
        order_N, _, offsets_R1 = ops.moe_dispatch(ranks_TK, self.size)
        counts_R = (offsets_R1[1:] - offsets_R1[:-1]).long()
        ones = [1] * self.size
        both_2R = torch.stack((counts_R, exchange(counts_R, ones, send=ones, group=self.group)))
        send, recv = both_2R.tolist()
        slots_S = order_N[: sum(send)]
        top_k = ids_TK.shape[1]
        rows_SH = _SlotsOfTokens.apply(hidden_TH, slots_S, top_k)
        recv_RH = all_to_all(rows_SH, recv, send=send, group=self.group)
        details_S3 = torch.stack(
            (
                rows_TK.view(-1)[slots_S.long()],
                slots_S // top_k,
                weights_TK.detach().float().reshape(-1)[slots_S.long()].view(torch.int32),
            ),
            dim=1,
        )
        rows_R, tokens_R, weights_R = exchange(details_S3, recv, send=send, group=self.group).unbind(1)
        weights_R = weights_R.contiguous().view(torch.float32)
        metadata = NaiveDispatchMetadata(
            hidden_TH.shape[0],
            tuple(send),
            tuple(recv),
            recv_RH,
            rows_R,
            tokens_R,
            weights_R,
            sent_slots=slots_S,
            weights_TK=weights_TK,
        )
        return DispatcherOutput(metadata, recv_RH, rows_R.unsqueeze(1), weights_R.unsqueeze(1))

    def _num_slots(self, metadata: NaiveDispatchMetadata) -> int:
        return metadata.total_recv_slots

    @torch.compiler.disable(reason="the splits of an exchange with exact splits are read on the host")
    def _combine(self, slots_NH: Tensor, metadata: NaiveDispatchMetadata) -> Tensor:
        send, recv = list(metadata.send_splits), list(metadata.recv_splits)
        back_SH = all_to_all(slots_NH, send, send=recv, group=self.group)
        slots_of_tokens = back_SH.new_zeros(metadata.weights_TK.numel(), slots_NH.shape[1])
        slots_of_tokens = slots_of_tokens.index_copy(0, metadata.sent_slots.long(), back_SH)
        return ops.moe_combine(slots_of_tokens, metadata.weights_TK)
