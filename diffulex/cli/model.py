"""The demo's model: a Qwen3-MoE causal LM of transformers' own classes, written to disk and read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import text


@dataclasses.dataclass(frozen=True)
class Preset:
    """Shapes of a model and how to train it.

    layers: when --layers is not given. width: of one expert. init: standard deviation of the first weights (small
    models need larger ones). rows, length: a training batch. compared: tokens that float32 errors are averaged over.
    """

    layers: int
    hidden: int
    experts: int
    top_k: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    init: float
    learning_rate: float
    rows: int
    length: int
    compared: int


PRESETS = {
    "tiny": Preset(
        layers=2,
        hidden=128,
        experts=8,
        top_k=2,
        width=64,
        heads=4,
        kv_heads=2,
        head_dim=32,
        init=0.1,
        learning_rate=3e-3,
        rows=4,
        length=64,
        compared=128,
    ),
    "qwen3-30b-a3b": Preset(
        layers=1,
        hidden=2048,
        experts=128,
        top_k=8,
        width=768,
        heads=32,
        kv_heads=4,
        head_dim=128,
        init=0.02,
        learning_rate=5e-4,
        rows=8,
        length=128,
        compared=32,
    ),
}


def build_config(preset: Preset, layers: int) -> Any:
    """transformers' Qwen3MoeConfig of a preset, with the byte vocabulary."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=text.VOCAB_SIZE,
        hidden_size=preset.hidden,
        intermediate_size=2 * preset.hidden,
        num_hidden_layers=layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        head_dim=preset.head_dim,
        num_experts=preset.experts,
        num_experts_per_tok=preset.top_k,
        moe_intermediate_size=preset.width,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        initializer_range=preset.init,
        max_position_embeddings=8192,
        pad_token_id=text.PAD,
        bos_token_id=text.BOS,
        eos_token_id=text.EOS,
        use_cache=False,
    )


def build_model(config: Any, *, seed: int, device: torch.device) -> Any:
    """A Qwen3MoeForCausalLM in float32 with transformers' own initialisation."""
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    with device:
        return Qwen3MoeForCausalLM(config)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model read back from disk: size of its safetensors files, number of tensors, names of those that differ."""

    model: Any
    bytes: int
    tensors: int
    different: tuple[str, ...]


def save_and_load(model: Any, folder: Path) -> Loaded:
    """Write `model` with save_pretrained, read it back with from_pretrained, and compare every tensor bit by bit."""
    model.save_pretrained(folder)
    device = next(model.parameters()).device
    loaded = type(model).from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    before, after = model.state_dict(), loaded.state_dict()
    different = tuple(
        name
        for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or not torch.equal(before[name], after[name])
    )
    return Loaded(loaded, written, len(before), different)


def quiet_transformers() -> None:
    """Silence transformers' bars for saving and loading; warnings stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def moe_block_name(model: nn.Module) -> str:
    """The name of the first block with experts."""
    from ..explanation import find_experts

    return next(iter(find_experts(model))).rpartition(".")[0]


def moe_block(model: nn.Module) -> nn.Module:
    """The first block with experts: router and experts, forward([B, S, H] floating) -> [B, S, H]."""
    return model.get_submodule(moe_block_name(model))
