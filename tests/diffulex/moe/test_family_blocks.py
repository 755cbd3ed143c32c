"""Our layer against the MoE block of every transformers family: built from the config, weights through a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from diffulex.moe import MoEConfigError, TopKRouter, build_topk_router, get_moe_spec
from tests.support.block_variants import BLOCK_CASES, HIDDEN, BlockVariant, variants_of
from tests.support.families import installed_cases, is_installed
from tests.support.family_blocks import (
    OwnBlock,
    Seen,
    build_block,
    build_ours,
    make_tokens,
    moe_layer_of,
    run_ours,
    text_and_vision,
)
from tests.support.oracle import assert_near_exact, assert_oracle_ratio

# A model without shared experts has linear layers of no width.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
TOKENS = 33
# What no spec expresses, so that `get_moe_spec` refuses the family.
REFUSED = {
    "doge": "experts that are rows of two embeddings",
    "ernie4_5_vl_moe_text": "two banks of experts, chosen by the kind of token",
    "muse_spark_text": "a norm on the output of each expert",
    "nllb-moe": "experts of limited capacity that drop tokens",
    "phimoe": "sparsemixer",
    "switch_transformers": "experts of limited capacity that drop tokens",
    "vitpose_backbone": "experts that are one linear layer",
}
# Options under which the shared experts have biases.
BIASED = {
    "aria_text": ["mlp_bias"],
    "deepseek_ocr2_text": ["mlp_bias"],
    "deepseek_v2": ["mlp_bias"],
    "deepseek_v4": ["mlp_bias"],
    "ernie4_5_moe": ["use_bias"],
    "hy_v3": ["mlp_bias"],
    "nemotron_h": ["mlp_bias"],
    "step3p5": ["mlp_bias"],
    "unlimited_ocr_text": ["mlp_bias"],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of products this small, threads do nothing but wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cases() -> list[Any]:
    """Every variant that is not refused; what the installed transformers lacks is skipped, not forgotten."""
    found = []
    for case in BLOCK_CASES:
        if case.model_type in REFUSED:
            continue
        there = is_installed(case)
        for variant in variants_of(case) if there else [BlockVariant(case, {})]:
            lacking = variant.unknown() if there else [case.module]
            reason = f"transformers {transformers.__version__} has no {', '.join(lacking)}"
            skip = [pytest.mark.skip(reason)] if lacking else []
            found.append(pytest.param(variant, id=str(variant), marks=skip))
    return found


def by_expert(seen: Seen, *, num_experts: int, skips: bool) -> Seen:
    """The choice of each token in the order of its experts; where an expert is skipped, expert 0 with weight 0."""
    weights_TK, ids_TK = seen.weights_TK, seen.ids_TK.long()
    if skips:
        skipped_TK = ids_TK >= num_experts
        weights_TK, ids_TK = weights_TK.masked_fill(skipped_TK, 0), ids_TK.masked_fill(skipped_TK, 0)
    ids_TK, order_TK = ids_TK.sort(dim=1)
    return dataclasses.replace(seen, weights_TK=weights_TK.gather(1, order_TK), ids_TK=ids_TK)


@pytest.mark.parametrize("variant", cases())
def test_the_layer_computes_what_the_models_block_does(variant: BlockVariant, tmp_path: Path) -> None:
    config = variant.config()
    check_block(build_block(variant), config, tmp_path, state=getattr(config, "router_hidden_size", 1))


def test_two_banks_of_experts_are_two_layers(tmp_path: Path) -> None:
    """Ernie 4.5 VL chooses between them by the kind of token, which is the model's own code."""
    variant = next(v for case in BLOCK_CASES for v in variants_of(case) if case.model_type == "ernie4_5_vl_moe_text")
    config = variant.config()
    for bank, own in text_and_vision(build_block(variant), config):
        check_block(bank, own, tmp_path)


def check_block(block: OwnBlock, config: Any, folder: Path, *, state: int = 1) -> None:
    """Ids equal, weights and outputs by the ratio rule in fp32 and near exact in fp64, for many tokens, one and none.

    state  size of what the router of the layer before hands on (Zaya)
    """
    ours, wide = (build_ours(block, config, folder, dtype=dtype) for dtype in (torch.float32, torch.float64))
    order = {"num_experts": ours.num_experts, "skips": ours.spec.routing.null == "skip"}
    for count in (TOKENS, 1):
        tokens = make_tokens(count, HIDDEN, state=state)
        theirs, exact = block.run(tokens), block.exact(tokens)
        mine = run_ours(ours, block, tokens, logits_TC=theirs.logits_TC)
        mine64 = run_ours(wide, block.double(), tokens.double(), logits_TC=exact.logits_TC)
        theirs, exact, mine, mine64 = (by_expert(seen, **order) for seen in (theirs, exact, mine, mine64))
        assert torch.equal(theirs.ids_TK, exact.ids_TK), "the model's own choice depends on rounding here"
        assert torch.equal(mine.ids_TK, theirs.ids_TK)
        assert torch.equal(mine64.ids_TK, theirs.ids_TK)
        for name in ("weights_TK", "out_TH"):
            parts = [getattr(seen, name) for seen in (mine, theirs, exact, mine64)]
            assert_oracle_ratio(*parts[:3], what=name)
            assert_near_exact(parts[3], parts[2], what=name)
        if count > 1:
            check_the_choice_depends_on_everything(ours.router, mine)
    no_logits_TC = torch.zeros(0, ours.router.num_candidates) if block.spec.logits_given else None
    none = run_ours(ours, block, make_tokens(0, HIDDEN), logits_TC=no_logits_TC)
    assert none.out_TH.shape == (0, HIDDEN) and none.ids_TK.shape == (0, ours.top_k)


def check_the_choice_depends_on_everything(router: TopKRouter, seen: Seen) -> None:
    """The tokens are such that a router without bias or without groups would choose other experts."""
    spec = router.spec
    assert seen.logits_TC is not None
    if spec.ids_given:
        return
    without = {}
    if spec.n_group > 1:
        without["groups"] = dataclasses.replace(spec, n_group=1, topk_group=1)
    if spec.select_bias:
        without["bias"] = dataclasses.replace(spec, select_bias=False)
    for name, other in without.items():
        changed = build_topk_router("triton", other, router.num_experts)
        if other.select_bias:
            changed.correction_bias.data.copy_(router.correction_bias)
        ids_TK = changed(seen.logits_TC).ids[:, : spec.top_k].long().sort(dim=1).values
        assert not torch.equal(ids_TK, seen.ids_TK), f"{name} does not matter"


def refusals() -> dict[str, str]:
    """Why `get_moe_spec` refuses families, and options of families: `model_type[option]` -> message."""
    reasons = {}
    for case in installed_cases():
        biased = [BlockVariant(case, {name: True}) for name in BIASED.get(case.model_type, ())]
        for variant in [*variants_of(case), *biased]:
            config = variant.config()
            try:
                get_moe_spec(config, moe_layer_of(config, case.model_type), side="decoder")
            except MoEConfigError as error:
                reasons[case.model_type if case.model_type in REFUSED else str(variant)] = str(error)
    return reasons


def test_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole list; every other family has a block that is compared above."""
    reasons = refusals()
    installed = {case.model_type for case in installed_cases()}
    expected = {name: reason for name, reason in REFUSED.items() if name in installed}
    families = f"{len(expected)} of {len(installed)} families refused"
    for name in installed & BIASED.keys():
        expected |= {f"{name}[{option}=True]": "biases on shared experts" for option in BIASED[name]}
    with capsys.disabled():
        print(f"\ntransformers {transformers.__version__}: {families}, and options of others")
        print(*(f"  {name}: {expected.get(name, reason)}" for name, reason in reasons.items()), sep="\n")
    assert reasons.keys() == expected.keys()
    assert all(expected[name] in reason for name, reason in reasons.items())


def test_every_family_is_compared_or_refused() -> None:
    variants = [param.values[0] for param in cases()]
    compared = {variant.case.model_type for variant in variants}
    assert compared.isdisjoint(REFUSED)
    assert compared | REFUSED.keys() == {case.model_type for case in BLOCK_CASES}
    assert len(variants) >= 130  # of the newest release; where one is older, families it lacks count once
