"""What a model config says about its MoE layers, under one set of names for every model family.

`config` is a transformers config, a plain object or a dict; wrappers of several models are asked about their language
model. `layer_idx` picks one layer: without it, an answer that differs from layer to layer is an error. `side`
("encoder" or "decoder") matters for encoder-decoder configs alone. What a config does not say is a `MoEConfigError`
that names the attributes looked for, never a default.
"""

from __future__ import annotations

from typing import Any

from lowering.errors import MoEConfigError
from lowering.spec import ExpertSpec, RoutingSpec

from . import _specs
from ._placement import is_moe
from ._read import agreed, facts_of
from ._specs import SharedExpertSpec

__all__ = [
    "MoEConfigError",
    "SharedExpertSpec",
    "get_expert_spec",
    "get_moe_intermediate_size",
    "get_norm_topk_prob",
    "get_num_experts",
    "get_num_experts_per_tok",
    "get_routing_spec",
    "get_shared_expert_act",
    "get_shared_experts",
    "is_moe_layer",
]


def get_num_experts(config: Any, layer_idx: int | None = None, *, side: str | None = None) -> int:
    """Routed experts E of a MoE layer; null experts and shared experts are not counted."""
    return agreed(_specs.num_experts, config, layer_idx, side=side)


def get_num_experts_per_tok(config: Any, layer_idx: int | None = None, *, side: str | None = None) -> int:
    """Experts K that a token is sent to."""
    return agreed(_specs.top_k, config, layer_idx, side=side)


def get_moe_intermediate_size(config: Any, layer_idx: int | None = None, *, side: str | None = None) -> int:
    """Width I of one routed expert; of the text experts where a model has other ones too."""
    return agreed(_specs.expert_width, config, layer_idx, side=side)


def is_moe_layer(config: Any, layer_idx: int | None = None, *, side: str | None = None) -> bool:
    """Whether the layer holds a MoE block; without `layer_idx`, whether any layer does.

    A config that names no experts is dense. Without `side`, both sides of an encoder-decoder config have to agree.
    """
    if layer_idx is None:
        return any(is_moe(facts) for facts in facts_of(config, None, side=side, every_layer=True))
    return agreed(is_moe, config, layer_idx, side=side)


def get_norm_topk_prob(config: Any, layer_idx: int | None = None, *, side: str | None = None) -> bool:
    """Whether the weights of the chosen experts are divided by their sum, as the family's code does it."""
    return agreed(_specs.norm_topk_prob, config, layer_idx, side=side)


def get_shared_experts(
    config: Any, layer_idx: int | None = None, *, side: str | None = None
) -> SharedExpertSpec | None:
    """Experts that every token passes through beside the routed ones, or None.

    The dense MLP that Gemma 4 runs in parallel, behind norms of its own, is not one.
    """
    return agreed(_specs.shared_experts, config, layer_idx, side=side)


def get_shared_expert_act(config: Any, layer_idx: int | None = None, *, side: str | None = None) -> str:
    """Activation of the shared experts as a formula of `lowering.activation`, whether the layer has any or not."""
    return agreed(_specs.shared_expert_act, config, layer_idx, side=side)


def get_routing_spec(config: Any, layer_idx: int | None = None, *, side: str | None = None) -> RoutingSpec:
    """The router from its logits on, in evaluation mode; `MoEConfigError` says what cannot be expressed."""
    return agreed(_specs.routing_spec, config, layer_idx, side=side)


def get_expert_spec(config: Any, layer_idx: int | None = None, *, side: str | None = None) -> ExpertSpec:
    """The MLP of one routed expert and its layout in transformers; `MoEConfigError` says what cannot be expressed."""
    return agreed(_specs.expert_spec, config, layer_idx, side=side)
