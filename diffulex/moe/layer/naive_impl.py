"""The MoE layer on one device."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import FusedMoE
from .spec import MoESpec


class NaiveFusedMoE(FusedMoE):
    """All experts on one device; `spec.moe_gemm_impl` says what runs them.

    w13  [E, J, H], J = 2I for gated experts (gate rows, then up rows; alternating where `interleaved`), else I
    w2   [E, H, I]
    b13  [E, J], b2 [E, H], where `experts.bias`
    """

    def __init__(
        self, spec: MoESpec, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(spec, device=device, dtype=dtype)
        self.register_experts(spec.experts.num_experts, spec.experts.intermediate_size, device=device, dtype=dtype)

    def run_experts(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """Weighted sum of the routed experts: [T, H] floating, for hidden [T, H], weights [T, K] and ids [T, K] int."""
        # autocast can leave hidden states and weights in different dtypes
        return self._run(hidden_TH.to(self.w13.dtype), weights_TK, ids_TK, experts=self.expert_weights)

    def extra_repr(self) -> str:
        """The sizes and the implementation, for `print(model)`."""
        experts = self.spec.experts
        sizes = f"E={experts.num_experts} K={self.top_k} H={experts.hidden_size} I={experts.intermediate_size}"
        return f"{sizes}, act={experts.act!r}, moe_gemm_impl={self.moe_gemm_impl!r}"
