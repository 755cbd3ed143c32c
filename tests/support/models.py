"""Stock transformers models, small, for every family the compiler is tested on: one table of configurations."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from diffulex.families.build import fill_weights


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model; attention heads are hidden / head_dim, so hidden must be a multiple of head_dim."""

    hidden: int = 64
    width: int = 32
    experts: int = 8
    top_k: int = 2
    layers: int = 2
    head_dim: int = 16
    vocab: int = 128
    positions: int = 1024


TINY = ModelSizes()
# Wide enough for tensor cores to matter, small enough to build in seconds.
WIDE = ModelSizes(hidden=1024, width=512, experts=32, top_k=4, layers=2, head_dim=64, vocab=512, positions=8192)


def _qwen3_moe(sizes: ModelSizes) -> dict[str, Any]:
    return {"num_experts": sizes.experts, "moe_intermediate_size": sizes.width, "norm_topk_prob": True}


def _mixtral(sizes: ModelSizes) -> dict[str, Any]:
    return {"num_local_experts": sizes.experts, "intermediate_size": sizes.width}


def _olmoe(sizes: ModelSizes) -> dict[str, Any]:
    return {"num_experts": sizes.experts, "intermediate_size": sizes.width, "norm_topk_prob": False}


def _deepseek_v3(sizes: ModelSizes) -> dict[str, Any]:
    rope = sizes.head_dim // 2
    return {
        "n_routed_experts": sizes.experts,
        "moe_intermediate_size": sizes.width,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 0,
        "num_key_value_heads": sizes.hidden // sizes.head_dim,
        "q_lora_rank": sizes.hidden // 2,
        "kv_lora_rank": sizes.hidden // 4,
        "qk_nope_head_dim": sizes.head_dim,
        "qk_rope_head_dim": rope,
        "head_dim": rope,
        "v_head_dim": sizes.head_dim,
    }


def _gpt_oss(sizes: ModelSizes) -> dict[str, Any]:
    return {
        "num_local_experts": sizes.experts,
        "intermediate_size": sizes.width,
        "sliding_window": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


_OPTIONS = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}
FAMILIES = tuple(_OPTIONS)


def family_config(family: str, sizes: ModelSizes = TINY, **options: Any) -> tuple[Any, type[nn.Module]]:
    """Configuration and causal-LM class of a family (`transformers`' name of it); `options` override its fields."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    common = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.hidden // sizes.head_dim,
        "num_key_value_heads": max(1, sizes.hidden // sizes.head_dim // 2),
        "head_dim": sizes.head_dim,
        "num_experts_per_tok": sizes.top_k,
        "max_position_embeddings": sizes.positions,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = AutoConfig.for_model(family, **{**common, **_OPTIONS[family](sizes), **options})
    return config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def build_model(
    family: str,
    sizes: ModelSizes = TINY,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    experts: str | None = None,
    **options: Any,
) -> Any:
    """A model of the family in eval mode with seeded weights; `experts` is transformers' experts_implementation."""
    config, model_class = family_config(family, sizes, **options)
    chosen = {} if experts is None else {"experts_implementation": experts}
    model = model_class._from_config(config, dtype=dtype, **chosen)  # type: ignore[attr-defined]
    fill_weights(model, seed=seed)
    return model.to(device).eval()


def token_ids(model: Any, *shape: int, seed: int = 0) -> Tensor:
    """Seeded token ids [batch, length] int64, on the model's device, without the padding token 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, shape, generator=generator).to(model.device)
