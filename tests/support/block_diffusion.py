"""A small decoder for block-diffusion language models, of LLaDA2's and of SDAR-MoE's kind, on `build_mlp_or_moe`.

Neither has a class in transformers. A sequence is cut into blocks; a token sees its own block whole and all blocks in
front of it. LLaDA2: a dense first layer, grouped sigmoid routing with a selection bias, shared experts. SDAR-MoE:
Qwen3's rule for which layers are MoE, softmax routing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffulex.moe import build_mlp_or_moe


@dataclasses.dataclass
class BlockDiffusionConfig:
    """What both kinds share; a plain object, as configs of remote code are to `diffulex.moe.config`."""

    model_type: str = "sdar_moe"
    vocab_size: int = 64
    mask_token_id: int = 63
    block_length: int = 4
    hidden_size: int = 32
    intermediate_size: int = 48
    moe_intermediate_size: int = 16
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 8
    rope_theta: float = 1e4
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_gemm_impl: str = "triton"


@dataclasses.dataclass
class LLaDA2Config(BlockDiffusionConfig):
    """LLaDA2.0's names and choices."""

    model_type: str = "llada2_moe"
    first_k_dense_replace: int = 1
    num_shared_experts: int = 1
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5


@dataclasses.dataclass
class SDARMoEConfig(BlockDiffusionConfig):
    """SDAR-MoE's names and choices."""

    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] = dataclasses.field(default_factory=lambda: [1])


KINDS: dict[str, type[BlockDiffusionConfig]] = {"llada2": LLaDA2Config, "sdar_moe": SDARMoEConfig}


def block_diffusion_mask(length: int, block_length: int, device: torch.device | str | None = None) -> Tensor:
    """[S, S] bool, True where the token of the row sees that of the column: its own block and all blocks before."""
    block_S = torch.arange(length, device=device) // block_length
    return block_S.unsqueeze(0) <= block_S.unsqueeze(1)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class DenseMLP(nn.Module):
    def __init__(self, config: BlockDiffusionConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class Attention(nn.Module):
    """Grouped-query attention with norms on queries and keys and rotary positions."""

    def __init__(self, config: BlockDiffusionConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.theta = config.rope_theta
        total = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, total, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.rms_norm_eps) for _ in range(2))

    def _rotated(self, x: Tensor) -> Tensor:
        half = self.head_dim // 2
        rate = self.theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32).unsqueeze(1) * rate
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.split(half, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        heads = self.qkv_proj(hidden).view(batch, length, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = self._rotated(self.q_norm(q)), self._rotated(self.k_norm(k))
        repeats = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim))


class DecoderLayer(nn.Module):
    def __init__(self, config: BlockDiffusionConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = build_mlp_or_moe(config, layer_idx, lambda: DenseMLP(config))
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2)
        )

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), mask)
        out: Any = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + (out[0] if isinstance(out, tuple) else out)


class BlockDiffusionModel(nn.Module):
    """Token ids [B, S] int64 to logits [B, S, V]."""

    def __init__(self, config: BlockDiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = block_diffusion_mask(input_ids.shape[1], self.config.block_length, input_ids.device)
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.lm_head(self.norm(hidden))

    @torch.no_grad()
    def generate(self, prompt: Tensor, blocks: int) -> Tensor:
        """Prompt [B, S] int64, S a multiple of the block length, and `blocks` more, each unmasked token by token.

        A block starts as masks; each step keeps the most confident of them, until none is left.
        """
        config, ids = self.config, prompt
        for _ in range(blocks):
            ids = torch.cat((ids, ids.new_full((ids.shape[0], config.block_length), config.mask_token_id)), dim=1)
            for _ in range(config.block_length):
                scores = self(ids)[:, -config.block_length :].softmax(-1)
                scores[..., config.mask_token_id] = 0
                best, token = scores.max(-1)
                best = best.masked_fill(ids[:, -config.block_length :] != config.mask_token_id, -1)
                place = best.argmax(-1, keepdim=True) + ids.shape[1] - config.block_length
                ids = ids.scatter(1, place, token.gather(1, best.argmax(-1, keepdim=True)))
        return ids


def build_decoder(kind: str, *, seed: int = 0, **changes: Any) -> BlockDiffusionModel:
    """A decoder of a kind in `KINDS`, in eval mode, with seeded weights that keep the size of their inputs."""
    model = BlockDiffusionModel(KINDS[kind](**changes))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data.copy_(1 + 0.1 * noise)
        else:
            vector = noise.dim() < 2
            parameter.data.copy_(noise * (0.1 if vector else 1.0 if "embed" in name else noise.shape[-1] ** -0.5))
    return model.eval()
