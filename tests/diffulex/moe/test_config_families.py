"""`diffulex.moe.config` against the modules of every family of transformers, built on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from diffulex.moe.config import (
    MoEConfigError,
    get_expert_spec,
    get_moe_intermediate_size,
    get_num_experts,
    get_num_experts_per_tok,
    get_routing_spec,
    get_shared_experts,
    is_moe_layer,
)
from diffulex.moe.config._families import FAMILIES
from lowering.activation import is_gated
from lowering.spec import ExpertSpec, RoutingSpec
from tests.support.families import (
    DEPTH,
    FAMILY_CASES,
    NEWER_CASES,
    Block,
    FamilyCase,
    build_config,
    build_meta_model,
    found_blocks,
    installed_cases,
)

CASES = [
    pytest.param(case, placement, id=f"{case.model_type}-{','.join(placement) or 'default'}")
    for case in installed_cases()
    for placement in ({}, *case.placements)
]
# Families whose modules keep no `top_k`: the number is written into their forward, or read from the config there.
TOP_K_IN_CODE = {"aria_text": 2, "nllb-moe": 2, "switch_transformers": 1, "vitpose_backbone": 1, "gemma4_text": 2}
TOP_K_IN_CODE["diffusion_gemma_text"] = 2


def sides(config: Any) -> tuple[str, ...]:
    return ("encoder", "decoder") if config.is_encoder_decoder else ("",)


def stated_block(config: Any, layer: int, *, side: str | None) -> Block:
    """The block as the config module describes it."""
    shared = get_shared_experts(config, layer, side=side)
    try:
        transposed = get_expert_spec(config, layer, side=side).transposed
    except MoEConfigError:
        transposed = False
    return Block(
        num_experts=get_num_experts(config, layer, side=side),
        width=get_moe_intermediate_size(config, layer, side=side),
        transposed=transposed,
        top_k=get_num_experts_per_tok(config, layer, side=side),
        shared_width=shared.total_width if shared else 0,
        shared_gate=shared.gate if shared else "none",
    )


@pytest.mark.parametrize(("case", "placement"), CASES)
def test_config_agrees_with_the_modules(case: FamilyCase, placement: dict[str, Any]) -> None:
    config = build_config(case, **placement)
    model = build_meta_model(case, config)
    depth = getattr(config, "num_layers", DEPTH) if case.model_type == "longcat_flash" else DEPTH
    for side in sides(config):
        found = found_blocks(model, side)
        placed = [layer for layer in range(depth) if is_moe_layer(config, layer, side=side or None)]
        assert placed == sorted(found)
        for layer, block in found.items():
            stated = stated_block(config, layer, side=side or None)
            if block.top_k is None:
                assert stated.top_k == TOP_K_IN_CODE[case.model_type]
                stated = Block(**{**vars(stated), "top_k": None})
            assert stated == block
    assert is_moe_layer(config) == any(found_blocks(model, side) for side in sides(config))


def test_every_family_is_here() -> None:
    """64 families are built; the rows beyond them are newer, of an encoder for images, or have no class."""
    assert len({case.module for case in FAMILY_CASES}) == 64
    assert {case.model_type for case in FAMILY_CASES} <= {case.model_type for case in installed_cases()}
    cases = {case.model_type for case in [*FAMILY_CASES, *NEWER_CASES]}
    assert set(FAMILIES) - cases == {"llada", "llada_moe", "llada2_moe", "sdar_moe", "dots3_note_vision_encoder"}
    assert cases <= set(FAMILIES)


# Why a router or an expert has no spec, over all families in their default configuration.
REFUSED_ROUTERS = {
    "doge": "product keys",
    "nllb-moe": "experts of limited capacity that drop tokens",
    "phimoe": "sparsemixer",
    "switch_transformers": "experts of limited capacity that drop tokens",
    "vitpose_backbone": "no router: the data set chooses the expert",
}
REFUSED_EXPERTS = {
    "doge": "experts that are rows of two embeddings",
    "ernie4_5_vl_moe_text": "two banks of experts, chosen by the kind of token",
    "muse_spark_text": "a norm on the output of each expert",
    "vitpose_backbone": "experts that are one linear layer",
}


@pytest.mark.parametrize(
    ("question", "refused"), [(get_routing_spec, REFUSED_ROUTERS), (get_expert_spec, REFUSED_EXPERTS)]
)
def test_the_refused_families_are_these(question: Callable[..., Any], refused: dict[str, str]) -> None:
    assert (len(REFUSED_ROUTERS), len(REFUSED_EXPERTS)) == (5, 4)
    installed = {case.model_type for case in installed_cases()}
    reasons = {}
    for case in installed_cases():
        try:
            spec = question(build_config(case), 1)
        except MoEConfigError as error:
            reasons[case.model_type] = str(error)
        else:
            check_spec(spec)
    print(*(f"{question.__name__} {name}: {reason}" for name, reason in reasons.items()), sep="\n")
    assert reasons.keys() == refused.keys() & installed
    assert all(refused[name] in reason for name, reason in reasons.items())


def check_spec(spec: RoutingSpec | ExpertSpec) -> None:
    """The spec is one the ops take."""
    if isinstance(spec, RoutingSpec):
        spec.check(1024 - spec.num_null)
    else:
        assert is_gated(spec.act) == spec.gated
