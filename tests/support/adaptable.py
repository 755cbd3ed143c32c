"""Tiny models of families whose experts are outside transformers' interface, and blocks as remote code writes them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .models import fill_weights

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SWITCH = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
_LONGCAT = {
    "num_layers": 2,
    "num_hidden_layers": 4,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 8,
    "moe_topk": 3,
    "n_routed_experts": 6,
    "zero_expert_num": 2,
}
_NLLB = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_experts": 4,
    "expert_capacity": 16,
    "max_position_embeddings": 64,
}
# family: class of the model, class of its configuration, options
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "aria": ("AriaTextForCausalLM", "AriaTextConfig", {**_COMMON, "moe_num_experts": 6, "moe_topk": 2, "head_dim": 8}),
    "dbrx": (
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "vocab_size": 96,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2, "hidden_size": 32},
            "pad_token_id": 0,
        },
    ),
    "jetmoe": (
        "JetMoeForCausalLM",
        "JetMoeConfig",
        {**_COMMON, "num_local_experts": 6, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **_COMMON,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 1,
            "attn_temperature_tuning": False,
            "no_rope_layers": [1, 1],
        },
    ),
    "longcat_flash": ("LongcatFlashForCausalLM", "LongcatFlashConfig", {**_COMMON, **_LONGCAT}),
    "step3p7": (
        "Step3p7TextModel",
        "Step3p7TextConfig",
        {
            **_COMMON,
            "num_attention_groups": 2,
            "head_dim": 8,
            "moe_num_experts": 6,
            "moe_top_k": 2,
            "moe_intermediate_size": 24,
            "share_expert_dim": 24,
            "mlp_layer_types": ["sparse", "sparse"],
            "layer_types": ["full_attention"] * 2,
            "sliding_window": 64,
            "swiglu_limits": [0.0, 0.5],
            "swiglu_limits_shared": [0.0, 0.5],
        },
    ),
    "switch_transformers": (
        "SwitchTransformersEncoderModel",
        "SwitchTransformersConfig",
        {
            **_SWITCH,
            "vocab_size": 96,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_heads": 4,
            "num_experts": 6,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        },
    ),
    "doge": ("DogeForCausalLM", "DogeConfig", {**_COMMON, "is_moe": True, "num_experts": 16, "num_experts_per_tok": 4}),
    "nllb_moe": ("NllbMoeModel", "NllbMoeConfig", _NLLB),
    "vitpose_backbone": (
        "VitPoseBackbone",
        "VitPoseBackboneConfig",
        {
            "image_size": [32, 32],
            "patch_size": [16, 16],
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_experts": 3,
            "part_features": 8,
        },
    ),
}


def build_adaptable(family: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of the family in eval mode with seeded weights."""
    model_name, config_name, options = FAMILIES[family]
    config = getattr(importlib.import_module(f"transformers.models.{family}.configuration_{family}"), config_name)
    kind = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), model_name)
    model = kind._from_config(config(**options), dtype=dtype)
    fill_weights(model)
    return model.eval()


def inputs_of(model: Any, *, seed: int = 0, length: int = 9) -> dict[str, Any]:
    """Token ids [2, length], or an image for a model that reads images."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(1, 3, 32, 32, generator=generator)
        return {"pixel_values": pixels, "dataset_index": torch.tensor([1])}
    ids = torch.randint(1, 96, (2, length), generator=generator)
    if type(model).__name__ == "NllbMoeModel":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1), "use_cache": False}
    return {"input_ids": ids} if "Encoder" in type(model).__name__ else {"input_ids": ids, "use_cache": False}


def output_of(run: Any, inputs: dict[str, Any]) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    out = run(**inputs)
    if hasattr(out, "feature_maps"):
        return out.feature_maps[-1]
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


class Mlp(nn.Module):
    """A gated expert of three Linears."""

    def __init__(self, hidden: int = 32, width: int = 24, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, width, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


def run_loop(experts: Any, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The loop that remote code writes over its experts."""
    out_TH = torch.zeros_like(hidden_TH)
    for number, expert in enumerate(experts):
        token, slot = torch.where(ids_TK == number)
        out_TH.index_add_(0, token, (expert(hidden_TH[token]) * weights_TK[token, slot, None]).to(out_TH.dtype))
    return out_TH


class LoopBlock(nn.Module):
    """A block of remote code as the line of Mixtral has it: a Linear routes, logits are returned."""

    def __init__(self, *, renorm: bool = True, pair: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.top_k, self.renorm, self.pair = 2, renorm, pair
        self.gate = nn.Linear(32, 6, bias=False)
        self.experts = nn.ModuleList(Mlp(bias=bias) for _ in range(6))

    def forward(self, hidden_states: Tensor) -> Any:
        hidden_TH = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.gate(hidden_TH)
        weights, ids = logits.softmax(1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.renorm:
            weights = weights / weights.sum(-1, keepdim=True)
        out = run_loop(self.experts, hidden_TH, ids, weights.to(hidden_TH.dtype)).view(hidden_states.shape)
        return (out, logits) if self.pair else out


class SigmoidGate(nn.Module):
    """A router of remote code that returns ids, weights and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 32) / 6)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden_states.view(-1, 32).float() @ self.weight.float().T
        weights, ids = logits.sigmoid().topk(2, dim=-1)
        return ids, weights / weights.sum(-1, keepdim=True), logits


class SharedLoopBlock(nn.Module):
    """A block of remote code as the line of DeepSeek-V3 has it: a router module, shared experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = SigmoidGate()
        self.experts = nn.ModuleList(Mlp() for _ in range(6))
        self.shared_experts = Mlp(width=40)

    def forward(self, hidden_states: Tensor) -> Tensor:
        ids, weights, _ = self.gate(hidden_states)
        out = run_loop(self.experts, hidden_states.view(-1, 32), ids, weights.to(hidden_states.dtype))
        return out.view(hidden_states.shape) + self.shared_experts(hidden_states)


class ListedExperts(nn.ModuleList):
    """Experts with a loop of their own, called with ids and weights."""

    def __init__(self) -> None:
        super().__init__(Mlp(bias=True) for _ in range(6))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return run_loop(self, hidden_states, top_k_index, top_k_weights)


class PackedExperts(nn.Module):
    """A copy of transformers' experts without its decorator: weights first, gate behind up where `swapped`."""

    def __init__(self, *, swapped: bool = False, transposed: bool = False) -> None:
        super().__init__()
        self.swapped, self.transposed, self.act_fn = swapped, transposed, nn.GELU()
        up, down = torch.randn(6, 48, 32) / 6, torch.randn(6, 32, 24) / 5
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(weight.transpose(1, 2).contiguous() if transposed else weight) for weight in (up, down)
        )

    def forward(self, hidden_states: Tensor, routing_weights: Tensor, selected: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(6):
            token, slot = torch.where(selected == expert)
            w13, w2 = self.gate_up_proj[expert], self.down_proj[expert]
            w13, w2 = (w13, w2) if self.transposed else (w13.T, w2.T)
            gate, up = (hidden_states[token] @ w13).chunk(2, dim=-1)
            act = self.act_fn(up) * gate if self.swapped else self.act_fn(gate) * up
            out.index_add_(0, token, (act @ w2) * routing_weights[token, slot, None])
        return out
