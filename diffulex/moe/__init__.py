"""Mixture-of-Experts layers and what model configs say about them; each name is loaded when it is first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .layer import FusedMoE

_HOMES = {
    "config": (
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
    ),
    "dispatcher": ("DispatcherOutput", "ExchangePlan", "TokenDispatcher", "build_token_dispatcher"),
    "layer": (
        "EPFusedMoE",
        "FusedMoE",
        "MoESpec",
        "NaiveFusedMoE",
        "SharedExpertMLP",
        "TPFusedMoE",
        "build_moe_block",
        "expert_parameter_names",
        "get_moe_spec",
    ),
    "metadata": ("DispatchMetadata", "DispatcherStage", "ExpertExecutionMetadata", "RouterMetadata"),
    "topk": ("GroupLimitedTopKRouter", "NaiveTopKRouter", "TopKOutput", "TopKRouter", "build_topk_router"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["build_mlp_or_moe", *_HOME_OF]  # noqa: PLE0604 (names of `_HOMES`, all strings)

Dense = TypeVar("Dense")


def build_mlp_or_moe(
    config: Any, layer_idx: int, dense_factory: Callable[[], Dense], **options: Any
) -> Dense | FusedMoE:
    """The feed-forward part of a decoder layer: a MoE block where the config has one, else `dense_factory()`.

    options are those of `build_moe_block`; with `parallel` the layer is spread over the ranks as that says. Raises
    `MoEConfigError` for what the config does not say.
    """
    from .config import is_moe_layer
    from .layer import build_moe_block

    if not is_moe_layer(config, layer_idx):
        return dense_factory()
    parallel = options.get("parallel")
    return build_moe_block("naive" if parallel is None else parallel.mode, config, layer_idx, **options)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
