"""Tiny models of families whose experts are outside transformers' interface, and blocks as remote code writes them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from diffulex.families.build import build_model
from diffulex.families.catalogue import FAMILIES as CATALOGUE

# those of the catalogue that stand outside
FAMILIES = {family.name: family for family in CATALOGUE if family.adapt}


def build_adaptable(family: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of the family in eval mode with seeded weights."""
    return build_model(FAMILIES[family], dtype=dtype)


def exact_of(model: Any) -> Any:
    """A copy in fp64; experts of transformers' interface, where they are inside other blocks, run their own loop."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    return exact


def inputs_of(model: Any, *, seed: int = 0, length: int = 9) -> dict[str, Any]:
    """Token ids [2, length], or an image for a model that reads images."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(1, 3, 32, 32, generator=generator)
        return {"pixel_values": pixels, "dataset_index": torch.tensor([1])}
    ids = torch.randint(1, 96, (2, length), generator=generator)
    if model.config.is_encoder_decoder:
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "decoder_input_ids": ids.flip(1),
            "use_cache": False,
        }
    if "TokenClassification" in type(model).__name__:
        return {"input_ids": ids}
    kinds = {"moe_mm_token_type_ids": (ids % 3 == 0).int()} if "VLMoe" in type(model).__name__ else {}
    return {"input_ids": ids, "use_cache": False, **kinds}


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
