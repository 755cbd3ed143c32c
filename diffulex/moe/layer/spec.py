"""One frozen description of a whole MoE layer, and how to read it off a model config."""

from __future__ import annotations

import dataclasses
from typing import Any

from lowering.activation import is_gated
from lowering.errors import MoEConfigError, MoEOptionError, MoEUnsupportedError
from lowering.spec import ExpertSpec, RoutingSpec

from ..config import SharedExpertSpec, get_expert_spec, get_routing_spec, get_shared_expert_act, get_shared_experts
from ..config._families import HIDDEN
from ..config._read import MISSING, Facts, agreed, peek, text_config

GEMM_IMPLS = ("triton", "naive", "vllm", "vllm_modular")


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """What a MoE layer computes, and by which implementation.

    hidden_size    H of the model; differs from `experts.hidden_size` where the experts are latent
    routing        the router, its parameters included
    experts        the routed experts
    shared         experts every token passes through, None for none
    shared_act     their activation, name or formula; None means that of the routed experts
    moe_gemm_impl  "triton": the ops, captured and fused by torch.compile, each op's own kernel in eager mode;
                   "naive": a loop over tokens accumulating in fp32, the oracle; "vllm", "vllm_modular": vLLM's kernels
    """

    hidden_size: int
    routing: RoutingSpec
    experts: ExpertSpec
    shared: SharedExpertSpec | None = None
    shared_act: str | None = None
    moe_gemm_impl: str = "triton"

    def check(self) -> None:
        """Raise the error of the catalogue that says which of the parts do not fit one another."""
        experts, routing = self.experts, self.routing
        routing.check(experts.num_experts)
        if self.moe_gemm_impl not in GEMM_IMPLS:
            raise MoEOptionError.of(
                "MoESpec",
                expected=f"moe_gemm_impl in {GEMM_IMPLS}",
                got=repr(self.moe_gemm_impl),
                hint="Use 'triton' where in doubt.",
            )
        if experts.gated != is_gated(experts.act):
            raise MoEOptionError.of(
                "MoESpec",
                expected=f"an activation {'with' if experts.gated else 'without'} u, as gated={experts.gated}",
                got=repr(experts.act),
                hint="A formula of g and u belongs to gated experts, one of g alone to ungated ones.",
            )
        inner = self.hidden_size if experts.latent_size is None else experts.latent_size
        if experts.hidden_size != inner:
            raise MoEConfigError.of(
                "MoESpec",
                expected=f"experts.hidden_size={inner}, the size the experts work on",
                got=str(experts.hidden_size),
                hint="It is the latent size where there is one, else the hidden size of the model.",
            )
        weighted = self.shared.count if self.shared is not None and self.shared.gate == "router" else 0
        if routing.n_shared != weighted:
            raise MoEConfigError.of(
                "MoESpec",
                expected=f"routing.n_shared={weighted}, the shared experts whose weights come from the router",
                got=f"n_shared={routing.n_shared}",
                hint="Shared experts of gate 'router' take one joint column of the router each.",
            )
        if routing.num_null and routing.null == "identity" and experts.latent_size is not None:
            raise MoEUnsupportedError.of(
                "MoESpec",
                expected="null experts that return the model's hidden states",
                got="null experts between latent projections",
                hint="No model has both; it is not defined whether they return the latent.",
            )


def _hidden_size(facts: Facts) -> int:
    return facts.number(HIDDEN, what="the hidden size")


def get_moe_spec(
    config: Any, layer_idx: int | None = None, *, side: str | None = None, moe_gemm_impl: str | None = None
) -> MoESpec:
    """The layer that a config describes; `moe_gemm_impl` None means the config's attribute of that name, or "triton".

    Raises `MoEConfigError` for what a config does not say or the specs cannot express.
    """
    experts = get_expert_spec(config, layer_idx, side=side)
    shared = get_shared_experts(config, layer_idx, side=side)
    latent = experts.latent_size is not None
    if moe_gemm_impl is None:
        stated = (peek(one, "moe_gemm_impl") for one in (config, text_config(config, side)))
        moe_gemm_impl = next((str(value) for value in stated if value not in (MISSING, None)), "triton")
    return MoESpec(
        hidden_size=agreed(_hidden_size, config, layer_idx, side=side) if latent else experts.hidden_size,
        routing=get_routing_spec(config, layer_idx, side=side),
        experts=experts,
        shared=shared,
        shared_act=get_shared_expert_act(config, layer_idx, side=side) if shared is not None else None,
        moe_gemm_impl=moe_gemm_impl,
    )
