"""Which MoE blocks of transformers are run: per family, the options that change what a block computes. Data only."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffulex.moe.config._families import COUNT, TOP_K, WIDTH

from .families import DEPTH, FAMILY_CASES, NEWER_CASES, FamilyCase, build_config, config_class

HIDDEN, EXPERTS, TOP = 64, 16, 4
# Sizes of every family, of those names that its config has.
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    **dict.fromkeys(COUNT, EXPERTS),
    **dict.fromkeys(TOP_K, TOP),
    **dict.fromkeys(WIDTH, 24),
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "share_expert_dim": 32,
}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "dbrx": {"d_model": HIDDEN, "n_heads": 4},
    "deepseek_v4": {"vocab_size": 50},
    "dots3_note_vision_encoder": {"num_attention_heads": 4, "adapter_in_dim": HIDDEN},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [24, 16], "head_dim": 128},
    "glm4_moe": _HEADS,
    "glm4v_moe_text": _HEADS,
    "longcat_flash": {"zero_expert_num": 8},
    "muse_spark_text": {"moe_hidden_size": 48, **_HEADS},
    "unlimited_ocr_text": _HEADS,
    "vitpose_backbone": {"num_attention_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
_FFN = {"moe_num_experts": EXPERTS, "moe_top_k": TOP, "ffn_hidden_size": 24, "hidden_size": HIDDEN}
_GROUPS = {"n_group": 4, "topk_group": 2}
_NO_NORM = {"norm_topk_prob": False}
_NORM = {"norm_topk_prob": True}
_ONE = {"num_experts_per_tok": 1}
_GREEDY_GROUPS = {**_GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.5}

# Family -> options in place of the defaults, a variant each; the first of a family with a required choice is its base.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "afmoe": ({"route_scale": 2.0}, {"num_shared_experts": 0}),
    "aria_text": ({"moe_num_shared_experts": 1},),
    "axk1": (_NO_NORM,),
    "axk2": ({"n_group": 4, "topk_group": 3},),
    "cohere2_moe": (
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": True},
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
        {"num_shared_experts": 2, "shared_expert_combination_strategy": "average"},
        {"num_shared_experts": 1, "shared_expert_combination_strategy": "sum"},
    ),
    "dbrx": (
        {"ffn_config": _FFN},
        {"ffn_config": {**_FFN, "moe_normalize_expert_weights": 2.0}},
        {"ffn_config": {**_FFN, "moe_normalize_expert_weights": None}},
        {"ffn_config": {**_FFN, "ffn_act_fn": {"name": "gelu"}}},
    ),
    "deepseek_ocr2_text": (_GREEDY_GROUPS,),
    "deepseek_v2": (_GREEDY_GROUPS, _NORM),
    "deepseek_v3": (_NO_NORM, _ONE, {"n_shared_experts": 3}, {"n_group": 1, "topk_group": 1}, {"hidden_act": "gelu"}),
    "deepseek_v4": (
        {"mlp_layer_types": ["hash_moe"] * DEPTH},
        {"scoring_func": "sigmoid"},
        {"swiglu_limit": 0.5},
        {"swiglu_limit": 0.5, "mlp_layer_types": ["hash_moe"] * DEPTH},
    ),
    "dots1": (_GROUPS, _NORM),
    "ernie4_5_moe": ({"moe_norm_min": 0.9}, {"moe_num_shared_experts": 0}),
    "exaone_moe": (_GROUPS, _NO_NORM),
    "flex_olmo": (_NORM,),
    "flint": (_NO_NORM,),
    "glm4_moe": (_GROUPS, _NO_NORM, {"n_shared_experts": 0}),
    "glm4_moe_lite": (_GROUPS,),
    "glm4v_moe_text": (_GROUPS,),
    "glm5_next_text": ({"swiglu_limit": 0.5}, {"n_shared_experts": 2}),
    "gpt_oss": ({"swiglu_limit": 1.0, "swiglu_alpha": 1.3},),
    "granitemoe_swa": ({"shared_intermediate_size": 0},),
    "granitemoeshared": ({"shared_intermediate_size": 0},),
    "hunyuan_v1_moe": ({"moe_topk": [1, 2, 3, 4, 3, 2]}, {"num_experts": 1, "moe_topk": 1}),
    "hy_v3": ({"enable_moe_fp32_combine": True}, {"num_shared_experts": 2}),
    "hy_v4": ({"swiglu_limit": 0.5}, _GROUPS),
    "inkling_text": ({"n_shared_experts": 1, "num_experts_per_tok": 1}, {"n_shared_experts": 3}),
    "inkling2_text": ({"mlp_gate_softcap": 0.7, "mlp_up_softcap": 1.5},),
    "kimi_linear": (_GROUPS, _NO_NORM),
    "kolibri1": (_NO_NORM,),
    "laguna": ({"moe_router_logit_softcapping": 0.5}, {"moe_routed_scaling_factor": 2.5}),
    "lfm2_moe": (_NO_NORM, {"use_expert_bias": False}),
    "llama4_text": (_ONE,),
    "longcat_flash": ({"zero_expert_num": 0}, {"router_bias": True}),
    "mellum": (_NO_NORM,),
    "mimo_v2_flash": (_GROUPS,),
    "minimax_m3_vl_text": ({"swiglu_limit": 1.0, "swiglu_alpha": 1.3},),
    "mistral4": (_GROUPS, _NO_NORM),
    "mistral_large4_text": (_GROUPS,),
    "mixtral": (
        _ONE,
        {"num_experts_per_tok": EXPERTS},
        {"hidden_act": "relu"},
        {"per_layer_config": {DEPTH - 1: {"num_experts_per_tok": 2, "intermediate_size": 16}}},
    ),
    "nemotron_h": (_GROUPS, {"moe_latent_size": 24}, {"mlp_hidden_act": "silu"}),
    "olmoe": (_NORM,),
    "openai_privacy_filter": ({"swiglu_limit": 1.0, "swiglu_alpha": 1.3},),
    "qwen2_moe": (_NORM,),
    "qwen3_moe": (_NORM,),
    "qwen3_next": (_NO_NORM,),
    "qwen3_omni_moe_text": (_NO_NORM,),
    "qwen3_omni_moe_talker_text": (_NORM,),
    "qwen4_exp_text": (_NO_NORM,),
    "solar_open": (_GROUPS,),
    "step3p5": (
        {"swiglu_limits": [0.0] * (DEPTH - 1) + [0.5], "swiglu_limits_shared": [0.0] * (DEPTH - 1) + [0.3]},
        {"swiglu_limits": [0.5] * (DEPTH - 1) + [0.0]},
    ),
    "unlimited_ocr_text": (_GREEDY_GROUPS,),
}
# An encoder for images with another number of experts in every layer, which the model's own code reads.
_PYRAMID = FamilyCase(
    "dots3_note_vision_encoder",
    "dots3_note",
    {"pyramid_num_routed": [-1, EXPERTS, -1, 12, EXPERTS, 8]},
    model_class="Dots3NoteVisionModel",
)
READ_PER_LAYER = {_PYRAMID.model_type}
BLOCK_CASES = (*FAMILY_CASES, *NEWER_CASES, _PYRAMID)
# The defaults of these cannot be small.
_NO_DEFAULT = {"dbrx"}
# Not a field of the config, but read where it is there.
_NO_FIELD = {"router_bias"}


@dataclasses.dataclass(frozen=True)
class BlockVariant:
    """One MoE block: a family, and options in place of its defaults."""

    case: FamilyCase
    options: dict[str, Any]

    def __str__(self) -> str:
        text = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.case.model_type}[{text.replace(' ', '')[:80]}]"

    def unknown(self) -> list[str]:
        """Options that the installed transformers does not know."""
        config = build_config(self.case)
        return [name for name in self.options if not hasattr(config, name) and name not in _NO_FIELD]

    def config(self) -> Any:
        """The config of a small model."""
        names = {*vars(build_config(self.case)), *getattr(config_class(self.case), "attribute_map", {})}
        sizes = {name: value for name, value in _SIZES.items() if name in names}
        own = _OWN_SIZES.get(self.case.model_type, {})
        return build_config(self.case, **{**self.case.options, **sizes, **own, **self.options})


def variants_of(case: FamilyCase) -> list[BlockVariant]:
    """The default of a family and its variants."""
    found = [] if case.model_type in _NO_DEFAULT else [BlockVariant(case, {})]
    return found + [BlockVariant(case, options) for options in VARIANTS.get(case.model_type, ())]
