"""The routing spec of a config against the family's own router module, run in fp32 with random weights."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffulex.moe.config import MoEConfigError, get_routing_spec, is_moe_layer
from lowering.reference.moe_route import moe_route_reference
from tests.support.families import DEPTH, FamilyCase, build_config, build_meta_model, installed_cases

TOKENS = 5
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "axk2": [{"n_group": 4, "topk_group": 2}],
    "cohere2_moe": [{"expert_selection_fn": "sigmoid", "norm_topk_prob": norm} for norm in (True, False)],
    "deepseek_v2": [{"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}],
    "deepseek_v3": [{"norm_topk_prob": False}, {"num_experts_per_tok": 1}],
    "deepseek_v4": [{"scoring_func": "sigmoid"}],
    "glm4_moe": [{"n_group": 4, "topk_group": 2}],
    "lfm2_moe": [{"norm_topk_prob": False}],
    "mistral4": [{"n_group": 4, "topk_group": 2}, {"norm_topk_prob": False}],
    "mixtral": [{"num_experts_per_tok": 1}],
    "olmoe": [{"norm_topk_prob": True}],
    "qwen3_moe": [{"norm_topk_prob": True}],
}
# The selection happens in the block around the router, or in a form of its own.
NOT_ALONE = {"dbrx", "jetmoe"}
# The block multiplies what its experts return.
FACTOR_AFTER = {"laguna": 1.0, "minimax_m3_vl_text": 2.0, "openai_privacy_filter": 4.0, "step3p5": 1.0}


def cases() -> list[Any]:
    found = []
    for case in installed_cases():
        for options in ({}, *VARIANTS.get(case.model_type, ())):
            try:
                get_routing_spec(build_config(case, **options), 1)
            except MoEConfigError:
                continue
            if case.model_type not in NOT_ALONE:
                found.append(
                    pytest.param(case, options, id=f"{case.model_type}-{','.join(map(str, options.values()))}")
                )
    return found


def own_router(case: FamilyCase, config: Any, layer: int) -> nn.Module:
    """The router of the layer, on the CPU, with weights that make scores differ and a bias that changes the choice."""
    names = ("Router", "Gate", "Gating")
    routers = [
        module
        for path, module in build_meta_model(case, config).named_modules()
        if f".{layer}." in path and type(module).__name__.endswith(names) and hasattr(module, "top_k")
    ]
    if not routers:
        pytest.skip("this release of transformers routes in the block")
    router = routers[0].to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        scale = 0.3 if name.endswith("bias") else tensor.shape[-1] ** -0.5
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return router


def routed(router: nn.Module, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Logits [T, E], weights [T, K], ids [T, K] and selection bias [E] of the module."""
    bias = getattr(router, "e_score_correction_bias", None)
    extra = ()
    if {"expert_bias", "e_score_correction_bias"} & inspect.signature(router.forward).parameters.keys():
        bias = torch.randn(router.num_experts, generator=torch.Generator().manual_seed(1)) * 0.3
        extra = (bias,)
    with torch.no_grad():
        outputs = router(hidden_TH[None] if type(router).__name__ == "AfmoeTokenChoiceRouter" else hidden_TH, *extra)
    weights, ids = (
        next(t for t in outputs if t.shape == (TOKENS, router.top_k) and t.is_floating_point() == floating)
        for floating in (True, False)
    )
    logits = next(t for t in outputs if t.dim() == 2 and t.is_floating_point() and t is not weights)
    return logits, weights, ids, bias


@pytest.mark.parametrize(("case", "options"), cases())
def test_routing_spec_is_what_the_router_computes(case: FamilyCase, options: dict[str, Any]) -> None:
    config = build_config(case, **options)
    layer = max(layer for layer in range(DEPTH) if is_moe_layer(config, layer))
    spec = get_routing_spec(config, layer)
    router = own_router(case, config, layer)
    hidden_TH = torch.randn(TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(2))
    logits_TE, weights_TK, ids_TK, bias_E = routed(router, hidden_TH)
    expected_TK, chosen_TK = moe_route_reference(logits_TE, spec, bias_E=bias_E)
    assert torch.equal(ids_TK.sort(-1).values, chosen_TK.long().sort(-1).values)
    expected_TK = expected_TK.gather(1, chosen_TK.long().argsort(-1))
    found_TK = weights_TK.double().gather(1, ids_TK.argsort(-1))
    found_TK *= FACTOR_AFTER.get(case.model_type, 1.0)
    torch.testing.assert_close(found_TK, expected_TK, rtol=2e-5, atol=1e-7)
