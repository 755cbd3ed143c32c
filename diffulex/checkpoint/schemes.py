"""Which names the tensors of a MoE block have, one row per naming scheme; data, read in both directions.

A scheme lists its forms, newest first: "v5" is what the modules of transformers 5 are called, "v4" what the
checkpoints on the hub are called where that differs, others are named for what they are. Names are relative to the
layer (`model.layers.3.`). Where only some model types of a row have a bias or shared experts, the block says so:
a rule whose parameter the block lacks is not used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lowering.errors import MoEOptionError

from .rules import Rule

Rules = tuple[Rule, ...]
_UP, _DOWN = "shared_experts.gate_up_proj.weight", "shared_experts.down_proj.weight"
_PROJ, _W132 = "gate_proj up_proj down_proj", "w1 w3 w2"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The names of one or more model types.

    types   model types, those of wrapper configs included
    forms   form name -> rules
    layers  where the layers of a plain causal language model are; wrappers have more in front
    """

    types: tuple[str, ...]
    forms: Mapping[str, Rules]
    layers: str = "model.layers."


def _gate(weight: str = "mlp.gate.weight", *, bias: str = "mlp.gate.e_score_correction_bias", form: str = "") -> Rules:
    """The router's linear layer, and the bias that only the choice sees."""
    return (Rule(weight, "gate.weight"), *([Rule(bias, "router.correction_bias", form=form)] if bias else []))


def _split(at: str = "mlp.experts", names: str = _PROJ) -> Rules:
    """A linear layer per expert and projection."""
    gate, up, down = (f"{at}.{{e}}.{name}.weight" for name in names.split())
    return (Rule(gate, "w13", part="gate"), Rule(up, "w13", part="up"), Rule(down, "w2"))


def _fused(at: str = "mlp.experts.", *, up: str = "gate_up_proj", down: str = "down_proj", form: str = "") -> Rules:
    """One tensor [E, 2I, H] and one [E, H, I]."""
    return (Rule(at + up, "w13", form=form), Rule(at + down, "w2", form=form.replace("interleaved", "").strip()))


def _shared(at: str = "mlp.shared_experts", names: str = _PROJ) -> Rules:
    """One MLP of three linear layers that every token passes through."""
    gate, up, down = (f"{at}.{name}.weight" for name in names.split())
    return (Rule(gate, _UP, part="gate"), Rule(up, _UP, part="up"), Rule(down, _DOWN))


def _shared_fused(at: str, names: str) -> Rules:
    up, down = (f"{at}.{name}.weight" for name in names.split())
    return (Rule(up, _UP), Rule(down, _DOWN))


def _scheme(types: str, v5: Rules, v4: Rules | None = None, *, layers: str = "", **others: Rules) -> Scheme:
    forms = {"v5": v5, **({"v4": v4} if v4 else {}), **others}
    return Scheme(tuple(types.split()), forms, **({"layers": layers} if layers else {}))


_QWEN_SHARED = (*_shared("mlp.shared_expert"), Rule("mlp.shared_expert_gate.weight", "shared_experts.gate.weight"))
_QWEN = (_gate() + _fused() + _QWEN_SHARED, _gate() + _split() + _QWEN_SHARED)
_EXPERT_BIAS = _gate(bias="mlp.gate.expert_bias")
_MLP_BIAS = _gate(bias="mlp.e_score_correction_bias")
_ERNIE = "moe_statics.e_score_correction_bias"
_MIXTRAL_V4 = _split("block_sparse_moe.experts", _W132)
_OAI = (
    Rule("mlp.router.weight", "gate.weight"),
    Rule("mlp.router.bias", "gate.bias"),
    Rule("mlp.experts.down_proj", "w2", form="transposed"),
    Rule("mlp.experts.down_proj_bias", "b2"),
)
_GRANITE_SHARED = _shared_fused("shared_mlp", "input_linear output_linear")
_GRANITE = (
    _gate("block_sparse_moe.router.weight", bias="") + _fused("block_sparse_moe.experts.") + _GRANITE_SHARED,
    _gate("block_sparse_moe.router.layer.weight", bias="")
    + _fused("block_sparse_moe.", up="input_linear.weight", down="output_linear.weight")
    + _GRANITE_SHARED,
)
_NEMOTRON = (
    *_gate("mixer.gate.weight", bias="mixer.gate.e_score_correction_bias"),
    Rule("mixer.shared_experts.up_proj.weight", _UP),
    Rule("mixer.shared_experts.down_proj.weight", _DOWN),
    Rule("mixer.fc1_latent_proj.weight", "latent_in.weight"),
    Rule("mixer.fc2_latent_proj.weight", "latent_out.weight"),
)
_GEMMA = (
    Rule("router.proj.weight", "gate.weight"),
    Rule("router.scale", "gate.input_scale"),
    Rule("router.per_expert_scale", "router.per_expert_scale"),
    *_fused("experts."),
)
_INKLING = (
    *_gate(bias=""),
    Rule("mlp.gate.global_scale", "router.global_scale"),
)
_ZAYA_ROUTER = tuple(
    Rule(f"mlp.gate.{name}", "")
    for name in (
        *("down_proj.weight", "down_proj.bias", "router_states_scale"),
        *("router_mlp.norm.weight", "router_mlp.fc1.weight", "router_mlp.fc1.bias"),
        *("router_mlp.fc2.weight", "router_mlp.fc2.bias", "router_mlp.out_proj.weight"),
    )
)
_LONGCAT = (
    *_gate("mlp.router.classifier.weight", bias="mlp.router.e_score_correction_bias"),
    Rule("mlp.router.classifier.bias", ""),  # made where `router_bias` says so, and not read
)
_DEEPSEEK_V4 = (Rule("mlp.gate.tid2eid", ""),)
_AXK1 = (Rule("mlp.post_mlp_layernorm.weight", ""),)

SCHEMES = (
    _scheme(
        "qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text qwen4_exp qwen4_exp_text qwen3_omni_moe"
        " qwen3_omni_moe_thinker qwen3_omni_moe_text qwen3_omni_moe_talker qwen3_omni_moe_talker_text sdar_moe flint",
        *_QWEN,
    ),
    _scheme("olmoe flex_olmo mellum", *_QWEN),
    _scheme("qwen3_vl_moe qwen3_vl_moe_text", _gate() + _fused(), _gate() + _fused(form="transposed")),
    _scheme(
        "deepseek_v2 deepseek_v3 deepseek_v32 deepseek_ocr2 deepseek_ocr2_text dots1 dots3_note dots3_note_text"
        " glm4_moe glm4_moe_lite glm4v_moe glm4v_moe_text glm5_next glm5_next_text glm_moe_dsa solar_open mistral4"
        " mimo_v2_flash cohere2_moe axk2 kimi_k25 unlimited_ocr unlimited_ocr_text",
        _gate() + _fused() + _shared(),
        _gate() + _split() + _shared(),
    ),
    _scheme("hy_v4", _gate() + _fused() + _shared()),
    _scheme("axk1", _gate() + _fused() + _shared() + _AXK1, _gate() + _split() + _shared()),
    _scheme("exaone_moe", _gate() + _fused() + _shared(), _MLP_BIAS + _split() + _shared()),
    _scheme("kolibri1", _gate() + _fused() + _shared(), _gate(bias="moe.router.expert_bias") + _split() + _shared()),
    _scheme("bailing_hybrid llada2_moe", _gate() + _fused() + _shared(), _EXPERT_BIAS + _split() + _shared()),
    _scheme(
        "llada llada_moe",
        _gate(bias="mlp.expert_bias") + _fused("mlp.", up="w1", down="w2") + _shared("shared_expert"),
        _gate(bias="mlp.expert_bias") + _split() + _shared("shared_expert"),
    ),
    _scheme(
        "ernie4_5_moe",
        _gate(bias=f"mlp.gate.{_ERNIE}", form="row") + _fused() + _shared(),
        _gate(bias=f"mlp.{_ERNIE}", form="row") + _split() + _shared(),
    ),
    _scheme(
        "hunyuan_v1_moe",
        _gate("mlp.gate.wg.weight", bias="") + _fused() + _shared("mlp.shared_mlp"),
        _gate("mlp.gate.wg.weight", bias="") + _split() + _shared("mlp.shared_mlp"),
    ),
    _scheme(
        "hy_v3",
        _MLP_BIAS + _fused() + _shared(),
        _gate("mlp.router.gate.weight", bias="mlp.expert_bias") + _split() + _shared("mlp.shared_mlp"),
    ),
    _scheme(
        "afmoe",
        _gate("mlp.router.gate.weight", bias="mlp.expert_bias") + _fused() + _shared(),
        _gate("mlp.router.gate.weight", bias="mlp.expert_bias") + _split() + _shared(),
    ),
    _scheme(
        "laguna",
        _gate() + _fused() + _shared(),
        _gate(bias="mlp.experts.e_score_correction_bias") + _split() + _shared("mlp.shared_expert"),
    ),
    _scheme(
        "mixtral minimax minimax_m2",
        _MLP_BIAS + _fused(),
        _gate("block_sparse_moe.gate.weight", bias="block_sparse_moe.e_score_correction_bias") + _MIXTRAL_V4,
    ),
    _scheme(
        "minimax_m3_vl minimax_m3_vl_text",
        _gate() + _fused() + _shared_fused("mlp.shared_experts", "gate_up_proj down_proj"),
        _gate("block_sparse_moe.gate.weight", bias="block_sparse_moe.e_score_correction_bias")
        + _MIXTRAL_V4
        + _shared("block_sparse_moe.shared_experts"),
    ),
    _scheme(
        "phimoe",
        _gate("mlp.router.weight", bias="") + _fused(),
        _gate("block_sparse_moe.gate.weight", bias="") + _MIXTRAL_V4,
    ),
    _scheme(
        "kimi_linear",
        _gate() + _fused() + _shared(),
        _gate("block_sparse_moe.gate.weight", bias="block_sparse_moe.gate.e_score_correction_bias")
        + _MIXTRAL_V4
        + _shared("block_sparse_moe.shared_experts"),
    ),
    _scheme(
        "jamba",
        _gate("feed_forward.router.weight", bias="") + _fused("feed_forward.experts."),
        _gate("feed_forward.router.weight", bias="") + _split("feed_forward.experts"),
    ),
    _scheme(
        "lfm2_moe",
        _gate("feed_forward.gate.weight", bias="feed_forward.expert_bias") + _fused("feed_forward.experts."),
        _gate("feed_forward.gate.weight", bias="feed_forward.expert_bias") + _split("feed_forward.experts", _W132),
    ),
    _scheme("granitemoe granitemoeshared granitemoehybrid granitemoe_swa", *_GRANITE),
    _scheme(
        "dbrx",
        (
            Rule("ffn.router.layer.weight", "gate.weight"),
            Rule("ffn.experts.mlp.w1", "w13", part="gate", form="flat"),
            Rule("ffn.experts.mlp.v1", "w13", part="up", form="flat"),
            Rule("ffn.experts.mlp.w2", "w2", form="flat transposed"),
        ),
        layers="transformer.blocks.",
    ),
    _scheme(
        "gpt_oss",
        (
            *_OAI,
            Rule("mlp.experts.gate_up_proj", "w13", form="transposed interleaved"),
            Rule("mlp.experts.gate_up_proj_bias", "b13", form="interleaved"),
        ),
    ),
    _scheme(
        "openai_privacy_filter",
        (
            *_OAI,
            Rule("mlp.experts.gate_up_proj", "w13", form="transposed"),
            Rule("mlp.experts.gate_up_proj_bias", "b13"),
        ),
    ),
    _scheme(
        "llama4 llama4_text",
        _gate("feed_forward.router.weight", bias="")
        + _fused("feed_forward.experts.", form="transposed")
        + _shared("feed_forward.shared_expert"),
    ),
    _scheme(
        "aria aria_text",
        _gate("mlp.router.weight", bias="") + _fused(form="transposed") + _shared(),
        _gate("mlp.router.weight", bias="") + _fused(up="fc1.weight", down="fc2.weight", form="transposed") + _shared(),
    ),
    _scheme(
        "nemotron_h",
        (*_NEMOTRON, Rule("mixer.experts.up_proj", "w13"), Rule("mixer.experts.down_proj", "w2")),
        (
            *_NEMOTRON,
            Rule("mixer.experts.{e}.up_proj.weight", "w13"),
            Rule("mixer.experts.{e}.down_proj.weight", "w2"),
        ),
    ),
    _scheme(
        "dots3_note_vision_encoder",
        _MLP_BIAS + _fused(),
        _gate("mlp.gate_weight", bias="mlp.router_bias") + _split(names="fc1 fc3 fc2"),
        layers="blocks.",
    ),
    _scheme("gemma4 gemma4_text diffusion_gemma diffusion_gemma_text", _GEMMA),
    _scheme(
        "longcat_flash",
        (
            *_LONGCAT,
            Rule("mlp.experts.gate_up_proj", "w13", form="null"),
            Rule("mlp.experts.down_proj", "w2"),
        ),
        _LONGCAT + _split(),
    ),
    _scheme(
        "inkling_mm_model inkling_text",
        (
            *_INKLING,
            Rule("mlp.gate.e_score_correction_bias", "router.correction_bias"),
            *_fused(),
            Rule("mlp.shared_experts.gate_proj", _UP, part="gate", form="bank"),
            Rule("mlp.shared_experts.up_proj", _UP, part="up", form="bank"),
            Rule("mlp.shared_experts.down_proj", _DOWN, form="bank"),
        ),
        (
            *_INKLING,
            Rule("mlp.gate.bias", "router.correction_bias"),
            Rule("mlp.experts.w13_weight", "w13", form="interleaved"),
            Rule("mlp.experts.w2_weight", "w2"),
            Rule("mlp.shared_experts.shared_w13_weight", _UP, form="bank interleaved"),
            Rule("mlp.shared_experts.shared_w2_weight", _DOWN, form="bank"),
        ),
    ),
    _scheme(
        "inkling2 inkling2_text",
        _gate() + _fused(),
        _gate(bias="mlp.gate.bias") + _fused(up="w13_weight", down="w2_weight", form="interleaved"),
    ),
    _scheme(
        "jetmoe",
        (
            *_gate("mlp.router.layer.weight", bias=""),
            *_fused("mlp.", up="input_linear.weight", down="output_linear.weight"),
            Rule("mlp.bias", "out_bias"),
        ),
    ),
    _scheme("zaya", (Rule("mlp.gate.balancing_biases", "router.correction_bias"), *_fused(), *_ZAYA_ROUTER)),
    _scheme(
        "deepseek_v4",
        _gate() + _fused() + _shared() + _DEEPSEEK_V4,
        _gate("ffn.gate.weight", bias="ffn.gate.bias")
        + _split("ffn.experts", _W132)
        + _shared("ffn.shared_experts", _W132)
        + (Rule("ffn.gate.tid2eid", ""),),
    ),
    _scheme(
        "step3p5 step3p7",
        _gate() + _fused() + _shared(),
        (
            *_gate("moe.gate.weight", bias="moe.router_bias"),
            Rule("moe.gate_proj.weight", "w13", part="gate"),
            Rule("moe.up_proj.weight", "w13", part="up"),
            Rule("moe.down_proj.weight", "w2"),
            *_shared("share_expert"),
        ),
    ),
    _scheme(
        "mistral_large4 mistral_large4_text",
        _gate(bias="") + _fused() + _shared(),
        _gate("gate.weight", bias="") + _split("experts", _W132) + _shared("shared_experts"),
        mistral=_gate("gate.weight", bias="") + _split("experts", _W132) + _shared("shared_experts", _W132),
    ),
)

_BY_TYPE = {name: scheme for scheme in SCHEMES for name in scheme.types}


def scheme_of(model_type: str) -> Scheme:
    """The naming scheme of a model type; `MoEOptionError` lists the known ones."""
    if model_type not in _BY_TYPE:
        raise MoEOptionError.of(
            "checkpoint",
            expected=f"a model type with a naming scheme: {', '.join(sorted(_BY_TYPE))}",
            got=repr(model_type),
            hint="Name a model type whose tensors have the same names, or add a row to diffulex/checkpoint/schemes.py.",
        )
    return _BY_TYPE[model_type]
