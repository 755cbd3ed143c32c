"""`FusedMoE`: the contract of a MoE layer, and everything but where the experts live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lowering.errors import MoEOptionError, MoEShapeError
from lowering.reference.moe_block import ExpertWeights

from ..topk import TopKOutput, build_topk_router
from .experts import experts_function
from .gate import RouterGate, named_dtype
from .shared import SharedExpertMLP
from .spec import MoESpec, get_moe_spec


class FusedMoE(nn.Module, ABC):
    """Router, routed experts and shared experts of one layer; subclasses place the routed experts.

    gate            `RouterGate`, None where the model computes the logits itself (`routing.logits_given`)
    router          `TopKRouter`
    latent_in/_out  linear layers around the routed experts alone, None without `experts.latent_size`
    out_bias        [H], added to the sum of a token's experts, None without `experts.output_bias`
    shared_experts  `SharedExpertMLP` or None
    w13 [E, J, H], w2 [E, H, I], b13 [E, J] and b2 [E, H] or None: the experts held here, see `NaiveFusedMoE`
    """

    w13: Tensor
    w2: Tensor
    b13: Tensor | None
    b2: Tensor | None
    out_bias: Tensor | None

    def __init__(
        self, spec: MoESpec, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        spec.check()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.spec = spec
        self.hidden_size, self.num_experts = spec.hidden_size, spec.experts.num_experts
        self.intermediate_size, self.top_k = spec.experts.intermediate_size, spec.routing.top_k
        self.moe_gemm_impl = spec.moe_gemm_impl
        self._run = experts_function(spec)
        self.gate = None
        if not spec.routing.logits_given:
            self.gate = RouterGate(spec.routing, spec.hidden_size, num_experts=self.num_experts, **factory)
        self.router = build_topk_router("triton", spec.routing, self.num_experts, **factory)
        latent = spec.experts.latent_size
        self.latent_in = None if latent is None else nn.Linear(spec.hidden_size, latent, bias=False, **factory)
        self.latent_out = None if latent is None else nn.Linear(latent, spec.hidden_size, bias=False, **factory)
        out_bias = nn.Parameter(torch.zeros(spec.hidden_size, **factory)) if spec.experts.output_bias else None
        self.register_parameter("out_bias", out_bias)
        self.shared_experts = None
        if spec.shared is not None:
            act = spec.experts.act if spec.shared_act is None else spec.shared_act
            self.shared_experts = SharedExpertMLP(spec.shared, spec.hidden_size, act=act, **factory)

    @classmethod
    def from_config(
        cls, config: Any, layer_idx: int | None = None, *, moe_gemm_impl: str | None = None, **factory: Any
    ) -> FusedMoE:
        """The layer a config describes; `factory` is `device` and `dtype`. Errors as `get_moe_spec` and `MoESpec`."""
        return cls(get_moe_spec(config, layer_idx, moe_gemm_impl=moe_gemm_impl), **factory)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        router_input: Tensor | None = None,
        router_logits: Tensor | None = None,
        topk_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Send every token through its experts.

        hidden_states  [..., H] floating, any number of tokens T, 0 included
        router_input   [..., H] floating, what the gate reads instead of hidden_states (Gemma 4)
        router_logits  [..., C] floating, in place of the gate's
        topk_ids       [..., K] int32 or int64, in place of the choice: hash tables, router replay

        Returns the result [..., H] in the dtype of hidden_states, and the logits [T, C]. Differentiable.
        Raises `MoEShapeError` or `MoEDtypeError` where an argument does not fit the layer, `MoEOptionError` where
        logits or ids are missing that the model has to hand over.
        """
        self._check_width("hidden_states", hidden_states)
        hidden_TH = hidden_states.reshape(-1, self.hidden_size)
        read_TH = hidden_TH if router_input is None else router_input.reshape(-1, router_input.shape[-1])
        if self.training and self.spec.routing.number("jitter"):
            noise_TH = self._noise(hidden_TH)
            hidden_TH, read_TH = hidden_TH * noise_TH, read_TH * noise_TH
        topk = self.route(read_TH, logits=router_logits, ids=topk_ids)
        out_TH = self.mix(hidden_TH, topk)
        return out_TH.reshape(hidden_states.shape), topk.router_logits

    def route(self, router_input: Tensor, *, logits: Tensor | None = None, ids: Tensor | None = None) -> TopKOutput:
        """The choice for router_input [..., H] floating, or for logits [..., C] floating; ids [..., K] int or None."""
        if ids is None and self.spec.routing.ids_given:
            raise self._missing("topk_ids", "a table of this model holds them")
        if logits is None:
            if self.gate is None:
                raise self._missing("router_logits", "this model computes them with code of its own")
            self._check_width("router_input", router_input)
            logits = self.gate(router_input.reshape(-1, self.hidden_size))
        else:
            logits = logits.reshape(-1, logits.shape[-1])
        return self.router(logits, ids=None if ids is None else ids.reshape(-1, ids.shape[-1]))

    def mix(self, hidden_TH: Tensor, topk: TopKOutput) -> Tensor:
        """The weighted experts of each token, shared ones too: [T, H] in the dtype of hidden [T, H]."""
        routing, dtype = self.spec.routing, hidden_TH.dtype
        weights, ids, top_k = topk.weights, topk.ids, self.top_k
        if routing.weight_dtype != "float32":
            weights = weights.to(named_dtype(routing.weight_dtype, dtype))
        shared_TS = None
        if routing.n_shared:
            shared_TS = weights[:, top_k:]
            weights, ids = weights[:, :top_k].contiguous(), ids[:, :top_k].contiguous()
        inputs_TH = hidden_TH if self.latent_in is None else self.latent_in(hidden_TH)
        out_TH = self.run_experts(inputs_TH, weights, ids)
        if self.latent_out is not None:
            out_TH = self.latent_out(out_TH)
        if self.out_bias is not None:
            out_TH = out_TH + self.out_bias
        if routing.num_null and routing.null == "identity":
            out_TH = out_TH + self._null_experts(hidden_TH, weights, ids)
        if self.shared_experts is not None:
            out_TH = self._with_shared(out_TH, self.shared_experts(hidden_TH, shared_TS))
        return out_TH.to(dtype)

    def register_experts(
        self,
        num_experts: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters of the experts held here, of that many and that wide, and draw them."""
        for name, size in self._expert_shapes(num_experts, width).items():
            absent = name in ("b13", "b2") and not self.spec.experts.bias
            value = None if absent else nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            self.register_parameter(name, value)
        self.reset_parameters()

    def _expert_shapes(self, num_experts: int, width: int) -> dict[str, tuple[int, ...]]:
        """The shapes of that many experts of that width, biases included."""
        rows, hidden = width * (2 if self.spec.experts.gated else 1), self.spec.experts.hidden_size
        return {
            "w13": (num_experts, rows, hidden),
            "w2": (num_experts, hidden, width),
            "b13": (num_experts, rows),
            "b2": (num_experts, hidden),
        }

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Experts as `nn.Linear` draws its weights; the parts of the layer do theirs when they are made."""
        for weight, bias in ((self.w13, self.b13), (self.w2, self.b2)):
            bound = self.spec.experts.hidden_size**-0.5 if weight is self.w13 else self.intermediate_size**-0.5
            for tensor in (weight, bias):
                if tensor is not None:
                    tensor.uniform_(-bound, bound)

    @property
    def expert_weights(self) -> ExpertWeights:
        """The experts held here."""
        spec = self.spec.experts
        return ExpertWeights(self.w13, self.w2, self.b13, self.b2, spec.act, spec.interleaved)

    @abstractmethod
    def run_experts(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """Weighted sum of the routed experts: [T, H] floating, for hidden [T, H], weights [T, K] and ids [T, K] int."""

    def _noise(self, hidden_TH: Tensor) -> Tensor:
        """The uniform noise of `routing.jitter` around 1, [T, H] in the dtype of hidden [T, H]."""
        jitter = self.spec.routing.number("jitter")
        return torch.empty_like(hidden_TH).uniform_(1 - jitter, 1 + jitter)

    def _null_experts(self, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """Identity experts: the token times the sum of their weights."""
        is_null_TK = (ids_TK >= self.num_experts) & (ids_TK < self.router.num_candidates)
        weight_T1 = torch.where(is_null_TK, weights_TK, 0.0).sum(1, keepdim=True)
        return (hidden_TH * weight_T1).to(hidden_TH.dtype)

    def _with_shared(self, routed_TH: Tensor, shared_TH: Tensor) -> Tensor:
        assert self.spec.shared is not None
        total_TH = routed_TH + shared_TH
        return total_TH / 2 if self.spec.shared.combine == "average" else total_TH

    def _missing(self, name: str, why: str) -> Any:
        return MoEOptionError.of(
            type(self).__name__, expected=f"{name}, as {why}", got="None", hint=f"Pass forward(..., {name}=...)."
        )

    def _check_width(self, name: str, tensor: Tensor) -> None:
        if tensor.shape[-1] != self.hidden_size:
            raise MoEShapeError.of(
                type(self).__name__,
                expected=f"{name} [..., {self.hidden_size}]",
                got=f"shape {tuple(tensor.shape)}",
                hint="The last dimension is the hidden size of the layer.",
            )
