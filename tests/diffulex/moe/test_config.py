"""`diffulex.moe.config` on wrappers, per-layer configs, lists, dicts, plain objects, and what it refuses to guess."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from diffulex.moe.config import (
    MoEConfigError,
    SharedExpertSpec,
    get_expert_spec,
    get_moe_intermediate_size,
    get_norm_topk_prob,
    get_num_experts,
    get_num_experts_per_tok,
    get_routing_spec,
    get_shared_experts,
    is_moe_layer,
)
from diffulex.moe.config._families import FAMILIES
from diffulex.moe.config._read import text_config
from lowering.activation import evaluate
from lowering.errors import MoEOptionError
from lowering.spec import RoutingSpec
from tests.support.catalogue import raises_catalogue
from tests.support.families import build_config, family_module, installed_cases

CASES = {case.model_type: case for case in installed_cases()}
LLADA = {
    "model_type": "llada",
    "num_hidden_layers": 4,
    "hidden_size": 2048,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "expert_intermediate_size": 1024,
    "dense_intermediate_size": 8192,
    "shared_expert_intermediate_size": None,
    "moe_layer_freq": [0, 1, 1, 0],
    "norm_topk_prob": None,
    "moe_router_enable_expert_bias": False,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
}
LLADA2 = {
    "model_type": "llada2_moe",
    "num_hidden_layers": 20,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "first_k_dense_replace": 1,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
}
SDAR = {
    "model_type": "sdar_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "hidden_act": "silu",
}


def placed(config: Any, depth: int, **options: Any) -> list[int]:
    return [layer for layer in range(depth) if is_moe_layer(config, layer, **options)]


def forms(fields: dict[str, Any]) -> list[Any]:
    """The same config as a dict and as a plain object."""
    return [fields, SimpleNamespace(**fields)]


# -- diffusion language models without a class in transformers


@pytest.mark.parametrize("config", forms(LLADA))
def test_llada_moe(config: Any) -> None:
    assert (get_num_experts(config), get_num_experts_per_tok(config), get_moe_intermediate_size(config)) == (
        64,
        8,
        1024,
    )
    assert placed(config, 4) == [1, 2]
    assert get_norm_topk_prob(config) is False
    assert get_routing_spec(config) == RoutingSpec(top_k=8, renorm=False, weight_dtype=None)
    assert get_shared_experts(config) is None
    assert get_expert_spec(config).act == "silu(g) * u"


def test_llada_moe_options() -> None:
    assert get_shared_experts({**LLADA, "shared_expert_intermediate_size": 512}) == SharedExpertSpec(1, 512)
    biased = get_routing_spec({**LLADA, "moe_router_enable_expert_bias": True})
    assert biased.select_bias and biased.bias_in_weights and not biased.renorm
    dense = {"model_type": "llada", "n_layers": 32, "d_model": 4096, "mlp_hidden_size": 12288}
    assert not is_moe_layer(dense, 3)


@pytest.mark.parametrize("config", forms(LLADA2))
def test_llada2(config: Any) -> None:
    assert (get_num_experts(config), get_num_experts_per_tok(config), get_moe_intermediate_size(config)) == (
        256,
        8,
        512,
    )
    assert placed(config, 4) == [1, 2, 3]
    assert get_shared_experts(config, 1) == SharedExpertSpec(1, 512)
    assert get_routing_spec(config) == RoutingSpec(
        top_k=8,
        score="sigmoid",
        n_group=8,
        topk_group=4,
        eps=1e-20,
        scale=2.5,
        renorm_if_k1=False,
        select_bias=True,
        logits_dtype="float32",
    )


def test_llada2_defaults_and_one_expert() -> None:
    assert get_norm_topk_prob({**LLADA2, "num_experts_per_tok": 1}) is False
    with raises_catalogue(MoEConfigError, expected="moe_intermediate_size", got="None"):
        get_moe_intermediate_size({**LLADA2, "moe_intermediate_size": None, "intermediate_size": None})
    assert not is_moe_layer({**LLADA2, "num_experts": None}, 5)


@pytest.mark.parametrize("config", forms(SDAR))
def test_sdar(config: Any) -> None:
    assert (get_num_experts(config), get_num_experts_per_tok(config), get_moe_intermediate_size(config)) == (
        128,
        8,
        768,
    )
    assert placed(config, 3) == [0, 1, 2]
    assert get_shared_experts(config) is None
    assert get_routing_spec(config) == RoutingSpec(top_k=8, weight_dtype=None)
    assert placed({**SDAR, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, 6) == [1, 5]


def test_diffusion_gemma_from_the_top() -> None:
    kind = family_module(CASES["diffusion_gemma_text"], "configuration").DiffusionGemmaConfig
    text = {"num_hidden_layers": 4, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
    config = kind(text_config=text)
    assert (get_num_experts(config), get_num_experts_per_tok(config), get_moe_intermediate_size(config)) == (
        128,
        8,
        704,
    )
    for side in ("encoder", "decoder", None):
        assert placed(config, 4, side=side) == [0, 1, 2, 3]
    assert get_norm_topk_prob(config) is True
    assert get_shared_experts(config) is None


# -- wrappers


def wraps_family(kind: Any) -> bool:
    """Whether a config class has a family of the table among its parts, or parts of its parts."""
    subs = (getattr(kind, "sub_configs", None) or {}).values()
    return any(getattr(sub, "model_type", "") in FAMILIES or wraps_family(sub) for sub in subs)


def wrapper_classes() -> dict[str, Any]:
    """Configs of transformers that wrap one of the families."""
    kinds = [item for case in CASES.values() for item in vars(family_module(case, "configuration")).items()]
    return {name: kind for name, kind in kinds if inspect.isclass(kind) and wraps_family(kind)}


WRAPPERS = wrapper_classes()


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_asked_about_their_language_model(name: str) -> None:
    config = WRAPPERS[name]()
    inner = text_config(config)
    assert inner is config.get_text_config(decoder=True)
    assert inner.model_type in FAMILIES
    assert answer(config.to_dict()) == answer(config) == answer(inner)


def answer(config: Any) -> tuple[Any, ...]:
    """Facts of a layer; None stands for those that the config does not say."""
    facts: list[Any] = []
    for question in (
        get_num_experts,
        get_num_experts_per_tok,
        get_moe_intermediate_size,
        is_moe_layer,
        get_routing_spec,
    ):
        try:
            facts.append(question(config, 3))
        except MoEConfigError:
            facts.append(None)
    return tuple(facts)


def test_enough_wrappers() -> None:
    assert len(WRAPPERS) >= 17


def test_wrappers_of_wrappers() -> None:
    module = family_module(CASES["qwen3_omni_moe_text"], "configuration")
    omni = module.Qwen3OmniMoeConfig()
    assert get_moe_intermediate_size(omni) == omni.thinker_config.text_config.moe_intermediate_size == 768
    assert get_moe_intermediate_size(omni.talker_config) == 384
    assert get_num_experts({"llm_config": {"language_config": SDAR}}) == 128


def test_vitpose_backbone_in_its_wrapper() -> None:
    from transformers import VitPoseBackboneConfig, VitPoseConfig

    assert get_num_experts(VitPoseConfig(backbone_config=VitPoseBackboneConfig(num_experts=6))) == 6


def test_encoder_decoder_configs_are_not_rewritten() -> None:
    config = build_config(CASES["nllb-moe"], encoder_sparse_step=2, decoder_sparse_step=3, decoder_ffn_dim=512)
    assert text_config(config, "decoder") is config
    assert placed(config, 6, side="encoder") == [1, 3, 5]
    assert placed(config, 6, side="decoder") == [2, 5]
    assert get_moe_intermediate_size(config, side="decoder") == 512
    assert is_moe_layer(config, 5) and not is_moe_layer(config, 0)
    for question in (lambda: is_moe_layer(config, 1), lambda: get_moe_intermediate_size(config)):
        with raises_catalogue(MoEConfigError, expected="a side"):
            question()
    with raises_catalogue(MoEOptionError, got="'left'"):
        get_num_experts(config, side="left")


def test_two_sub_configs_one_per_side() -> None:
    config = {"is_encoder_decoder": True, "encoder": {**SDAR, "num_experts": 8}, "decoder": SDAR}
    assert get_num_experts(config, side="encoder") == 8
    assert get_num_experts(config, side="decoder") == 128
    with raises_catalogue(MoEConfigError, expected="a side", got="8, 128"):
        get_num_experts(config)


# -- values that differ from layer to layer


def mixtral(**options: Any) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(num_hidden_layers=4, **options)


@pytest.mark.parametrize("name", ["num_local_experts", "num_experts"])
def test_heterogeneous_configs(name: str) -> None:
    layers = {1: {name: 4}, 2: {"num_experts_per_tok": 1, "intermediate_size": 64}}
    config = mixtral(per_layer_config=layers)
    as_dict = {**mixtral().to_dict(), "per_layer_config": {str(layer): values for layer, values in layers.items()}}
    for form in (config, as_dict):
        assert [get_num_experts(form, layer) for layer in range(4)] == [8, 4, 8, 8]
        assert [get_num_experts_per_tok(form, layer) for layer in range(4)] == [2, 2, 1, 2]
        assert [get_moe_intermediate_size(form, layer) for layer in range(4)] == [14336, 14336, 64, 14336]
        assert get_routing_spec(form, 2).top_k == 1
        assert get_expert_spec(form, 1).num_experts == 4
        assert is_moe_layer(form) and placed(form, 4) == [0, 1, 2, 3]
        assert get_norm_topk_prob(form) is True
        for question in (get_num_experts, get_num_experts_per_tok, get_moe_intermediate_size, get_routing_spec):
            with raises_catalogue(MoEConfigError, expected="a layer_idx"):
                question(form)


def test_heterogeneous_config_with_a_skipped_mlp() -> None:
    assert placed(mixtral(per_layer_config={1: {"skip": ["mlp"]}}), 4) == [0, 2, 3]


def test_lists_with_one_value_per_layer() -> None:
    config = {"model_type": "hunyuan_v1_moe", "num_hidden_layers": 3, "num_experts": [8, 8, 16], "moe_topk": [2, 2, 2]}
    assert [get_num_experts(config, layer) for layer in range(3)] == [8, 8, 16]
    assert get_num_experts_per_tok(config) == 2
    with raises_catalogue(MoEConfigError, expected="a layer_idx", got="[8, 8, 16]"):
        get_num_experts(config)
    with raises_catalogue(MoEConfigError, expected="a layer_idx below 3", got="3"):
        get_num_experts(config, 3)


def test_limits_per_layer() -> None:
    config = build_config(CASES["step3p5"], swiglu_limits=[None, None, None, 0, 7.0, 16.0])
    assert get_expert_spec(config, 3).act == "silu(g) * u"
    assert get_expert_spec(config, 4).act == "min(silu(g), 7.0) * max(min(u, 7.0), -7.0)"
    with raises_catalogue(MoEConfigError, expected="a layer_idx"):
        get_expert_spec(config)


# -- routing and experts


def spec_of(model_type: str, **options: Any) -> RoutingSpec:
    return get_routing_spec(build_config(CASES[model_type], **options))


def test_routing_options() -> None:
    greedy = spec_of("deepseek_v2", n_group=8, topk_group=3, norm_topk_prob=True, routed_scaling_factor=16.0)
    assert greedy == RoutingSpec(top_k=6, renorm=False, scale=16.0, logits_dtype="float32")
    limited = spec_of("deepseek_v2", n_group=8, topk_group=3, topk_method="group_limited_greedy")
    assert (limited.n_group, limited.topk_group, limited.group_score, limited.group_fill) == (8, 3, "max", "0")
    assert spec_of("axk2", n_group=4, topk_group=2).group_fill == "0"
    behind = {"select_on": "logits", "weight_dtype": None}
    assert spec_of("cohere2_moe") == RoutingSpec(top_k=2, **behind)
    sigmoid = spec_of("cohere2_moe", expert_selection_fn="sigmoid", norm_topk_prob=False)
    assert sigmoid == RoutingSpec(top_k=2, score="sigmoid", renorm=False, **behind)
    assert spec_of("jamba") == RoutingSpec(top_k=2, renorm=False, weight_dtype=None)
    assert spec_of("laguna", moe_routed_scaling_factor=2.5).scale == 2.5
    assert spec_of("laguna", moe_router_logit_softcapping=30.0).softcap == 30.0
    assert spec_of("mixtral", router_jitter_noise=0.01).jitter == 0.01


def test_hash_tables_choose_the_experts_of_some_layers() -> None:
    config = build_config(CASES["deepseek_v4"], mlp_layer_types=["hash_moe", "moe"] * 3)
    hashed, learned = (get_routing_spec(config, layer) for layer in (0, 1))
    assert (hashed.ids_given, hashed.select_bias, hashed.score) == (True, False, "sqrtsoftplus")
    assert (learned.ids_given, learned.select_bias, learned.score_dtype) == (False, True, "logits")
    with raises_catalogue(MoEConfigError, expected="a layer_idx"):
        get_routing_spec(config)


def test_routers_with_more_columns_than_experts() -> None:
    longcat = spec_of("longcat_flash", zero_expert_num=4, n_routed_experts=8)
    assert (longcat.num_null, longcat.null, longcat.num_logits(8), longcat.select_bias) == (4, "identity", 12, True)
    assert spec_of("longcat_flash", zero_expert_num=0).num_null == 0
    zaya = spec_of("zaya")
    assert (zaya.num_null, zaya.null, zaya.logits_given) == (1, "skip", True)
    inkling = spec_of("inkling_text", n_shared_experts=2)
    assert (inkling.n_shared, inkling.num_weights, inkling.global_scale) == (2, inkling.top_k + 2, True)


def test_what_the_layer_does_around_the_router() -> None:
    gemma = spec_of("gemma4_text", rms_norm_eps=1e-5)
    assert (gemma.per_expert_scale, gemma.input_norm_eps, gemma.renorm) == (True, 1e-5, 1)
    ernie = spec_of("ernie4_5_moe", moe_norm_min=1e-3)
    assert (ernie.eps, ernie.eps_mode, ernie.select_bias) == (1e-3, "clamp_min", True)
    assert spec_of("llama4_text").apply_weight_on == "input"
    assert spec_of("muse_spark_text").logits_scale != 1 if "muse_spark_text" in CASES else True
    assert spec_of("gpt_oss").logits_bias and not spec_of("mixtral").logits_bias


@pytest.mark.parametrize(("power", "renorm"), [(1.0, 1.0), (None, 0.0), (2.0, 2.0)])
def test_dbrx_norms(power: float | None, renorm: float) -> None:
    config = build_config(CASES["dbrx"], ffn_config={"moe_normalize_expert_weights": power})
    assert get_routing_spec(config).renorm == renorm
    assert get_norm_topk_prob(config) is bool(renorm)
    with raises_catalogue(MoEConfigError, got="inf"):
        spec_of("dbrx", ffn_config={"moe_normalize_expert_weights": float("inf")})


def test_activations_compute_what_transformers_does() -> None:
    import torch
    from transformers.activations import ACT2FN

    gate, up = torch.linspace(-12, 12, 101), torch.linspace(9, -9, 101)
    for name in ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "quick_gelu", "relu", "relu2", "tanh"):
        act = get_expert_spec({**SDAR, "hidden_act": name}).act
        torch.testing.assert_close(evaluate(act, gate, up), ACT2FN[name](gate) * up)
    clamped = get_expert_spec(build_config(CASES["deepseek_v4"], swiglu_limit=5.0, hidden_act="quick_gelu")).act
    torch.testing.assert_close(evaluate(clamped, gate, up), ACT2FN["quick_gelu"](gate.clamp(max=5)) * up.clamp(-5, 5))
    with raises_catalogue(MoEConfigError, got="'mish'"):
        get_expert_spec({**SDAR, "hidden_act": "mish"})


def test_expert_specs() -> None:
    nemotron = get_expert_spec(build_config(CASES["nemotron_h"], moe_latent_size=256))
    assert (nemotron.gated, nemotron.act, nemotron.hidden_size) == (False, "square(relu(g))", 256)
    assert nemotron.latent_size == 256 and get_expert_spec(build_config(CASES["nemotron_h"])).latent_size is None
    gpt = get_expert_spec(build_config(CASES["gpt_oss"], dtype="float16"))
    assert (gpt.bias, gpt.interleaved, gpt.transposed, gpt.dtype) == (True, True, True, "float16")
    assert get_expert_spec({**SDAR, "torch_dtype": "float32"}).dtype == "float32"
    assert get_shared_experts(build_config(CASES["inkling_text"])).gate == "router"
    assert get_shared_experts(build_config(CASES["qwen2_moe"])) == SharedExpertSpec(1, 5632, "sigmoid")


# -- model types without a row


def test_generic_rules() -> None:
    config = {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 64, "num_hidden_layers": 6}
    assert get_moe_intermediate_size(config) == 64
    assert placed(config, 2) == [0, 1]
    assert placed({**config, "first_k_dense_replace": 1, "moe_layer_freq": 2}, 6) == [2, 4]
    assert get_routing_spec({**config, "scoring_func": "sigmoid", "norm_topk_prob": True}) == RoutingSpec(
        top_k=4, score="sigmoid", eps=1e-20, select_bias=True
    )
    assert get_shared_experts({**config, "n_shared_experts": 2}) == SharedExpertSpec(2, 64)
    assert not is_moe_layer({"hidden_size": 64, "intermediate_size": 128}, 0)


UNKNOWN = {"num_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("question", "config", "names"),
    [
        (get_num_experts, {"hidden_size": 8}, ["num_experts", "n_routed_experts", "num_local_experts"]),
        (get_num_experts_per_tok, {"num_experts": 8}, ["num_experts_per_tok", "moe_topk", "top_k_experts"]),
        (get_moe_intermediate_size, UNKNOWN, ["moe_intermediate_size", "intermediate_size"]),
        (get_norm_topk_prob, UNKNOWN, ["norm_topk_prob"]),
        (get_routing_spec, {**UNKNOWN, "norm_topk_prob": True}, ["scoring_func"]),
        (get_routing_spec, {**UNKNOWN, "norm_topk_prob": True, "scoring_func": "entmax"}, ["scoring_func"]),
        (get_shared_experts, {**UNKNOWN, "shared_expert_intermediate_size": 64}, ["shared_expert_intermediate_size"]),
        (get_expert_spec, {**UNKNOWN, "moe_intermediate_size": 8}, ["hidden_size"]),
        (is_moe_layer, {"expert_count": 8, "num_hidden_layers": 2}, ["num_experts", "expert_count"]),
        (is_moe_layer, {"model_type": "glm4_moe", "num_experts": 8}, ["first_k_dense_replace"]),
        (is_moe_layer, {**UNKNOWN, "mlp_layer_types": ["dense", "odd"]}, ["mlp_layer_types"]),
        (is_moe_layer, {**UNKNOWN, "mlp_layer_types": ["dense"]}, ["mlp_layer_types"]),
        (is_moe_layer, {**SDAR, "decoder_sparse_step": 0}, ["decoder_sparse_step"]),
        (get_num_experts, {"num_experts": 8, "n_routed_experts": 16}, ["num_experts", "n_routed_experts", "16"]),
        (get_num_experts, {"num_experts": "many"}, ["num_experts", "'many'"]),
        (get_num_experts, {"model_type": "dots1", "n_routed_experts": None}, ["n_routed_experts", "None"]),
    ],
)
def test_what_is_not_said_is_not_guessed(question: Any, config: dict[str, Any], names: list[str]) -> None:
    for form in forms(config):
        with pytest.raises(MoEConfigError) as caught:
            question(form, 1)
        assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("layer", [-1, True, 1.0])
def test_layers_count_from_zero(layer: Any) -> None:
    with raises_catalogue(MoEConfigError, expected="a layer_idx of 0 or more", got=repr(layer)):
        is_moe_layer(SDAR, layer)


def test_config_does_not_import_transformers() -> None:
    code = "import sys, diffulex.moe.config; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
