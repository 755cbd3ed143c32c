"""The linear layer in front of the router."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowering.spec import RoutingSpec


def named_dtype(name: str | None, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype that a spec names; None means that of the model, and an fp64 model stays fp64 everywhere."""
    return model_dtype if name is None or model_dtype == torch.float64 else getattr(torch, name)


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Autocast off where it is on: a product asked for in fp32 is computed in fp32."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class RouterGate(nn.Module):
    """Router logits of tokens: a linear layer with what some models put around it.

    weight       [C, H], one row per expert, null expert and joint shared expert
    bias         [C], where `spec.logits_bias`
    input_scale  [H], where `spec.input_norm_eps` is given (Gemma 4): behind an RMS norm without weight
    """

    weight: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        spec: RoutingSpec,
        hidden_size: int,
        *,
        num_experts: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        sizes = {
            "weight": (spec.num_logits(num_experts), hidden_size),
            "bias": (spec.num_logits(num_experts),) if spec.logits_bias else None,
            "input_scale": (hidden_size,) if spec.input_norm_eps is not None else None,
        }
        for name, size in sizes.items():
            value = None if size is None else nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            self.register_parameter(name, value)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights as `nn.Linear` draws them, bias 0, scale 1."""
        bound = self.weight.shape[1] ** -0.5
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.zero_()
        if self.input_scale is not None:
            self.input_scale.fill_(1.0)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, C] in `spec.logits_dtype` (None: the dtype of hidden), for hidden [T, H] floating."""
        spec, inputs_TH = self.spec, hidden_TH
        if self.input_scale is not None:
            inputs_TH = (
                self._normed(inputs_TH, spec.number("input_norm_eps") or 0.0)
                * self.input_scale
                * inputs_TH.shape[1] ** -0.5
            )
        if spec.logits_dtype is None:
            logits_TC = functional.linear(inputs_TH, self.weight, self.bias)
        else:
            dtype = named_dtype(spec.logits_dtype, hidden_TH.dtype)
            bias_C = None if self.bias is None else self.bias.to(dtype)
            with _no_autocast(hidden_TH.device):
                logits_TC = functional.linear(inputs_TH.to(dtype), self.weight.to(dtype), bias_C)
        scale = spec.number("logits_scale")
        return logits_TC if scale == 1 else logits_TC * scale

    @staticmethod
    def _normed(hidden_TH: Tensor, eps: float) -> Tensor:
        wide_TH = hidden_TH.to(torch.promote_types(hidden_TH.dtype, torch.float32))
        mean_T1 = wide_TH.square().mean(1, keepdim=True)
        return (wide_TH * (mean_T1 + eps) ** -0.5).to(hidden_TH.dtype)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"
