"""A block that sends every token to every expert, weighted by zero but for K of them, as Llama 4 does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowering import ops

from .form import TOKENS, Adapted, Candidate, activation_name, arguments, bank, random_hidden


class WeightedInputBlock(Adapted):
    """The K experts of a token alone; weights multiply what experts read, as in the module's own code."""

    adapted_form = "weighted inputs"
    bypassed = ("experts",)
    options: ClassVar[str]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [..., H] floating, to its output [T, H] of the same dtype and the router's logits [T, E]."""
        (hidden_states,) = self.bound(args, kwargs)
        if not self.runs_ops(hidden_states):
            return super().forward(*args, **kwargs)
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores_TE, logits_TE = self.router(hidden_TH)  # zero for experts that were not chosen
        weights_TK, ids_TK = scores_TE.topk(self.top_k, dim=1)
        slots_NH = (hidden_TH.unsqueeze(1) * weights_TK.unsqueeze(2)).reshape(-1, hidden_TH.shape[1])
        experts = self.experts
        order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK.reshape(-1, 1), experts.down_proj.shape[0])
        w13_EJH, w2_EHI = experts.gate_up_proj.transpose(1, 2), experts.down_proj.transpose(1, 2)
        pre_NJ = ops.moe_expert_up(slots_NH.to(w13_EJH.dtype), w13_EJH, None, order_N, offsets_E1, 1)
        gate_NI, up_NI = pre_NJ.chunk(2, dim=-1)
        act_NI = up_NI * getattr(experts, self.options)(gate_NI)
        out_NH = ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)
        routed_TH = ops.moe_combine(out_NH, torch.ones_like(weights_TK)) if self.top_k > 1 else out_NH
        return self.shared_expert(hidden_TH) + routed_TH.to(hidden_TH.dtype), logits_TE


def dense(module: nn.Module) -> Iterator[Candidate]:
    """Guesses for blocks with a router, a shared expert and packed experts that are called with hidden states alone."""
    experts = getattr(module, "experts", None)
    parts = all(isinstance(getattr(module, name, None), nn.Module) for name in ("router", "shared_expert"))
    if not parts or not isinstance(experts, nn.Module) or len(arguments(module)) != 1:
        return
    if not isinstance(getattr(module, "top_k", None), int):
        return
    up, down, act = bank(experts, "gate_up_proj"), bank(experts, "down_proj"), activation_name(experts)
    if up is None or down is None or act is None or up.shape[2] != 2 * down.shape[1] or up.shape[1] != down.shape[2]:
        return
    reads = ("router", "shared_expert", "experts.gate_up_proj", "experts.down_proj", f"experts.{act}")
    yield Candidate(WeightedInputBlock, _sample, act, reads)


def _sample(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    weight = module.experts.gate_up_proj
    return (random_hidden(weight, generator, TOKENS, weight.shape[1]),)
