"""The MoE layer on one device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowering.reference.moe_block import ExpertWeights

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
        experts = spec.experts
        num_experts, hidden, width = experts.num_experts, experts.hidden_size, experts.intermediate_size
        rows = width * (2 if experts.gated else 1)
        sizes = {"w13": (num_experts, rows, hidden), "w2": (num_experts, hidden, width)}
        biases = {"b13": (num_experts, rows), "b2": (num_experts, hidden)}
        for name, size in (sizes | biases).items():
            absent = name in biases and not experts.bias
            value = None if absent else nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            self.register_parameter(name, value)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Experts as `nn.Linear` draws its weights; the parts of the layer do theirs when they are made."""
        for weight, bias in ((self.w13, self.b13), (self.w2, self.b2)):
            bound = weight.shape[2] ** -0.5
            for tensor in (weight, bias):
                if tensor is not None:
                    tensor.uniform_(-bound, bound)

    def run_experts(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """Weighted sum of the routed experts: [T, H] floating, for hidden [T, H], weights [T, K] and ids [T, K] int."""
        spec = self.spec.experts
        experts = ExpertWeights(self.w13, self.w2, self.b13, self.b2, spec.act, spec.interleaved)
        # autocast can leave hidden states and weights in different dtypes
        return self._run(hidden_TH.to(self.w13.dtype), weights_TK, ids_TK, experts=experts)

    def extra_repr(self) -> str:
        """The sizes and the implementation, for `print(model)`."""
        experts = self.spec.experts
        sizes = f"E={experts.num_experts} K={self.top_k} H={experts.hidden_size} I={experts.intermediate_size}"
        return f"{sizes}, act={experts.act!r}, moe_gemm_impl={self.moe_gemm_impl!r}"
