"""Blocks with experts for text and experts for images, where the kind of a token picks the side, as Ernie 4.5 VL has
them.

Their own code picks tokens by a mask, whose sums the host waits for. Here all tokens go through both sides, and the
tokens of the other kind get the number behind the last expert, which no op runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..transformers import diffulex_experts_forward
from .form import Adapted, Candidate, arguments, bank, random_hidden

_SIDES = ("text_moe", "vision_moe")
_ARGUMENTS = ("hidden_states", "moe_mm_token_type_ids")


class ModalityBlock(Adapted):
    """Two routers, two sets of experts, and what they share."""

    adapted_form = "experts by modality"
    bypassed = (*_SIDES, *(f"{side}.experts" for side in _SIDES))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """hidden [B, S, H] floating, kinds [B, S] int or bool (0 is text) or None, to [B, S, H] of hidden's dtype and
        float32 logits [B*S, E].
        """
        hidden_states, kinds = self.bound(args, kwargs)
        if not self.runs_ops(hidden_states):
            return super().forward(*args, **kwargs)
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        if kinds is None:
            out_TH, logits_TE = _side(self.text_moe, hidden_TH, None)
        else:
            image_T1 = kinds.bool().reshape(-1, 1)
            text_TH, text_TE = _side(self.text_moe, hidden_TH, image_T1)
            image_TH, image_TE = _side(self.vision_moe, hidden_TH, ~image_T1)
            out_TH, logits_TE = text_TH + image_TH, torch.where(image_T1, image_TE, text_TE)
        out = out_TH.view(hidden_states.shape)
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden_states)
        return out, logits_TE


def _side(side: Any, hidden_TH: Tensor, left_out_T1: Tensor | None) -> tuple[Tensor, Tensor]:
    """One side's part of the output, zero for the tokens that are left out, and its logits [T, E]."""
    logits_TE, weights_TK, ids_TK = side.gate(hidden_TH)
    if left_out_T1 is not None:
        ids_TK = ids_TK.masked_fill(left_out_T1, logits_TE.shape[1])
    return diffulex_experts_forward(side.experts, hidden_TH, ids_TK, weights_TK), logits_TE


def modalities(module: nn.Module) -> Iterator[Candidate]:
    """The guess for blocks with the children `text_moe` and `vision_moe`, each a `gate` and `experts`."""
    sides = [getattr(module, name, None) for name in _SIDES]
    if not all(isinstance(side, nn.Module) and _has_parts(side) for side in sides):
        return
    if arguments(module) == _ARGUMENTS and hasattr(module, "shared_experts"):
        yield Candidate(ModalityBlock, _sample, reads=(*_SIDES, "shared_experts"))


def _has_parts(side: nn.Module) -> bool:
    experts, gate = getattr(side, "experts", None), getattr(side, "gate", None)
    return isinstance(gate, nn.Module) and isinstance(experts, nn.Module) and hasattr(experts, "has_gate")


def _sample(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    weight = bank(module.text_moe.experts, "down_proj")
    assert weight is not None
    hidden = random_hidden(weight, generator, 2, 16, weight.shape[1])
    kinds = torch.randint(0, 3, (2, 16), generator=generator)
    return hidden, kinds.to(weight.device)
