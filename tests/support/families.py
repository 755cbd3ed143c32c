"""Every MoE family of transformers as a model on the meta device, and what its modules say about its experts.

`found_blocks` looks at modules and parameters alone, never at the config: it is the oracle of `diffulex.moe.config`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from typing import Any

import torch
from torch import nn

DEPTH = 6
_TYPES = ["dense", "sparse", "dense", "sparse", "sparse", "dense"]
_FIRST_K: dict[str, Any] = {"first_k_dense_replace": 4}
_MLP_TYPES: dict[str, Any] = {"mlp_layer_types": _TYPES}
_QWEN: dict[str, Any] = {"mlp_only_layers": [1], "decoder_sparse_step": 2}


@dataclasses.dataclass(frozen=True)
class FamilyCase:
    """A family: its folder in transformers, the options without which it cannot be built, and placements to try."""

    model_type: str
    folder: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    placements: tuple[dict[str, Any], ...] = ()
    model_class: str = ""

    @property
    def module(self) -> str:
        return self.folder or self.model_type.removesuffix("_text").replace("-", "_")


def _case(
    model_type: str, *placements: dict[str, Any], folder: str = "", model: str = "", **options: Any
) -> FamilyCase:
    return FamilyCase(model_type, folder, options, placements, model)


_GEMMA = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}

FAMILY_CASES = [
    _case("afmoe", {"num_dense_layers": 3}),
    _case("aria_text"),
    _case("axk1", _FIRST_K),
    _case("axk2", _FIRST_K, _MLP_TYPES),
    _case("cohere2_moe", _FIRST_K, _MLP_TYPES, {"num_shared_experts": 2}),
    _case("dbrx", attn_config={"rope_theta": 1e4}),
    _case("deepseek_ocr2_text", {"mlp_layer_types": ["sparse"] * DEPTH}, num_experts_per_tok=6, **_MLP_TYPES),
    _case("deepseek_v2", _FIRST_K, {"moe_layer_freq": 2}, num_experts_per_tok=6),
    _case("deepseek_v3", _FIRST_K, {"moe_layer_freq": 2}),
    _case("deepseek_v32", _FIRST_K, _MLP_TYPES),
    _case("deepseek_v4", {"mlp_layer_types": ["moe", "hash_moe"] * 3}),
    _case("diffusion_gemma_text", **_GEMMA),
    _case("doge", {"is_moe": False}, is_moe=True),
    _case("dots1", _FIRST_K, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=2),
    _case("ernie4_5_moe", {"moe_layer_interval": 2, "moe_layer_end_index": 4}, {"moe_layer_end_index": -1}),
    _case("ernie4_5_vl_moe_text", _MLP_TYPES),
    _case("exaone_moe", _FIRST_K, _MLP_TYPES),
    _case("flex_olmo"),
    _case("gemma4_text", {"enable_moe_block": False}, enable_moe_block=True, **_GEMMA),
    _case("glm4_moe", _FIRST_K),
    _case("glm4_moe_lite", {"first_k_dense_replace": 3}, _MLP_TYPES),
    _case("glm4v_moe_text", _FIRST_K),
    _case("glm5_next_text", _MLP_TYPES),
    _case("glm_moe_dsa", _FIRST_K, _MLP_TYPES),
    _case("gpt_oss"),
    _case("granitemoe"),
    _case("granitemoe_swa", {"shared_intermediate_size": 128}),
    _case("granitemoeshared", {"shared_intermediate_size": 128}),
    _case("granitemoehybrid", {"num_local_experts": 0}),
    _case("hunyuan_v1_moe", {"num_experts": 1, "moe_topk": 1}, num_experts=4, moe_topk=2, head_dim=128),
    _case("hy_v3", {"first_k_dense_replace": 3}, _MLP_TYPES),
    _case("hy_v4", _MLP_TYPES),
    _case("inkling_text", _MLP_TYPES, {"dense_mlp_idx": 3}),
    _case("jamba", {"expert_layer_period": 3, "expert_layer_offset": 2}, {"num_experts": 1}),
    _case("jetmoe"),
    _case("kimi_linear", _FIRST_K, _MLP_TYPES),
    _case("laguna", _MLP_TYPES),
    _case("lfm2_moe", {"num_dense_layers": 4}, layer_types=["full_attention", "conv"] * 3),
    _case("llama4_text", {"interleave_moe_layer_step": 2}, {"moe_layers": [1, 4]}),
    _case("longcat_flash", num_layers=3, num_hidden_layers=6),
    _case("mellum", _MLP_TYPES),
    _case("mimo_v2_flash", _MLP_TYPES),
    _case("minimax"),
    _case("minimax_m2"),
    _case("minimax_m3_vl_text", _MLP_TYPES, {"moe_layer_freq": [0, 1, 1, 0, 1, 1]}),
    _case("mistral4", _FIRST_K),
    _case("mixtral"),
    _case(
        "nemotron_h",
        {"layers_block_type": ["moe", "linear_attention", "full_attention", "moe", "mlp", "mlp"]},
        {"moe_latent_size": 256},
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "moe", "moe"],
    ),
    _case(
        "nllb-moe",
        {"encoder_sparse_step": 2, "decoder_sparse_step": 3, "decoder_ffn_dim": 512},
        {"encoder_sparse_step": 0, "decoder_sparse_step": 1},
        encoder_layers=DEPTH,
        decoder_layers=DEPTH,
        num_experts=4,
    ),
    _case("olmoe"),
    _case("openai_privacy_filter"),
    _case("phimoe"),
    _case("qwen2_moe", _QWEN, {"decoder_sparse_step": 3}),
    _case("qwen3_5_moe_text", _QWEN),
    _case("qwen3_moe", _QWEN, {"num_experts": 16}),
    _case("qwen3_next", _QWEN),
    _case("qwen3_omni_moe_text", _QWEN, folder="qwen3_omni_moe", model="Qwen3OmniMoeThinkerTextModel"),
    _case(
        "qwen3_omni_moe_talker_text",
        _QWEN,
        folder="qwen3_omni_moe",
        model="Qwen3OmniMoeTalkerModel",
        shared_expert_intermediate_size=96,
    ),
    _case("qwen3_vl_moe_text", _QWEN),
    _case("qwen4_exp_text", _QWEN, layer_types=["linear_attention"] * DEPTH),
    _case("solar_open", {"first_k_dense_replace": 2}),
    _case("step3p5", {"moe_layers_enum": "1,4"}, _MLP_TYPES, folder="step3p7"),
    _case(
        "switch_transformers",
        {"num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 0},
        num_layers=DEPTH,
        num_decoder_layers=DEPTH,
        num_sparse_encoder_layers=3,
        num_sparse_decoder_layers=2,
        num_experts=4,
    ),
    _case("vitpose_backbone", {"num_experts": 1}, num_experts=3, model="VitPoseBackbone"),
    _case("zaya"),
]
# In transformers since 5.17; their absence is no failure.
NEWER_CASES = [
    _case("bailing_hybrid", _FIRST_K, _MLP_TYPES),
    _case("dots3_note_text", _MLP_TYPES),
    _case("flint", _QWEN),
    _case("inkling2_text"),
    _case("kolibri1"),
    _case("mistral_large4_text", _FIRST_K, _MLP_TYPES),
    _case("muse_spark_text", _MLP_TYPES),
    _case("unlimited_ocr_text", _MLP_TYPES),
]


def family_module(case: FamilyCase, kind: str) -> Any:
    """The module `configuration_x` or `modeling_x` of the family."""
    return importlib.import_module(f"transformers.models.{case.module}.{kind}_{case.module}")


def is_installed(case: FamilyCase) -> bool:
    """Whether the installed transformers has the family."""
    return importlib.util.find_spec(f"transformers.models.{case.module}") is not None


def config_class(case: FamilyCase) -> type:
    """The configuration class whose model_type is the family's."""
    found = [
        kind
        for kind in vars(family_module(case, "configuration")).values()
        if inspect.isclass(kind) and getattr(kind, "model_type", None) == case.model_type
    ]
    return found[0]


def build_config(case: FamilyCase, **placement: Any) -> Any:
    """Configuration of `DEPTH` layers with the options of the case and a placement."""
    depth = {} if any(name.endswith("_layers") for name in case.options) else {"num_hidden_layers": DEPTH}
    return config_class(case)(**{**depth, **case.options, **placement})


def build_meta_model(case: FamilyCase, config: Any) -> nn.Module:
    """The bare model of the family on the meta device."""
    module = family_module(case, "modeling")
    if case.model_class:
        kind = getattr(module, case.model_class)
    else:
        kinds = [
            kind
            for name, kind in vars(module).items()
            if getattr(kind, "config_class", None) is type(config)
            and name.endswith("Model")
            and "PreTrained" not in name
        ]
        kind = kinds[0]
    with torch.device("meta"):
        return kind(config)


@dataclasses.dataclass(frozen=True)
class Block:
    """A MoE block as its modules show it; None: the modules do not show it."""

    num_experts: int
    width: int
    transposed: bool = False
    top_k: int | None = None
    shared_width: int = 0
    shared_gate: str = "none"


def found_blocks(model: nn.Module, side: str = "") -> dict[int, Block]:
    """Layer index -> MoE block, of the layers whose path starts with `side`."""
    layers: dict[int, dict[str, nn.Module]] = {}
    for path, module in model.named_modules():
        parts = path.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if index is not None and path.startswith(side):
            layers.setdefault(int(parts[index]), {})[".".join(parts[index + 1 :])] = module
    found = {index: _block(modules) for index, modules in layers.items()}
    return {index: block for index, block in found.items() if block is not None}


def _block(modules: dict[str, nn.Module]) -> Block | None:
    inner = {path: module for path, module in modules.items() if "attn" not in path and "attention" not in path}
    banks = [bank for path, module in inner.items() if "shared" not in path and (bank := _bank(path, module))]
    if not banks:
        return None
    top_ks = {
        module.top_k
        for module in inner.values()
        if isinstance(getattr(module, "top_k", None), int)
        and (hasattr(module, "num_experts") or hasattr(module, "experts"))
    }
    assert len(top_ks) < 2, top_ks
    shared = sum(_shared_width(path, module) for path, module in inner.items())
    names = {path.rpartition(".")[2] for path in inner}
    gate = "sigmoid" if "shared_expert_gate" in names else "router" if _has_bank(inner, "shared_experts") else "none"
    return dataclasses.replace(
        banks[0], top_k=top_ks.pop() if top_ks else None, shared_width=shared, shared_gate=gate if shared else "none"
    )


def _parameter(module: nn.Module, name: str, dim: int) -> torch.Tensor | None:
    value = module._parameters.get(name)
    return value if value is not None and value.dim() == dim else None


def _sizes(up: torch.Tensor | None, down: torch.Tensor) -> Block:
    """The block of weights [E, J, H] and [E, H, I], or of both transposed."""
    assert up is not None
    factor = up[0].numel() // down[0].numel()
    straight = (up.shape[1], up.shape[2]) == (factor * down.shape[2], down.shape[1])
    return Block(down.shape[0], down.shape[2] if straight else down.shape[1], not straight)


def _bank(path: str, module: nn.Module) -> Block | None:
    """A bank of experts in any of the forms transformers has."""
    down = _parameter(module, "down_proj", 3)
    if down is not None:
        up = _parameter(module, "gate_up_proj", 3)
        return _sizes(_parameter(module, "up_proj", 3) if up is None else up, down)
    for names in (("input_linear", "output_linear"), ("fc1", "fc2")):  # JetMoe, Aria before transformers 5.23
        parts = [getattr(getattr(module, name, None), "weight", None) for name in names]
        if all(part is not None and part.dim() == 3 for part in parts):
            return _sizes(*parts)
    flat = _parameter(module, "w1", 2)
    if flat is not None and hasattr(module, "moe_num_experts"):  # DBRX
        return Block(module.moe_num_experts, flat.shape[0] // module.moe_num_experts)
    if isinstance(getattr(module, "down_embed", None), nn.Embedding):  # Doge
        return Block(module.down_embed.num_embeddings, 1)
    if path.endswith("experts") and isinstance(module, nn.ModuleList | nn.ModuleDict):
        first_linear = [m for child in module.children() for m in list(child.modules())[:2] if isinstance(m, nn.Linear)]
        return Block(len(first_linear), first_linear[0].out_features)
    return None


def _has_bank(modules: dict[str, nn.Module], name: str) -> bool:
    return any(
        path.endswith(name) and _parameter(module, "down_proj", 3) is not None for path, module in modules.items()
    )


def _shared_width(path: str, module: nn.Module) -> int:
    """Width of the MLP every token passes through, where `module` is it."""
    if isinstance(getattr(module, "down_embed", None), nn.Embedding):
        return module.down_proj.in_features
    if "shar" not in path.rpartition(".")[2]:
        return 0
    bank = _parameter(module, "down_proj", 3)
    if bank is not None:
        return bank.shape[0] * bank.shape[2]
    down = getattr(module, "down_proj", None) or getattr(module, "output_linear", None)
    return down.in_features if isinstance(down, nn.Linear) else 0


@functools.cache
def installed_cases() -> tuple[FamilyCase, ...]:
    """All families of the installed transformers."""
    return tuple(case for case in [*FAMILY_CASES, *NEWER_CASES] if is_installed(case))
