"""What the generic rules get wrong: one row per model type, read by the rest of the package. Data only, no code.

A name in a row is an attribute of the config; dots lead into sub-configs, `{side}` stands for encoder or decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

COUNT = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_routed_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
WIDTH = ("moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size")
DENSE_WIDTH = ("intermediate_size", "ffn_hidden_size")
HIDDEN = ("hidden_size", "d_model", "n_embd")
LAYERS = ("num_hidden_layers", "n_layers", "num_layers")
NORM = ("norm_topk_prob", "moe_renormalize")
SCALE = ("routed_scaling_factor", "route_scale", "moe_routed_scaling_factor", "router_scaling_factor")
GROUPS = ("n_group", "num_expert_group")
SHARED_COUNT = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "shared_intermediate_size",
)
ACT = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "mlp_hidden_act")


@dataclasses.dataclass(frozen=True)
class Shared:
    """Shared experts of a family: names or fixed numbers; `width` () means the width of the routed experts.

    clamp, limit   as in `Family`, where they are not those of the routed experts
    combine        attribute that says "sum" or "average"; "" means a sum
    bias           attribute that says whether its linear layers have biases; "" means they have none
    """

    count: tuple[str, ...] | int = SHARED_COUNT
    width: tuple[str, ...] = ()
    gate: str = "none"
    clamp: str | None = None
    limit: str = ""
    combine: str = ""
    bias: str = ""


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family names its facts; the defaults are the generic rules.

    count, top_k, width, hidden, layers    attribute names in order of preference, or the fixed number
    latent       attribute of the size between the projections around the experts, "" where there are none
    enabled      attribute that has to be true for any layer to be MoE
    min_experts  fewest experts for which the family builds a MoE block
    placement    rule of `_placement`; "" means: the first rule whose attribute the config has, else all layers
    score        score function, or the attribute that names it; None means `scoring_func` has to say
    norm         whether weights are renormalised: fixed, the attributes that say, or either by score function;
                 "k>1" means all but top-1
    group        "score fill" of `RoutingSpec`, "" where groups are not read
    group_if     (attribute, value): groups count only then
    act          attributes that name the activation, or the name itself
    clamp        "" | "before" | "after" the activation, or "oai": (u + 1) * g * sigmoid(alpha * g), clamped, or
                 "tanh": soft caps on g and u, but not on the g of the sigmoid (Inkling 2)
    limit        attribute of the clamp, a number or a list per layer
    routing, experts
                 what `RoutingSpec` or `ExpertSpec` cannot express, "" where it can
    shared       None: the family has none; a `Shared`; "" means the generic rule
    """

    count: tuple[str, ...] = COUNT
    top_k: tuple[str, ...] | int = TOP_K
    width: tuple[str, ...] | int = ()
    hidden: tuple[str, ...] = HIDDEN
    latent: str = ""
    layers: tuple[str, ...] = LAYERS
    enabled: str = ""
    min_experts: int = 1
    placement: str = ""
    score: str | None = None
    norm: bool | str | tuple[str, ...] | Mapping[str, bool | tuple[str, ...]] = NORM
    eps: float = 0.0
    scale: tuple[str, ...] = SCALE
    group: str = ""
    group_if: tuple[str, str] | None = None
    act: tuple[str, ...] | str = ACT
    clamp: str = ""
    limit: str = "swiglu_limit"
    gated: bool = True
    bias: bool = False
    output_bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    shared: Shared | str | None = ""
    routing: str = ""
    experts: str = ""


_but = dataclasses.replace
_CAPACITY = "experts of limited capacity that drop tokens"
_ONE_SHARED = Shared(count=1)
_MLP_BIAS = Shared(bias="mlp_bias")
_GRANITE_SHARED = Shared(count=1, width=("shared_intermediate_size",))
_SIGMOID_GATED = Shared(count=1, width=("shared_expert_intermediate_size",), gate="sigmoid")
_INTERMEDIATE = ("intermediate_size",)

GENERIC = Family()
_QWEN = Family(score="softmax", scale=(), shared=None)
_QWEN_SHARED = _but(_QWEN, shared=_SIGMOID_GATED)
_MIXTRAL = Family(score="softmax", norm=True, scale=(), width=_INTERMEDIATE, placement="all", shared=None)
_OLMOE = _but(_MIXTRAL, norm=NORM)
_GRANITE = _but(_MIXTRAL, shared=_GRANITE_SHARED)
_DEEPSEEK = Family(score="sigmoid", eps=1e-20, group="top2_sum -inf", scale=("routed_scaling_factor",), shared=Shared())
_DEEPSEEK_PREFIX = _but(_DEEPSEEK, placement="first_k_dense_replace")
_DEEPSEEK_TYPES = _but(_DEEPSEEK, placement="mlp_layer_types")
_DEEPSEEK_V2 = _but(
    _DEEPSEEK_PREFIX,
    score="softmax",
    norm=False,
    eps=0.0,
    group="max 0",
    group_if=("topk_method", "group_limited_greedy"),
    shared=_MLP_BIAS,
)
_SIGMOID = Family(score="sigmoid", norm=True)
_GEMMA = _but(_MIXTRAL, width=("moe_intermediate_size",))
_OAI = _but(_MIXTRAL, act="silu", clamp="oai", bias=True, transposed=True)
_ERNIE = Family(score="softmax", norm=True, scale=(), shared=Shared(bias="use_bias"))
_LLADA = Family(
    width=("expert_intermediate_size",),
    score="softmax",
    norm=False,
    scale=(),
    shared=Shared(count=1, width=("shared_expert_intermediate_size",)),
)

FAMILIES: dict[str, Family] = {
    "afmoe": _but(_SIGMOID, placement="num_dense_layers", eps=1e-20, scale=("route_scale",), shared=Shared()),
    "aria_text": _but(_MIXTRAL, act="silu", transposed=True, shared=_MLP_BIAS),
    "axk1": _DEEPSEEK,
    "axk2": _but(_DEEPSEEK, group="top2_sum 0"),
    "bailing_hybrid": _DEEPSEEK,
    "cohere2_moe": Family(
        width=_INTERMEDIATE,
        score="expert_selection_fn",
        norm={"softmax": True, "sigmoid": NORM},
        scale=(),
        shared=Shared(combine="shared_expert_combination_strategy"),
    ),
    "dbrx": Family(
        count=("ffn_config.moe_num_experts",),
        top_k=("ffn_config.moe_top_k",),
        width=("ffn_config.ffn_hidden_size",),
        hidden=("ffn_config.hidden_size", *HIDDEN),
        placement="all",
        score="softmax",
        norm=("ffn_config.moe_normalize_expert_weights",),
        scale=(),
        act=("ffn_config.ffn_act_fn.name",),
        shared=None,
    ),
    "deepseek_ocr2_text": _but(_DEEPSEEK_V2, placement="mlp_layer_types"),
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_PREFIX,
    "deepseek_v32": _DEEPSEEK,
    "deepseek_v4": Family(
        score="scoring_func",
        norm=True,
        eps=1e-20,
        placement="mlp_layer_types",
        clamp="before",
        shared=_but(_ONE_SHARED, bias="mlp_bias"),
    ),
    "diffusion_gemma_text": _GEMMA,
    "doge": Family(
        width=1,
        enabled="is_moe",
        placement="all",
        scale=(),
        shared=Shared(count=1, width=_INTERMEDIATE),
        routing="product keys",
        experts="experts that are rows of two embeddings",
    ),
    "dots1": _DEEPSEEK_PREFIX,
    "dots3_note_text": _but(_DEEPSEEK_TYPES, shared=Shared(width=("shared_experts_intermediate_size",))),
    "dots3_note_vision_encoder": _but(
        _SIGMOID, placement="mlp_layer_types", eps=1e-20, scale=("router_scaling_factor",), shared=None
    ),
    "ernie4_5_moe": _but(_ERNIE, placement="moe_layer_interval"),
    "ernie4_5_vl_moe_text": _but(
        _ERNIE,
        width=("moe_intermediate_size.0",),
        placement="mlp_layer_types",
        experts="two banks of experts, chosen by the kind of token",
    ),
    "exaone_moe": _DEEPSEEK,
    "flex_olmo": _OLMOE,
    "flint": Family(score="sigmoid", scale=(), shared=Shared(count=1, width=("shared_expert_intermediate_size",))),
    "gemma4_text": _but(_GEMMA, enabled="enable_moe_block"),
    "glm4_moe": _DEEPSEEK_PREFIX,
    "glm4_moe_lite": _DEEPSEEK_TYPES,
    "glm4v_moe_text": _DEEPSEEK_PREFIX,
    "glm5_next_text": _but(_DEEPSEEK_TYPES, act="silu", clamp="before"),
    "glm_moe_dsa": _DEEPSEEK,
    "gpt_oss": _but(_OAI, interleaved=True),
    "granitemoe": _MIXTRAL,
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoeshared": _GRANITE,
    "hunyuan_v1_moe": _but(_MIXTRAL, shared=_ONE_SHARED),
    "hy_v3": _but(_SIGMOID, placement="mlp_layer_types", eps=1e-20, scale=("router_scaling_factor",), shared=_MLP_BIAS),
    "hy_v4": _but(_DEEPSEEK_TYPES, act="silu", clamp="before", shared=Shared(clamp="")),
    "inkling2_text": Family(
        placement="all",
        score="scoring_func",
        norm=True,
        eps=1e-20,
        scale=("route_scale",),
        act="silu",
        clamp="tanh",
        shared=None,
    ),
    "inkling_text": Family(
        placement="mlp_layer_types",
        score="sigmoid",
        norm=True,
        shared=Shared(gate="router"),
    ),
    "jamba": _but(_MIXTRAL, placement="expert_layer_period", min_experts=2, norm=False),
    "jetmoe": _but(_MIXTRAL, output_bias=True),
    "kimi_linear": _DEEPSEEK,
    "kolibri1": Family(
        placement="all",
        score="sigmoid",
        scale=(),
        shared=Shared(count=1, width=("shared_expert_intermediate_size",)),
    ),
    "laguna": _but(
        _SIGMOID,
        placement="mlp_layer_types",
        scale=("moe_routed_scaling_factor",),
        shared=Shared(count=1, width=("shared_expert_intermediate_size",)),
    ),
    "lfm2_moe": Family(
        placement="num_dense_layers",
        score="sigmoid",
        eps=1e-6,
        scale=("routed_scaling_factor",),
        act="silu",
        shared=None,
    ),
    "llada": _LLADA,
    "llada_moe": _LLADA,
    "llada2_moe": Family(
        width=("moe_intermediate_size",),
        placement="first_k_dense_replace",
        score="sigmoid",
        norm="k>1",
        eps=1e-20,
        group="top2_sum -inf",
        scale=("routed_scaling_factor",),
        shared=Shared(),
    ),
    "llama4_text": Family(
        width=_INTERMEDIATE,
        placement="moe_layers",
        score="sigmoid",
        norm=False,
        scale=(),
        transposed=True,
        shared=_ONE_SHARED,
    ),
    "longcat_flash": Family(
        width=("expert_ffn_hidden_size",),
        layers=("num_layers",),
        placement="all",
        score="softmax",
        norm=False,
        scale=("routed_scaling_factor",),
        shared=None,
    ),
    "mellum": _but(_QWEN, placement="mlp_layer_types"),
    "mimo_v2_flash": _but(_DEEPSEEK, shared=None),
    "minimax": _MIXTRAL,
    "minimax_m2": _but(_MIXTRAL, score="sigmoid"),
    "minimax_m3_vl_text": Family(
        width=_INTERMEDIATE,
        score="sigmoid",
        norm=True,
        scale=("routed_scaling_factor",),
        act="silu",
        clamp="oai",
        shared=_GRANITE_SHARED,
    ),
    "mistral4": _but(_DEEPSEEK_PREFIX, score="softmax", group="top2_sum 0"),
    "mistral_large4_text": _but(_DEEPSEEK, score="softmax", group="top2_sum 0", norm=True),
    "mixtral": _MIXTRAL,
    "muse_spark_text": Family(
        hidden=("moe_hidden_size",),
        placement="mlp_layer_types",
        score="sigmoid",
        norm=True,
        eps=1e-15,
        scale=("routed_scaling_factor",),
        shared=None,
        experts="a norm on the output of each expert",
    ),
    "nemotron_h": _but(
        _DEEPSEEK,
        latent="moe_latent_size",
        placement="layers_block_type",
        act=("mlp_hidden_act",),
        gated=False,
        shared=Shared(count=1, width=("moe_shared_expert_intermediate_size",), bias="mlp_bias"),
    ),
    "nllb-moe": Family(
        top_k=2,
        width=("{side}_ffn_dim",),
        layers=("{side}_layers",),
        placement="{side}_sparse_step, last of each",
        norm=True,
        act=("activation_function",),
        gated=False,
        bias=True,
        shared=None,
        routing=_CAPACITY,
    ),
    "olmoe": _OLMOE,
    "openai_privacy_filter": _OAI,
    "phimoe": _but(_MIXTRAL, norm=False, routing="sparsemixer"),
    "qwen2_moe": _QWEN_SHARED,
    "qwen3_5_moe_text": _but(_QWEN_SHARED, norm=True, placement="all"),
    "qwen3_moe": _QWEN,
    "qwen3_next": _QWEN_SHARED,
    "qwen3_omni_moe_talker_text": _but(_QWEN_SHARED, placement="all"),
    "qwen3_omni_moe_text": _QWEN,
    "qwen3_vl_moe_text": _but(_QWEN, norm=True),
    "qwen4_exp_text": _but(_QWEN_SHARED, placement="all"),
    "sdar_moe": _QWEN,
    "solar_open": _but(_DEEPSEEK, placement="all"),
    "step3p5": _but(
        _SIGMOID,
        scale=("moe_router_scaling_factor",),
        clamp="after",
        limit="swiglu_limits",
        shared=Shared(count=1, width=("share_expert_dim",), limit="swiglu_limits_shared", bias="mlp_bias"),
    ),
    "switch_transformers": Family(
        top_k=1,
        width=("d_ff",),
        layers=("num_{side}_layers", "num_layers"),
        placement="{side}_sparse_step, second of each",
        norm=False,
        act=("dense_act_fn",),
        gated=False,
        shared=None,
        routing=_CAPACITY,
    ),
    "unlimited_ocr_text": _but(_DEEPSEEK_V2, placement="mlp_layer_types"),
    "vitpose_backbone": Family(
        top_k=1,
        width=("part_features",),
        placement="all",
        min_experts=2,
        norm=False,
        shared=None,
        routing="no router: the data set chooses the expert",
        experts="experts that are one linear layer",
    ),
    "zaya": Family(
        placement="all",
        norm=False,
        scale=(),
        score="softmax",
        shared=None,
    ),
}
