"""The experts that are timed: a module in transformers' form, with random weights, for any `ExpertSpec`."""

from __future__ import annotations

import copy
import dataclasses
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowering.activation import as_function
from lowering.reference.moe_block import ExpertWeights
from lowering.spec import ExpertSpec

from .shapes import Case, Shape

_PLAIN = "silu(g) * u"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A case with weights: an experts module of transformers' interface, which takes hidden, ids and weights."""

    case: Case
    module: nn.Module

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """That of the weights."""
        return next(self.module.parameters()).device

    def with_implementation(self, name: str) -> nn.Module:
        """The module on the same weights, with an experts implementation of its own."""
        module: Any = copy.copy(self.module)
        module.config = copy.copy(module.config)
        module.config._experts_implementation = name
        return module

    def weights(self) -> ExpertWeights:
        """Views of the weights, [E, J, H] and [E, H, I] in the dtype of the layer, and what the experts compute."""
        module: Any = self.module
        first = "gate_up_proj" if self.case.spec.gated else "up_proj"
        w13, w2 = getattr(module, first), module.down_proj
        if self.case.spec.transposed:
            w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
        b13, b2 = (getattr(module, f"{name}_bias", None) for name in (first, "down_proj"))
        return ExpertWeights(w13, w2, b13, b2, act=self.case.spec.act, interleaved=self.case.spec.interleaved)


def weight_bytes(spec: ExpertSpec, dtype: torch.dtype) -> int:
    """Bytes of all experts' matrices."""
    matrices = 3 if spec.gated else 2
    return spec.num_experts * matrices * spec.hidden_size * spec.intermediate_size * dtype.itemsize


def build_layer(case: Case, *, dtype: torch.dtype, device: torch.device) -> Layer:
    """A layer with weights N(0, 0.02) in a dtype on a device; Qwen3-MoE's own class where the experts have its form."""
    spec = case.spec
    plain = spec.gated and spec.act == _PLAIN and not (spec.bias or spec.interleaved or spec.transposed)
    with torch.device(device):
        module = (_qwen3_experts(case.shape) if plain else _spec_experts(spec)).to(dtype)
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.requires_grad_(False).normal_(std=0.02)
    return Layer(case, module)


def experts_module(shape: Shape) -> nn.Module:
    """transformers' own experts module of a Qwen3-MoE, bf16 on CUDA, weights N(0, 0.02)."""
    spec = ExpertSpec(shape.num_experts, shape.hidden, shape.intermediate, _PLAIN)
    layer = build_layer(Case("", shape, spec), dtype=torch.bfloat16, device=torch.device("cuda"))
    return layer.with_implementation("grouped_mm")


def _qwen3_experts(shape: Shape) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    return Qwen3MoeExperts(config)


def _spec_experts(spec: ExpertSpec) -> nn.Module:
    """Experts of any other form, registered with transformers' interface as its own classes are."""
    from transformers.integrations.moe import use_experts_implementation

    # the decorator writes into the class it is given, so each form has one of its own
    form = {"is_transposed": spec.transposed, "has_bias": spec.bias, "has_gate": spec.gated}
    kind = use_experts_implementation(**form)(type("Experts", (_Experts,), {}))
    return kind(types.SimpleNamespace(spec=spec, _experts_implementation="eager"))


class _Experts(nn.Module):
    """Weights under transformers' names, and its plain loop over the experts that are hit."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        spec = config.spec
        self.spec, self.num_experts = spec, spec.num_experts
        self.act = as_function(spec.act)
        rows = (2 if spec.gated else 1) * spec.intermediate_size
        first = "gate_up_proj" if spec.gated else "up_proj"
        for name, size in (
            (first, (rows, spec.hidden_size)),
            ("down_proj", (spec.hidden_size, spec.intermediate_size)),
        ):
            stored = size[::-1] if spec.transposed else size
            setattr(self, name, nn.Parameter(torch.empty(spec.num_experts, *stored)))
            if spec.bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.empty(spec.num_experts, size[0])))

    def _apply_gate(self, pre_NJ: Tensor) -> Tensor:
        # not `split_gate`: it parses the formula, which Dynamo does not trace
        if self.spec.interleaved:
            return self.act(pre_NJ[:, 0::2], pre_NJ[:, 1::2])
        return self.act(*pre_NJ.chunk(2, dim=-1))

    def act_fn(self, pre_NI: Tensor) -> Tensor:
        """The activation [N, I] of experts without a gate, in the dtype of its input."""
        return self.act(pre_NI, pre_NI)

    def _linear(self, rows_NX: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if self.spec.bias else None
        return functional.linear(rows_NX, weight.T if self.spec.transposed else weight, bias)

    def forward(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, H] in the dtype of hidden [T, H], for ids [T, K] int and weights [T, K] floating."""
        out_TH = torch.zeros_like(hidden_TH)
        for expert in ids_TK.unique().tolist():
            token_N, k_N = torch.where(ids_TK == expert)
            pre_NJ = self._linear(hidden_TH[token_N], "gate_up_proj" if self.spec.gated else "up_proj", expert)
            act_NI = self._apply_gate(pre_NJ) if self.spec.gated else self.act_fn(pre_NJ)
            slots_NH = self._linear(act_NI, "down_proj", expert) * weights_TK[token_N, k_N, None]
            out_TH.index_add_(0, token_N, slots_NH.to(out_TH.dtype))
        return out_TH
