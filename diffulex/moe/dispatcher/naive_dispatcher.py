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

_SPLITS = "the splits of an exchange with exact splits are read on the host"


@dataclasses.dataclass(frozen=True)
class NaiveDispatchMetadata(DispatchMetadata):
    """The record of an exchange of slots, and what the sender keeps.

    sent_slots    [S] int32, the slots that were sent, by rank of their expert
    weights_TK    [T, K] floating
    """

    sent_slots: Tensor
    weights_TK: Tensor


class _SlotsOfTokens(torch.autograd.Function):
    """hidden [T, H] -> the rows [S, H] of slots, whose tokens are given; the gradient adds a token's slots in their
    order, in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, slots_S: Tensor, tokens_S: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slots_S)
        ctx.shape = (hidden_TH.shape[0], top_k, hidden_TH.shape[1])
        return hidden_TH.index_select(0, tokens_S)

    @staticmethod
    def backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor, None, None, None]:
        (slots_S,) = ctx.saved_tensors
        tokens, top_k, hidden = ctx.shape
        grad_NH = grad_SH.new_zeros(tokens * top_k, hidden).index_copy(0, slots_S.long(), grad_SH)
        wide = torch.promote_types(grad_SH.dtype, torch.float32)
        return grad_NH.view(tokens, top_k, hidden).sum(1, dtype=wide).to(grad_SH.dtype), None, None, None


class NaiveA2ADispatcher(TokenDispatcher[NaiveDispatchMetadata]):
    """Each slot travels to the rank of its expert and back, through `all_to_all_single` with exact splits.

    A rank receives the slots of rank 0, then of rank 1, and so on, each in their order, so every expert multiplies the
    same matrix as on a single rank that has the tokens of all, one rank's after the other's; the results come back per
    slot and are weighted once, where they came from. Result and gradients equal that single rank's bitwise, as far as
    the GEMMs do not round by the alignment of their arguments.

    Splits are read on the host: compiled code breaks its graph here.
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
        return self._send(hidden_TH, weights_TK, order_N, details_N3, both_2R)

    @torch.compiler.disable(reason=_SPLITS)
    def _send(
        self, hidden_TH: Tensor, weights_TK: Tensor, order_N: Tensor, details_N3: Tensor, both_2R: Tensor
    ) -> DispatcherOutput[NaiveDispatchMetadata]:
        """Slots in order_N [N] int32 and details_N3 [N, 3] int32 of them to their ranks, by splits [2, ranks] int64."""
        send, recv = both_2R.tolist()
        sent = sum(send)
        slots_S, details_S3 = order_N[:sent], details_N3[:sent]
        rows_SH = _SlotsOfTokens.apply(hidden_TH, slots_S, details_S3[:, 1], weights_TK.shape[1])
        recv_RH = all_to_all(rows_SH, recv, send=send, group=self.group)
        details_R3 = exchange(details_S3, recv, send=send, group=self.group)
        rows_R, tokens_R, _ = details_R3.unbind(1)
        weights_R = details_R3.view(torch.float32)[:, 2]
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

    def _combine(self, slots_NH: Tensor, metadata: NaiveDispatchMetadata) -> Tensor:
        return ops.moe_combine(self._back(slots_NH, metadata), metadata.weights_TK)

    @torch.compiler.disable(reason=_SPLITS)
    def _back(self, slots_NH: Tensor, metadata: NaiveDispatchMetadata) -> Tensor:
        """The results of this rank's slots [T * K, H] in their order, zeros where there is no expert."""
        send, recv = list(metadata.send_splits), list(metadata.recv_splits)
        back_SH = all_to_all(slots_NH, send, send=recv, group=self.group)
        count = metadata.weights_TK.numel()
        make = back_SH.new_empty if back_SH.shape[0] == count else back_SH.new_zeros  # each slot is written, or not
        return make(count, slots_NH.shape[1]).index_copy_(0, metadata.sent_slots.long(), back_SH)
