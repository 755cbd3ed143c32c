"""Blocks of two grouped products `input_linear`, `output_linear` behind a router that sorts, as JetMoe has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowering import ops

from .form import Adapted, Candidate, activation_name, bank, random_hidden, run_experts

_PRODUCTS = ("input_linear", "output_linear")
_READS = ("input_linear.weight", "output_linear.weight", "router", "bias")


class SortingRouter(Adapted):
    """The router, without the sizes of the groups on the host."""

    def forward(self, *args: Tensor, unsorted: bool = False, **kwargs: Tensor) -> Any:
        """hidden [T, H] floating, to ids [T, K] int64, weights [T, K] of its dtype, two empty places, logits.

        Only where it is asked for `unsorted` choices; the block's own code gets what the router's own code returns.
        """
        if not unsorted:
            return super().forward(*args, **kwargs)
        (hidden_states,) = self.bound(args, kwargs)
        logits_TE = self.layer(hidden_states).float()
        top_TK, ids_TK = logits_TE.topk(self.top_k, dim=1)
        return ids_TK, torch.softmax(top_TK, dim=1).type_as(hidden_states), None, None, logits_TE


class ParallelBlock(Adapted):
    """A MoE block: router, experts, and a bias behind their sum."""

    adapted_form = "parallel experts"
    bypassed = _PRODUCTS
    options: ClassVar[str]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """hidden [B, S, H] floating, to [B, S, H] of the same dtype."""
        (layer_input,) = self.bound(args, kwargs)
        if not self.runs_ops(layer_input):
            return super().forward(*args, **kwargs)
        hidden_TH = layer_input.reshape(-1, layer_input.shape[-1])
        ids_TK, weights_TK, *_ = self.router(hidden_TH, unsorted=True)
        out_TH = run_experts(
            hidden_TH,
            ids_TK,
            weights_TK=weights_TK,
            w13_EJH=self.input_linear.weight,
            w2_EHI=self.output_linear.weight,
            gate=self._gated,
        )
        return out_TH.view(layer_input.shape) + self.bias

    def _gated(self, pre_NJ: Tensor) -> Tensor:
        gate_NI, up_NI = pre_NJ.chunk(2, dim=-1)
        return getattr(self, self.options)(gate_NI) * up_NI


class ParallelAttention(Adapted):
    """A mixture of attention: experts project the queries, and what attention makes of them."""

    adapted_form = "parallel attention experts"
    called_by_parent = True
    bypassed = _PRODUCTS

    def map(self, layer_input: Tensor) -> tuple[Tensor, Tensor, Any]:
        """hidden [B, S, H] floating, to queries [B, S, K, I] of its dtype, logits [B*S, E], and what `reduce` needs."""
        if not self.runs_ops(layer_input):
            return self.stock.map(self, layer_input)
        hidden_TH = layer_input.reshape(-1, layer_input.shape[-1])
        ids_TK, weights_TK, *_, logits_TE = self.router(hidden_TH, unsorted=True)
        weight = self.input_linear.weight
        order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, weight.shape[0])
        rows_NI = ops.moe_expert_up(hidden_TH.to(weight.dtype), weight, None, order_N, offsets_E1, self.top_k)
        slots_NI = torch.zeros_like(rows_NI).index_copy(0, order_N.long(), rows_NI)
        queries = slots_NI.view(*layer_input.shape[:2], self.top_k, weight.shape[1])
        return queries, logits_TE, (weights_TK, order_N, offsets_E1)

    def reduce(self, layer_input: Tensor, topo_info: Any) -> Tensor:
        """Attention's output [B, S, K, I] floating, to [B, S, H] of the same dtype."""
        if len(topo_info) != 3:
            return self.stock.reduce(self, layer_input, topo_info)
        weights_TK, order_N, offsets_E1 = topo_info
        weight = self.output_linear.weight
        slots_NI = layer_input.reshape(-1, layer_input.shape[-1]).to(weight.dtype)
        slots_NH = ops.moe_expert_down(slots_NI.index_select(0, order_N), weight, None, order_N, offsets_E1)
        out_TH = ops.moe_combine(slots_NH, weights_TK)
        return out_TH.view(*layer_input.shape[:2], -1) + self.bias


def parallel(module: nn.Module) -> Iterator[Candidate]:
    """Guesses for blocks with `input_linear`, `output_linear`, `router` and `bias`: experts, or those of attention."""
    children = [getattr(module, name, None) for name in _PRODUCTS]
    found = [bank(child, "weight") for child in children if isinstance(child, nn.Module)]
    router = getattr(module, "router", None)
    if len(found) < 2 or any(weight is None for weight in found) or bank(module, "bias", rank=1) is None:
        return
    if not isinstance(router, nn.Module) or not isinstance(getattr(router, "layer", None), nn.Linear):
        return
    act = activation_name(module)
    routers = (("router", SortingRouter),)
    if act is not None:
        yield Candidate(ParallelBlock, _sample, act, (*_READS, act), routers)
    elif callable(getattr(module, "map", None)) and callable(getattr(module, "reduce", None)):
        yield Candidate(ParallelAttention, _sample, None, _READS, routers, _map_and_reduce)


def _sample(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    weight = module.input_linear.weight
    return (random_hidden(weight, generator, 2, 8, weight.shape[2]),)


def _map_and_reduce(module: Any, inputs: tuple[Tensor, ...]) -> Any:
    queries, logits, info = module.map(*inputs)
    return queries, logits, module.reduce(queries.tanh(), info)
