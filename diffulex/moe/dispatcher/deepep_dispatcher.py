"""DeepEP's normal mode as a dispatcher: optional, imported when it is asked for, and inference only."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor

from lowering import ops
from lowering.errors import MoEUnsupportedError

from ...distributed.placement import ExpertPlacement
from .base_dispatcher import DispatcherOutput, ExchangePlan, TokenDispatcher


@dataclasses.dataclass(frozen=True)
class DeepEPDispatchMetadata:
    """What `combine` needs.

    handle        DeepEP's record of the exchange
    recv_weights  [R, K] fp32
    dtype         that of the hidden states
    """

    handle: Any
    recv_weights: Tensor
    dtype: torch.dtype


def _unsupported(expected: str, *, got: str, hint: str) -> Any:
    return MoEUnsupportedError.of("dispatcher 'deepep'", expected=expected, got=got, hint=hint)


def _refuse_gradients(what: str, *tensors: Tensor) -> None:
    """DeepEP's buffers cut the graph, so a gradient would be missing without a word."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise _unsupported(
            "a call without gradients",
            got=f"{what} that require them",
            hint="Call it under torch.no_grad(), or train with the dispatcher 'naive' or 'static'.",
        )


def check_deepep(plan: ExchangePlan) -> Any:
    """The module `deep_ep`; `MoEUnsupportedError` where it cannot be imported or does not place experts like that."""
    try:
        module = importlib.import_module("deep_ep")
    except ImportError as error:
        raise _unsupported(
            "the package deep_ep (https://github.com/deepseek-ai/DeepEP)",
            got=f"{type(error).__name__}: {error}",
            hint="Install it, or use the dispatcher 'naive' or 'static'.",
        ) from error
    size = plan.parallel.size
    if plan.num_experts % size or plan.placement != ExpertPlacement.even(plan.num_experts, size):
        raise _unsupported(
            "equally many consecutive experts on each rank",
            got=f"{plan.num_experts} experts as {str(plan.placement.owned)[:80]}",
            hint="DeepEP knows no other placement; use the dispatcher 'naive' or 'static'.",
        )
    return module


class DeepEPDispatcher(TokenDispatcher[DeepEPDispatchMetadata]):
    """Each token travels once per rank through DeepEP's buffers, in bf16; sums per token and rank travel back.

    Equals a single rank up to rounding: the sums of the ranks are rounded to bf16 before they are added up. The host
    waits for the counts. Buffers are made with the first call.
    """

    def __init__(self, plan: ExchangePlan) -> None:
        super().__init__(plan)
        self._module = check_deepep(plan)
        self._buffer: Any = None

    @property
    def transport(self) -> str:
        """How tokens travel, for people."""
        return "DeepEP's buffers"

    def _dispatch(
        self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> DispatcherOutput[DeepEPDispatchMetadata]:
        _refuse_gradients("hidden states or weights", hidden_TH, weights_TK)
        buffer = self._buffer_for(hidden_TH)
        known_TK = self._known(ids_TK)
        ids_TK = torch.where(known_TK < self.num_experts, known_TK, -1)
        per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids_TK, self.num_experts)
        recv_RH, rows_RK, weights_RK, _, handle, _ = buffer.dispatch(
            hidden_TH.to(torch.bfloat16).contiguous(),
            topk_idx=ids_TK,
            topk_weights=weights_TK.float().contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        metadata = DeepEPDispatchMetadata(handle, weights_RK, hidden_TH.dtype)
        return DispatcherOutput(metadata, recv_RH.to(hidden_TH.dtype), rows_RK.int(), weights_RK)

    def _num_slots(self, metadata: DeepEPDispatchMetadata) -> int:
        return metadata.recv_weights.numel()

    def _combine(self, slots_NH: Tensor, metadata: DeepEPDispatchMetadata) -> Tensor:
        _refuse_gradients("results of experts", slots_NH)
        sums_RH = ops.moe_combine(slots_NH, metadata.recv_weights).to(torch.bfloat16)
        return self._buffer.combine(sums_RH, metadata.handle)[0].to(metadata.dtype)

    def _buffer_for(self, hidden_TH: Tensor) -> Any:
        if self._buffer is None:
            kind, row_bytes = self._module.Buffer, hidden_TH.shape[1] * torch.bfloat16.itemsize
            configs = (kind.get_dispatch_config(self.size), kind.get_combine_config(self.size))
            nvl = max(config.get_nvl_buffer_size_hint(row_bytes, self.size) for config in configs)
            rdma = max(config.get_rdma_buffer_size_hint(row_bytes, self.size) for config in configs)
            self._buffer = kind(self.plan.parallel.group, num_nvl_bytes=nvl, num_rdma_bytes=rdma)
        return self._buffer
