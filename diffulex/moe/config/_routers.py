"""What routers do besides score, groups, division and scale: one row per model type. Data only, no code.

A name in a row is an attribute of the config; dots lead into sub-configs.
"""

from __future__ import annotations

import dataclasses

from lowering.spec import SELECTS


@dataclasses.dataclass(frozen=True)
class Router:
    """Fields of `RoutingSpec`, or the attributes of the config that hold them; the defaults are the generic rules.

    select_bias     fixed, the attribute that says, or None: with sigmoid scores, as DeepSeek-V3
    bias_in_weights attribute that says whether the bias of the choice stays in the weights
    clamp_min       attribute of the smallest sum that weights are divided by; "" adds the family's eps to the sum
    softcap, n_shared, logits_scale, input_norm_eps, jitter
                    attribute, "" where the family has no such thing
    num_null        attribute, or the fixed number
    hash_type       `mlp_layer_types` of layers whose experts come from a table by token id
    """

    select_bias: bool | str | None = None
    bias_in_weights: str = ""
    logits_bias: bool | str = False
    clamp_min: str = ""
    softcap: str = ""
    select_on: str = SELECTS[0]
    score_dtype: str = "float32"
    logits_dtype: str | None = None
    weight_dtype: str | None = "float32"
    n_shared: str = ""
    num_null: str | int = 0
    null: str = "identity"
    per_expert_scale: bool = False
    global_scale: bool = False
    input_norm_eps: str = ""
    logits_scale: str = ""
    logits_given: bool = False
    hash_type: str = ""
    jitter: str = ""
    apply_weight_on: str = "output"


GENERIC_ROUTER = Router()
_but = dataclasses.replace
# Named after what is fp32: the product of the router, the weights of the experts. Scores are, unless a row says else.
_WEIGHTS = Router(select_bias=False)
_BIASED = Router(select_bias=True)
_NOTHING = Router(select_bias=False, weight_dtype=None)
_ALL = Router(select_bias=False, logits_dtype="float32")
_ALL_BIASED = Router(select_bias=True, logits_dtype="float32")
_LOGITS = Router(select_bias=True, logits_dtype="float32", weight_dtype=None)
# Not even the scores are fp32.
_SHORT_SCORES = Router(select_bias=False, score_dtype="logits", weight_dtype=None)
# A score function behind the selection.
_TOPK_FIRST = Router(select_bias=False, select_on="logits", weight_dtype=None)
_GEMMA = Router(select_bias=False, per_expert_scale=True, input_norm_eps="rms_norm_eps")
_ERNIE = _but(_LOGITS, clamp_min="moe_norm_min")
_LLADA = Router(
    select_bias="moe_router_enable_expert_bias",
    bias_in_weights="moe_router_enable_expert_bias",
    weight_dtype=None,
)

ROUTERS: dict[str, Router] = {
    "afmoe": _BIASED,
    "aria_text": _TOPK_FIRST,
    "axk1": _ALL_BIASED,
    "axk2": _ALL_BIASED,
    "bailing_hybrid": _ALL_BIASED,
    "cohere2_moe": _TOPK_FIRST,
    "dbrx": _but(_SHORT_SCORES, jitter="ffn_config.moe_jitter_eps"),
    "deepseek_ocr2_text": _ALL,
    "deepseek_v2": _ALL,
    "deepseek_v3": _ALL_BIASED,
    "deepseek_v32": _ALL_BIASED,
    "deepseek_v4": _but(_SHORT_SCORES, select_bias=True, hash_type="hash_moe"),
    "diffusion_gemma_text": _GEMMA,
    "dots1": _ALL_BIASED,
    "dots3_note_text": _ALL_BIASED,
    "dots3_note_vision_encoder": _ALL_BIASED,
    "ernie4_5_moe": _ERNIE,
    "ernie4_5_vl_moe_text": _ERNIE,
    "exaone_moe": _ALL_BIASED,
    "flex_olmo": _NOTHING,
    "flint": _ALL,
    "gemma4_text": _GEMMA,
    "glm4_moe": _ALL_BIASED,
    "glm4_moe_lite": _ALL_BIASED,
    "glm4v_moe_text": _ALL_BIASED,
    "glm5_next_text": _ALL_BIASED,
    "glm_moe_dsa": _ALL_BIASED,
    "gpt_oss": _but(_TOPK_FIRST, logits_bias=True),
    "granitemoe": _TOPK_FIRST,
    "granitemoe_swa": _TOPK_FIRST,
    "granitemoehybrid": _TOPK_FIRST,
    "granitemoeshared": _TOPK_FIRST,
    "hunyuan_v1_moe": _NOTHING,
    "hy_v3": _ALL_BIASED,
    "hy_v4": _ALL_BIASED,
    "inkling2_text": _ALL_BIASED,
    "inkling_text": _but(_LOGITS, n_shared="n_shared_experts", global_scale=True),
    "jamba": _NOTHING,
    "jetmoe": _TOPK_FIRST,
    "kimi_linear": _ALL_BIASED,
    "kolibri1": _but(_ALL_BIASED, select_on="logits"),
    "laguna": _but(_BIASED, softcap="moe_router_logit_softcapping", weight_dtype=None),
    "lfm2_moe": _but(_SHORT_SCORES, select_bias="use_expert_bias"),
    "llada": _LLADA,
    "llada_moe": _LLADA,
    "llada2_moe": _ALL_BIASED,
    "llama4_text": _but(_TOPK_FIRST, apply_weight_on="input"),
    "longcat_flash": _but(_ALL_BIASED, num_null="zero_expert_num"),
    "mellum": _NOTHING,
    "mimo_v2_flash": _ALL_BIASED,
    "minimax": _but(_WEIGHTS, jitter="router_jitter_noise"),
    "minimax_m2": _but(_BIASED, jitter="router_jitter_noise"),
    "minimax_m3_vl_text": _BIASED,
    "mistral4": _SHORT_SCORES,
    "mistral_large4_text": _ALL,
    "mixtral": _but(_WEIGHTS, jitter="router_jitter_noise"),
    "muse_spark_text": _but(_ALL_BIASED, logits_scale="output_multiplier"),
    "nemotron_h": _ALL_BIASED,
    "olmoe": _NOTHING,
    "openai_privacy_filter": _but(_ALL, select_on="logits", logits_bias=True),
    "qwen2_moe": _NOTHING,
    "qwen3_5_moe_text": _NOTHING,
    "qwen3_moe": _NOTHING,
    "qwen3_next": _NOTHING,
    "qwen3_omni_moe_talker_text": _NOTHING,
    "qwen3_omni_moe_text": _NOTHING,
    "qwen3_vl_moe_text": _NOTHING,
    "qwen4_exp_text": _NOTHING,
    "sdar_moe": _NOTHING,
    "solar_open": _ALL_BIASED,
    "step3p5": _BIASED,
    "unlimited_ocr_text": _ALL,
    "zaya": _but(_SHORT_SCORES, select_bias=True, num_null=1, null="skip", logits_given=True),
}
