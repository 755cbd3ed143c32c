"""The families: which class holds the MoE layers, and what a tiny model needs beyond the common sizes. Data only."""

from __future__ import annotations

import dataclasses
from typing import Any

VOCABULARY = 264
# What the configuration of a tiny model gets where it has such a field.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "share_expert_dim": 24,
    "mlp_layer_types": ["sparse", "sparse"],
    "mlp_only_layers": [],
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "hc_mult": 2,
    "hc_count": 2,
    "hc_sinkhorn_iters": 2,
    "max_position_embeddings": 1024,
    "sliding_window": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A tiny model that holds MoE layers of a family.

    name      its folder in transformers
    model     the class that is compiled
    options   fields of its configuration beside `SIZES`
    part      which of a family's models this is, where it has several
    inputs    what the model is called with, see `diffulex.families.build`
    layers    modules of experts it has
    adapt     whether its experts stand outside transformers' experts interface, so that `diffulex.adapt` comes first
    newer     whether transformers 5.17 does not have it
    note      what has to be known of it
    """

    name: str
    model: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    part: str = ""
    inputs: str = "tokens"
    layers: int = 2
    adapt: bool = False
    newer: bool = False
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.part})" if self.part else self.name


_FULL: dict[str, Any] = {"layer_types": ["full_attention"] * 2}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}
_INDEXER: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 64,
}
_DBRX: dict[str, Any] = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 1024,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 32},
}
_LONGCAT: dict[str, Any] = {
    "num_layers": 2,
    "num_hidden_layers": 4,
    "ffn_hidden_size": 48,
    "moe_topk": 3,
    "zero_expert_num": 2,
}
_NLLB: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "expert_capacity": 16,
}
_DEEPSEEK_V4: dict[str, Any] = {
    "layer_types": ["sliding_attention", "heavily_compressed_attention"],
    "mlp_layer_types": ["hash_moe", "moe"],
}
_SWITCH: dict[str, Any] = {
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_STEP: dict[str, Any] = {
    **_FULL,
    "num_attention_groups": 2,
    "swiglu_limits": [0.0, 0.5],
    "swiglu_limits_shared": [0.0, 0.5],
}
_VITPOSE: dict[str, Any] = {
    "image_size": [32, 32],
    "patch_size": [16, 16],
    "num_experts": 3,
    "part_features": 8,
}
_NEMOTRON: dict[str, Any] = {
    "layers_block_type": ["full_attention", "moe", "full_attention", "moe"],
    "num_hidden_layers": None,
}

FAMILIES: tuple[Family, ...] = (
    Family("afmoe", "AfmoeForCausalLM"),
    Family("aria", "AriaTextForCausalLM", adapt=True),
    Family("axk1", "AXK1ForCausalLM"),
    Family("axk2", "AXK2ForCausalLM"),
    Family("bailing_hybrid", "BailingHybridForCausalLM", _FULL, newer=True),
    Family("beam", "BeamForCausalLM", newer=True),
    Family("cohere2_moe", "Cohere2MoeForCausalLM"),
    Family("dbrx", "DbrxForCausalLM", _DBRX, adapt=True),
    Family("deepseek_ocr2", "DeepseekOcr2TextModel"),
    Family("deepseek_v2", "DeepseekV2ForCausalLM"),
    Family("deepseek_v3", "DeepseekV3ForCausalLM"),
    Family("deepseek_v32", "DeepseekV32ForCausalLM"),
    Family("deepseek_v4", "DeepseekV4ForCausalLM", _DEEPSEEK_V4),
    Family(
        "diffusion_gemma",
        "DiffusionGemmaModel",
        {"text_config": {}, "vision_config": {"model_type": "gemma4_vision", "position_embedding_size": 16}},
        inputs="prompt_and_canvas",
        layers=4,
    ),
    Family("doge", "DogeForCausalLM", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4}, adapt=True),
    Family("dots1", "Dots1ForCausalLM", {"n_shared_experts": 1}),
    Family("dots3_note", "Dots3NoteTextModel", newer=True),
    Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", {"moe_layer_start_index": 0}),
    Family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeTextModel",
        {"moe_intermediate_size": [24, 16], "head_dim": 128},
        inputs="text_and_images",
        adapt=True,
    ),
    Family("exaone_moe", "ExaoneMoeForCausalLM"),
    Family("flex_olmo", "FlexOlmoForCausalLM"),
    Family("flint", "FlintForCausalLM", newer=True),
    Family(
        "gemma4",
        "Gemma4ForCausalLM",
        {
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Family("glm4_moe", "Glm4MoeForCausalLM"),
    Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
    Family("glm4v_moe", "Glm4vMoeTextModel", {"rope_parameters": _MROPE}),
    Family(
        "glm5_next",
        "Glm5NextTextModel",
        {"qk_rope_head_dim": 0, "head_dim": 0, **_FULL},
        note="its attention drops the pools of keys that nobody sees by a boolean mask, whose sum the host waits for",
    ),
    Family("glm_moe_dsa", "GlmMoeDsaForCausalLM"),
    Family("gpt_oss", "GptOssForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    Family("granitemoe", "GraniteMoeForCausalLM"),
    Family("granitemoe_swa", "GraniteMoeSWAForCausalLM"),
    Family("granitemoehybrid", "GraniteMoeHybridForCausalLM", {"layer_types": ["attention"] * 2, "mamba_n_heads": 4}),
    Family("granitemoeshared", "GraniteMoeSharedForCausalLM"),
    Family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    Family("hy_v3", "HYV3ForCausalLM"),
    Family("hy_v4", "HYV4ForCausalLM"),
    Family("inkling", "InklingTextModel"),
    Family("inkling2", "Inkling2ForCausalLM", newer=True),
    Family(
        "jamba",
        "JambaForCausalLM",
        {"expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1, "attn_layer_offset": 0},
    ),
    Family("jetmoe", "JetMoeForCausalLM", {"kv_channels": 8}, layers=4, adapt=True),
    Family("kimi_linear", "KimiLinearForCausalLM", _FULL),
    Family("kolibri1", "Kolibri1ForCausalLM", newer=True),
    Family("laguna", "LagunaForCausalLM"),
    Family("lfm2_moe", "Lfm2MoeForCausalLM", {"layer_types": ["full_attention", "conv"]}),
    Family("llama4", "Llama4ForCausalLM", {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}, adapt=True),
    Family("longcat_flash", "LongcatFlashForCausalLM", _LONGCAT, adapt=True),
    Family("mellum", "MellumForCausalLM"),
    Family("mimo_v2_flash", "MiMoV2FlashForCausalLM"),
    Family("minimax", "MiniMaxForCausalLM", _FULL),
    Family("minimax_m2", "MiniMaxM2ForCausalLM"),
    Family("minimax_m3_vl", "MiniMaxM3VLTextModel"),
    Family("mistral4", "Mistral4ForCausalLM", {"head_dim": 12}),
    Family("mistral_large4", "MistralLarge4TextModel", newer=True),
    Family("mixtral", "MixtralForCausalLM"),
    Family("muse_spark", "MuseSparkTextModel", {"moe_hidden_size": 48}, newer=True),
    Family("nemotron_h", "NemotronHForCausalLM", _NEMOTRON),
    Family(
        "nllb_moe",
        "NllbMoeModel",
        _NLLB,
        inputs="encoder_decoder",
        adapt=True,
        note="as transformers computes it: a 0/1 mask stands for the numbers of experts, so that only two of them run",
    ),
    Family("olmoe", "OlmoeForCausalLM"),
    Family("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification", inputs="encoder", adapt=True),
    Family("phimoe", "PhimoeForCausalLM"),
    Family("qwen2_moe", "Qwen2MoeForCausalLM"),
    Family("qwen3_5_moe", "Qwen3_5MoeForCausalLM", _FULL),
    Family("qwen3_moe", "Qwen3MoeForCausalLM"),
    Family("qwen3_next", "Qwen3NextForCausalLM", _FULL),
    Family(
        "qwen3_omni_moe",
        "Qwen3OmniMoeTalkerModel",
        {"shared_expert_intermediate_size": 24},
        part="talker",
        inputs="embeddings",
    ),
    Family("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel", part="thinker"),
    Family("qwen3_vl_moe", "Qwen3VLMoeTextModel"),
    Family(
        "qwen4_exp",
        "Qwen4ExpTextModel",
        {**_FULL, **_INDEXER},
        note="its attention picks keys query by query, in a loop over torch.nonzero of the mask",
    ),
    Family("solar_open", "SolarOpenForCausalLM"),
    Family("step3p7", "Step3p7TextModel", _STEP, adapt=True),
    Family(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        _SWITCH,
        inputs="encoder_decoder",
        adapt=True,
    ),
    Family("unlimited_ocr", "UnlimitedOcrTextModel", newer=True),
    Family("vitpose_backbone", "VitPoseBackbone", _VITPOSE, inputs="images", adapt=True),
    Family("zaya", "ZayaForCausalLM", {"num_experts_per_tok": 1}),
)
