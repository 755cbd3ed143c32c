"""MoE blocks from hidden states and a router's weight, for tests of results that do not depend on the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from lowering.spec import RoutingSpec

ops = torch.ops.diffulex
GROUPED = RoutingSpec(4, "sigmoid", 4, 2, eps=1e-20, scale=2.5)
Sizes = tuple[int, int, int]
# E, H, expert width, routing, whether a shared expert of the same width stands beside
SHAPES: dict[str, tuple[Sizes, RoutingSpec, bool]] = {
    "qwen3": ((64, 1024, 384), RoutingSpec(8), False),
    "mixtral": ((8, 1024, 1792), RoutingSpec(2), False),
    "wide": ((4, 768, 8192), RoutingSpec(2), False),
    "deepseek": ((32, 1024, 256), GROUPED, True),
}


class Layer:
    """out [T, H] and the routing weights [T, K] fp32 of hidden [T, H], the router's weight [E, H] and bias [E], and the
    weights of the experts.
    """

    def __init__(self, name: str) -> None:
        self.sizes, self.spec, self.shared = SHAPES[name]
        self.small = (16, 192, 64)  # for the interpreter

    def __call__(self, hidden_TH: Tensor, gate_EH: Tensor, bias_E: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        w13_EJH, w2_EHI, *dense = weights
        bias_E = bias_E if self.spec.score == "sigmoid" else None
        weights_TK, ids_TK = ops.moe_route(linear(hidden_TH, gate_EH), bias_E, None, *self.spec.op_args())
        order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, gate_EH.shape[0])
        act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, self.spec.top_k, "silu(g) * u")
        out_TH = ops.moe_combine(ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1), weights_TK)
        if dense:
            w1_SH, w3_SH, w2_HS = dense
            out_TH = out_TH + linear(silu(linear(hidden_TH, w1_SH)) * linear(hidden_TH, w3_SH), w2_HS)
        return out_TH, weights_TK

    def inputs(self, tokens: int, *, sizes: Sizes | None = None, device: str = "cpu") -> list[Tensor]:
        """Everything in bf16, of unit size; the first rows of hidden are the same for every number of tokens."""
        experts, hidden, width = self.sizes if sizes is None else sizes
        shapes = [(experts, hidden), (experts,), (experts, 2 * width, hidden), (experts, hidden, width)]
        shapes += [(width, hidden), (width, hidden), (hidden, width)] if self.shared else []
        if device == "meta":
            return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in [(tokens, hidden), *shapes]]
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for shape in shapes]
        rows = torch.randn(tokens, hidden, generator=generator)
        return [tensor.to(device, torch.bfloat16) for tensor in (rows, *weights)]
