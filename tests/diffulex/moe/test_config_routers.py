"""The routing spec of a config against the family's own router module, run with random weights."""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffulex.cli.accuracy import Widen
from diffulex.moe.config import MoEConfigError, get_num_experts, get_routing_spec, is_moe_layer
from diffulex.moe.config._families import FAMILIES
from diffulex.moe.config._routers import ROUTERS, Router
from lowering.reference.moe_route import moe_route_reference
from lowering.spec import RoutingSpec
from tests.support.families import DEPTH, FamilyCase, build_config, build_meta_model, installed_cases
from tests.support.oracle import assert_near_exact

TOKENS = 5
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "axk2": [{"n_group": 4, "topk_group": 2}],
    "cohere2_moe": [{"expert_selection_fn": "sigmoid", "norm_topk_prob": norm} for norm in (True, False)],
    "dbrx": [{"ffn_config": {"moe_top_k": 3, "moe_normalize_expert_weights": p}} for p in (2.0, None)],
    "deepseek_v2": [{"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}],
    "deepseek_v3": [{"norm_topk_prob": False}, {"num_experts_per_tok": 1}],
    "deepseek_v4": [{"scoring_func": "sigmoid"}],
    "ernie4_5_moe": [{"moe_norm_min": 0.9}],
    "glm4_moe": [{"n_group": 4, "topk_group": 2}],
    "inkling_text": [{"n_shared_experts": 1, "num_experts_per_tok": 1}],
    "laguna": [{"moe_router_logit_softcapping": 0.5}],
    "lfm2_moe": [{"norm_topk_prob": False}, {"use_expert_bias": False}],
    "mistral4": [{"n_group": 4, "topk_group": 2}, {"norm_topk_prob": False}],
    "mixtral": [{"num_experts_per_tok": 1}],
    "muse_spark_text": [{"output_multiplier": 0.25}],
    "olmoe": [{"norm_topk_prob": True}],
    "qwen3_moe": [{"norm_topk_prob": True}],
}
# The router sorts its choice by expert.
NOT_ALONE = {"jetmoe"}
# The block multiplies what its experts return.
FACTOR_AFTER = {"laguna": 1.0, "minimax_m3_vl_text": 2.0, "openai_privacy_filter": 4.0, "step3p5": 1.0}
BIASES = ("e_score_correction_bias", "balancing_biases", "expert_bias")


def cases() -> list[Any]:
    found = []
    for case in installed_cases():
        for options in ({}, *VARIANTS.get(case.model_type, ())):
            try:
                get_routing_spec(build_config(case, **options), DEPTH - 1, side="decoder")
            except MoEConfigError:
                continue
            if case.model_type not in NOT_ALONE:
                found.append(
                    pytest.param(case, options, id=f"{case.model_type}-{','.join(map(str, options.values()))}")
                )
    return found


def own_router(case: FamilyCase, config: Any, layer: int, dtype: torch.dtype) -> nn.Module:
    """The router of the layer, on the CPU, with weights that make scores differ and a bias that changes the choice."""
    names = ("Router", "Gate", "Gating", "DbrxFFN")
    routers = [
        module
        for path, module in build_meta_model(case, config).named_modules()
        if f".{layer}." in path
        and type(module).__name__.endswith(names)
        and (hasattr(module, "top_k") or hasattr(module, "per_expert_scale"))
    ]
    if not routers:
        pytest.skip("this release of transformers routes in the block")
    router = routers[0]
    router.experts = None  # DBRX: the block routes
    router = router.to_empty(device="cpu").to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        scale = 0.3 if tensor.dim() == 1 or "bias" in name else tensor.shape[-1] ** -0.5
        offset = 1.0 if name.endswith("scale") else 0.0
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * scale + offset)
    return router


class ScoreDtypes(TorchDispatchMode):
    """The dtypes that score functions give."""

    SCORES = (torch.ops.aten._softmax.default, torch.ops.aten.sigmoid.default, torch.ops.aten.sqrt.default)

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self.SCORES:
            self.found.add(result.dtype)
        return result


def routed(router: nn.Module, hidden_TH: Tensor, *, logits_bias: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the last linear map of the module made, logits [T, C], and the module's outputs."""
    products = []
    linear = nn.functional.linear

    def recorded(*args: Any) -> Tensor:
        products.append(linear(*args))
        biased.append(args[2:] not in ((), (None,)))
        return products[-1]

    biased: list[bool] = []

    extra = {name: bias_of(router) for name in BIASES if name in inspect.signature(router.forward).parameters}
    batched = type(router).__name__ in ("AfmoeTokenChoiceRouter", "ZayaRouter")
    with torch.no_grad(), mock.patch("torch.nn.functional.linear", recorded):
        if hasattr(router, "route_tokens_to_experts"):
            outputs = router.route_tokens_to_experts(router.router(hidden_TH))
        else:
            outputs = router(hidden_TH[None] if batched else hidden_TH, **extra)
    assert biased[-1] == logits_bias
    return products[-1].flatten(0, -2), outputs


def bias_of(router: nn.Module) -> Tensor | None:
    """The bias of the choice [E]: the module's own, or one for a module that is given it."""
    own = {name.rpartition(".")[2]: t for name, t in [*router.named_parameters(), *router.named_buffers()]}
    for name in BIASES:
        if name in own:
            return own[name].flatten()
        if name in inspect.signature(router.forward).parameters:
            return torch.randn(router.num_experts, generator=torch.Generator().manual_seed(1)) * 0.3
    return None


def dense(weights_TW: Tensor, ids_TW: Tensor, columns: int) -> Tensor:
    """[T, columns]: the order of the experts of a token does not matter."""
    zeros = torch.zeros(len(weights_TW), columns, dtype=torch.float64)
    return zeros.scatter(1, ids_TW.long(), weights_TW.double())


def own_dense(outputs: tuple[Tensor, ...], spec: RoutingSpec, logits_TC: Tensor) -> Tensor:
    """Weights of the module as [T, C]; what skips its experts weighs nothing."""
    columns = logits_TC.shape[1]
    if outputs[0].shape == outputs[1].shape == logits_TC.shape:  # Llama 4: scores of all, 0 where not chosen
        return outputs[0].double()
    weights, ids = (
        next(t for t in outputs if t.shape == (TOKENS, spec.top_k) and t.is_floating_point() == floating)
        for floating in (True, False)
    )
    if spec.n_shared:
        shared = torch.arange(columns - spec.n_shared, columns).expand(TOKENS, -1)
        weights, ids = torch.cat([weights, outputs[-1]], 1), torch.cat([ids, shared], 1)
    return dense(weights, ids, columns)


def router_of(case: FamilyCase, options: dict[str, Any], dtype: torch.dtype) -> tuple[Any, RoutingSpec, nn.Module]:
    config = build_config(case, **options)
    depth = config.num_layers if case.model_type == "longcat_flash" else DEPTH
    layer = max(layer for layer in range(depth) if is_moe_layer(config, layer))
    spec = get_routing_spec(config, layer)
    router = own_router(case, config, layer, dtype)
    assert spec.select_bias == (bias_of(router) is not None and options != {"use_expert_bias": False})
    assert spec.per_expert_scale == hasattr(router, "per_expert_scale")
    assert spec.global_scale == hasattr(router, "global_scale")
    return (get_num_experts(config, layer), config), spec, router


@pytest.mark.parametrize(("case", "options"), cases())
def test_routing_spec_is_what_the_router_computes(case: FamilyCase, options: dict[str, Any]) -> None:
    """In fp64, where nothing but the formula is left to differ: what modules compute in fp32 is widened."""
    (num_experts, config), spec, router = router_of(case, options, torch.float64)
    hidden_TH = torch.randn(TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(2)).double()
    with Widen():
        logits_TC, outputs = routed(router, hidden_TH, logits_bias=spec.logits_bias)
    assert logits_TC.shape[1] == spec.num_logits(num_experts)
    bias_E = bias_of(router) if spec.select_bias else None
    scale_E = getattr(router, "per_expert_scale", None)
    expected_TW, chosen_TW = moe_route_reference(
        logits_TC * spec.logits_scale, spec, bias_E=bias_E, per_expert_scale_E=scale_E
    )
    expected_TW = expected_TW * getattr(router, "global_scale", 1.0)
    if spec.null == "skip":
        expected_TW = torch.where(chosen_TW >= num_experts, 0.0, expected_TW)
    found_TC = own_dense(outputs, spec, logits_TC) * FACTOR_AFTER.get(case.model_type, 1.0)
    assert_near_exact(found_TC, dense(expected_TW, chosen_TW, found_TC.shape[1]), what="weights")
    assert found_TC.any()


@pytest.mark.parametrize("case", [case.values[0] for case in cases() if not case.values[1]], ids=str)
def test_dtypes_are_those_of_the_router(case: FamilyCase) -> None:
    """A bf16 model: the dtype of the product of the router, and the one its weights leave it in."""
    (_, config), spec, router = router_of(case, {}, torch.bfloat16)
    if case.model_type == "inkling2_text":
        router.weight.data = router.weight.data.float()  # stays in fp32 when the model is loaded
    if case.model_type == "inkling_text" and "autocast" not in inspect.getsource(type(router)):
        pytest.skip("this release of transformers routes in the dtype of the model")
    hidden_TH = torch.randn(TOKENS, config.hidden_size).bfloat16()
    with ScoreDtypes() as scores:
        logits_TC, outputs = routed(router, hidden_TH, logits_bias=spec.logits_bias)
    assert logits_TC.dtype == getattr(torch, spec.logits_dtype or "bfloat16")
    chosen = [t for t in outputs if t.shape == (TOKENS, spec.top_k) and t.is_floating_point()]
    weights = chosen[0] if chosen else outputs[0]  # Llama 4 gives scores of all experts
    assert weights.dtype == getattr(torch, spec.weight_dtype or "bfloat16")
    if spec.select_on == "scores":  # behind a selection on logits, the weights in bf16 are rounded once in any case
        assert scores.found == {logits_TC.dtype if spec.score_dtype == "logits" else torch.float32}


def test_every_family_has_a_router_or_is_refused() -> None:
    refused = {name for name, family in FAMILIES.items() if family.routing}
    assert refused == {"doge", "nllb-moe", "phimoe", "switch_transformers", "vitpose_backbone"}
    assert FAMILIES.keys() == ROUTERS.keys() | refused and not ROUTERS.keys() & refused
    assert all(isinstance(router, Router) for router in ROUTERS.values())
