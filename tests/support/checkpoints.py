"""Tiny transformers models of many families, and what the parameters of their MoE blocks have to be.

`block_truth` reads the modules of the model and never a checkpoint or a naming scheme: it is the oracle of
`diffulex.checkpoint`.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffulex.checkpoint import Block
from tests.support.models import fill_weights

HIDDEN, WIDTH, EXPERTS = 16, 12, 6
_COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
_SHARED = {
    "shared_experts.gate_up_proj.weight": ("gate_proj.weight", "up_proj.weight"),
    "shared_experts.down_proj.weight": ("down_proj.weight",),
}


@dataclasses.dataclass(frozen=True)
class CheckpointCase:
    """A family small enough to be saved many times.

    options  of its config, beside the common sizes
    paths    parameter of a block -> path under the layer's module; several are stacked in dimension 0
    shared   path of the shared MLP under the layer's module
    mend     parameter -> what makes the module's tensor the block's
    model_class  where transformers has no causal language model for the config
    wrapper  model type whose conversion makes the names of its checkpoints
    """

    family: str
    options: dict[str, Any]
    paths: dict[str, str | tuple[str, ...]]
    shared: str = ""
    mend: dict[str, Callable[[Tensor], Tensor]] = dataclasses.field(default_factory=dict)
    interleaved: bool = False
    num_shared: int = 1
    layers: str = "model.layers"
    wrapper: str = ""
    model_class: str = ""

    @property
    def all_paths(self) -> dict[str, tuple[str, ...]]:
        """`paths`, those of the shared MLP among them."""
        shared = {name: tuple(f"{self.shared}.{p}" for p in parts) for name, parts in _SHARED.items()}
        plain = {name: (path,) if isinstance(path, str) else path for name, path in self.paths.items()}
        return plain | (shared if self.shared else {})


def _experts(at: str, gate: str, bias: str = "", **others: str | tuple[str, ...]) -> dict[str, str | tuple[str, ...]]:
    paths: dict[str, str | tuple[str, ...]] = {
        "gate.weight": gate,
        "w13": f"{at}.gate_up_proj",
        "w2": f"{at}.down_proj",
    }
    return paths | ({"router.correction_bias": bias} if bias else {}) | others


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)


def _dbrx(tensor: Tensor) -> Tensor:
    """w1 over v1, each [E * I, H], as [E, 2I, H]."""
    w1, v1 = tensor.view(2, EXPERTS, WIDTH, HIDDEN)
    return torch.cat([w1, v1], dim=1)


_BIAS = "mlp.gate.e_score_correction_bias"
_MLP = _experts("mlp.experts", "mlp.gate.weight")
_MLP_BIAS = _experts("mlp.experts", "mlp.gate.weight", _BIAS)
_E, _N, _L = {"num_experts": EXPERTS}, {"n_routed_experts": EXPERTS}, {"num_local_experts": EXPERTS}
_T = {"w13": _transposed, "w2": _transposed}
_OAI = {"gate.bias": "mlp.router.bias", "b13": "mlp.experts.gate_up_proj_bias", "b2": "mlp.experts.down_proj_bias"}
_SPARSE = {"mlp_layer_types": ["sparse"] * 2}
_GROUPS = {"n_group": 2, "topk_group": 1}

CASES = [
    CheckpointCase("mixtral", _L, _MLP),
    CheckpointCase("qwen3_moe", _E, _MLP),
    CheckpointCase(
        "qwen2_moe",
        _E | {"shared_expert_intermediate_size": 8},
        _MLP | {"shared_experts.gate.weight": "mlp.shared_expert_gate.weight"},
        shared="mlp.shared_expert",
    ),
    CheckpointCase(
        "deepseek_v3",
        _N | _MLA | _GROUPS | {"n_shared_experts": 2, "first_k_dense_replace": 0},
        _MLP_BIAS,
        shared="mlp.shared_experts",
    ),
    CheckpointCase("gpt_oss", _L, _experts("mlp.experts", "mlp.router.weight", **_OAI), mend=_T, interleaved=True),
    CheckpointCase("olmoe", _E, _MLP),
    CheckpointCase("granitemoe", _L, _experts("block_sparse_moe.experts", "block_sparse_moe.router.weight")),
    CheckpointCase(
        "granitemoeshared",
        _L | {"shared_intermediate_size": 8},
        _experts("block_sparse_moe.experts", "block_sparse_moe.router.weight")
        | {
            "shared_experts.gate_up_proj.weight": "shared_mlp.input_linear.weight",
            "shared_experts.down_proj.weight": "shared_mlp.output_linear.weight",
        },
    ),
    CheckpointCase(
        "dbrx",
        {
            "d_model": HIDDEN,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": 2, "hidden_size": HIDDEN},
        },
        {
            "gate.weight": "ffn.router.layer.weight",
            "w13": ("ffn.experts.mlp.w1", "ffn.experts.mlp.v1"),
            "w2": "ffn.experts.mlp.w2",
        },
        mend={"w13": _dbrx, "w2": lambda t: t.view(EXPERTS, WIDTH, HIDDEN).transpose(1, 2)},
        layers="transformer.blocks",
    ),
    CheckpointCase(
        "llama4_text",
        _L | {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 20},
        _experts("feed_forward.experts", "feed_forward.router.weight"),
        shared="feed_forward.shared_expert",
        mend=_T,
    ),
    CheckpointCase(
        "jamba",
        _E | {"expert_layer_period": 1, "expert_layer_offset": 0, "use_mamba_kernels": False, "mamba_d_state": 4},
        _experts("feed_forward.experts", "feed_forward.router.weight"),
    ),
    CheckpointCase("phimoe", _L, _experts("mlp.experts", "mlp.router.weight")),
    CheckpointCase("minimax_m2", _L, _experts("mlp.experts", "mlp.gate.weight", "mlp.e_score_correction_bias")),
    CheckpointCase(
        "ernie4_5_moe",
        {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 2, "moe_layer_start_index": 0},
        _experts("mlp.experts", "mlp.gate.weight", "mlp.gate.moe_statics.e_score_correction_bias"),
        shared="mlp.shared_experts",
        mend={"router.correction_bias": lambda t: t[0]},
    ),
    CheckpointCase(
        "hunyuan_v1_moe",
        _E | {"moe_topk": 2},
        _experts("mlp.experts", "mlp.gate.wg.weight"),
        shared="mlp.shared_mlp",
    ),
    CheckpointCase(
        "afmoe",
        _E | {"num_dense_layers": 0, "num_shared_experts": 1},
        _experts("mlp.experts", "mlp.router.gate.weight", "mlp.expert_bias"),
        shared="mlp.shared_experts",
    ),
    CheckpointCase(
        "lfm2_moe",
        _E | {"num_dense_layers": 0, "layer_types": ["full_attention", "conv"]},
        _experts("feed_forward.experts", "feed_forward.gate.weight", "feed_forward.expert_bias"),
    ),
    CheckpointCase(
        "nemotron_h",
        _N
        | _GROUPS
        | {"layers_block_type": ["moe", "moe"], "moe_latent_size": 10, "moe_shared_expert_intermediate_size": 8},
        {
            "gate.weight": "mixer.gate.weight",
            "router.correction_bias": "mixer.gate.e_score_correction_bias",
            "w13": "mixer.experts.up_proj",
            "w2": "mixer.experts.down_proj",
            "latent_in.weight": "mixer.fc1_latent_proj.weight",
            "latent_out.weight": "mixer.fc2_latent_proj.weight",
            "shared_experts.gate_up_proj.weight": "mixer.shared_experts.up_proj.weight",
            "shared_experts.down_proj.weight": "mixer.shared_experts.down_proj.weight",
        },
    ),
    CheckpointCase(
        "gemma4_text",
        _E | {"enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0},
        _experts("experts", "router.proj.weight")
        | {"gate.input_scale": "router.scale", "router.per_expert_scale": "router.per_expert_scale"},
    ),
    CheckpointCase(
        "laguna",
        _E | _SPARSE | {"shared_expert_intermediate_size": 8, "num_attention_heads_per_layer": [2, 2]},
        _MLP_BIAS,
        shared="mlp.shared_experts",
    ),
    CheckpointCase(
        "hy_v3",
        _E | _SPARSE | {"num_shared_experts": 2},
        _experts("mlp.experts", "mlp.gate.weight", "mlp.e_score_correction_bias"),
        shared="mlp.shared_experts",
    ),
    CheckpointCase("exaone_moe", _E | _SPARSE | _GROUPS, _MLP_BIAS, shared="mlp.shared_experts"),
    CheckpointCase("kimi_linear", _E | _SPARSE | _MLA, _MLP_BIAS, shared="mlp.shared_experts"),
    CheckpointCase("glm4_moe", _N | _GROUPS | {"first_k_dense_replace": 0}, _MLP_BIAS, shared="mlp.shared_experts"),
    CheckpointCase("deepseek_v4", _N | {"mlp_layer_types": ["moe"] * 2}, _MLP_BIAS, shared="mlp.shared_experts"),
    CheckpointCase(
        "step3p5",
        _N | _SPARSE | {"share_expert_dim": 8, "layer_types": ["full_attention"] * 2},
        _MLP_BIAS,
        shared="mlp.shared_experts",
        wrapper="step3p7",
        model_class="Step3p7TextModel",
        layers="layers",
    ),
    CheckpointCase(
        "minimax_m3_vl_text",
        _L | _SPARSE | {"shared_intermediate_size": 8},
        _MLP_BIAS
        | {
            "shared_experts.gate_up_proj.weight": "mlp.shared_experts.gate_up_proj.weight",
            "shared_experts.down_proj.weight": "mlp.shared_experts.down_proj.weight",
        },
        wrapper="minimax_m3_vl",
    ),
    CheckpointCase(
        "inkling_text",
        _N | _SPARSE | {"n_shared_experts": 2, "shared_expert_sink": True},
        _MLP_BIAS
        | {
            "router.global_scale": "mlp.gate.global_scale",
            "shared_experts.gate_up_proj.weight": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
            "shared_experts.down_proj.weight": "mlp.shared_experts.down_proj",
        },
        mend={
            "shared_experts.gate_up_proj.weight": lambda t: t.flatten(0, 1),
            "shared_experts.down_proj.weight": lambda t: torch.cat([*t], dim=1),
        },
        wrapper="inkling_mm_model",
        num_shared=2,
        model_class="InklingTextModel",
        layers="layers",
    ),
]
BY_FAMILY = {case.family: case for case in CASES}


def tiny_model(case: CheckpointCase, *, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A language model of the family with seeded weights."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    config = AutoConfig.for_model(case.family, **(case.options if case.family == "dbrx" else _COMMON | case.options))
    if case.model_class:
        kind = getattr(
            importlib.import_module(type(config).__module__.replace("configuration", "modeling")), case.model_class
        )
    else:
        kinds: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        kind = kinds[0] if isinstance(kinds, tuple | list) else kinds
    model = kind._from_config(config, dtype=dtype)
    if case.wrapper:
        model._weight_conversions = get_checkpoint_conversion_mapping(case.wrapper)
    fill_weights(model)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if re.search(r"bias", name):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model


def block_truth(case: CheckpointCase, model: nn.Module) -> dict[int, dict[str, Tensor]]:
    """Layer -> parameter of its MoE block -> value, read off the model's modules."""
    layers = model.get_submodule(case.layers)
    tensors = [dict(layer.state_dict()) for layer in layers.children()]
    return {
        index: {
            name: case.mend.get(name, lambda t: t)(torch.cat([state[path] for path in paths])).clone()
            for name, paths in case.all_paths.items()
        }
        for index, state in enumerate(tensors)
    }


def empty_blocks(case: CheckpointCase, truth: dict[int, dict[str, Tensor]], **options: Any) -> dict[int, Block]:
    """Blocks of the same sizes, filled with a number that no weight has."""
    return {
        layer: Block(
            {name: torch.full_like(value, 77.0).contiguous() for name, value in params.items()},
            interleaved=case.interleaved,
            num_shared=case.num_shared,
            **options,
        )
        for layer, params in truth.items()
    }


def assert_same(blocks: dict[int, Block], truth: dict[int, dict[str, Tensor]]) -> None:
    """Bitwise equality of every parameter."""
    for layer, block in blocks.items():
        for name, value in truth[layer].items():
            found = block.params[name]
            assert found.dtype == value.dtype and torch.equal(found, value), (layer, name)


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, as the safetensors library reads them."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
