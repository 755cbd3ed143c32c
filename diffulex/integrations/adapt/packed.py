"""Experts in one pair of tensors, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I], called with ids and weights.

Step 3.7, LongCat-Flash (whose last experts pass tokens through), and copies of transformers' experts in remote code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .form import Adapted, Candidate, activation_name, arguments, bank, random_choice, random_hidden, run_experts

_IDS = ("ids", "ind", "select")  # parts of the name under which a forward takes the experts of a token
_ORDERS = ("gate, up", "up, gate", "interleaved")


@dataclasses.dataclass(frozen=True)
class PackedOptions:
    """up: name of the first weights; order: where gate and up lie in it; empty: not gated, or by `_apply_gate`."""

    up: str
    transposed: bool
    act: str
    order: str = ""
    ids_last: bool = False
    total: int = 0


class PackedExperts(Adapted):
    """Experts in one pair of tensors, read in place."""

    adapted_form = "packed weights"
    options: ClassVar[PackedOptions]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """hidden [T, H] floating, ids [T, K] int64 and weights [T, K] floating, to [T, H] in hidden's dtype."""
        hidden_states, first, second = self.bound(args, kwargs)
        if not self.runs_ops(hidden_states):
            return super().forward(*args, **kwargs)
        ids_TK, weights_TK = (second, first) if self.options.ids_last else (first, second)
        w13, w2 = getattr(self, self.options.up), self.down_proj
        if self.options.transposed:
            w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
        out_TH = run_experts(
            hidden_states,
            ids_TK,
            weights_TK=weights_TK,
            w13_EJH=w13[: w2.shape[0]],
            w2_EHI=w2,
            gate=self._gated,
            b13_EJ=getattr(self, f"{self.options.up}_bias", None),
            b2_EH=getattr(self, "down_proj_bias", None),
        )
        if self.options.total > w2.shape[0]:
            kept_T = torch.where(ids_TK >= w2.shape[0], weights_TK, 0).sum(1)
            out_TH = out_TH + (hidden_states * kept_T.unsqueeze(1)).to(out_TH.dtype)
        return out_TH

    def _gated(self, pre_NJ: Tensor) -> Tensor:
        act, order = getattr(self, self.options.act), self.options.order
        if not order:
            return act(pre_NJ)
        if order == "interleaved":
            return act(pre_NJ[:, ::2]) * pre_NJ[:, 1::2]
        first, second = pre_NJ.chunk(2, dim=-1)
        return act(first) * second if order == "gate, up" else act(second) * first


def packed(module: nn.Module) -> Iterator[Candidate]:
    """Guesses for modules that hold `down_proj` of rank 3 and are called with hidden states, ids and weights."""
    down, names = bank(module, "down_proj"), arguments(module)
    up_name = next((name for name in ("gate_up_proj", "up_proj") if bank(module, name) is not None), None)
    if down is None or up_name is None or len(names) != 3:
        return
    takes_ids = [any(part in name for part in _IDS) for name in names]
    if sum(takes_ids) != 1 or takes_ids[0]:
        return
    up = bank(module, up_name)
    assert up is not None
    factor = 2 if up_name == "gate_up_proj" else 1
    for transposed in (False, True):
        width, hidden = reversed(up.shape[1:]) if transposed else up.shape[1:]
        if (hidden, width) != _sizes(down, factor, transposed=transposed):
            continue
        act = "_apply_gate" if callable(getattr(module, "_apply_gate", None)) else activation_name(module)
        if act is None:
            continue
        for order in _ORDERS if factor == 2 and act != "_apply_gate" else ("",):
            options = PackedOptions(up_name, transposed, act, order, takes_ids[2], up.shape[0])
            reads = (up_name, f"{up_name}_bias", "down_proj", "down_proj_bias", act)
            yield Candidate(PackedExperts, functools.partial(_sample, hidden=hidden, options=options), options, reads)


def _sizes(down: Tensor, factor: int, *, transposed: bool) -> tuple[int, int]:
    """H and J as the second weights [E, H, I] or [E, I, H] have them."""
    width, hidden = down.shape[1:] if transposed else reversed(down.shape[1:])
    return hidden, factor * width


def _sample(module: Any, generator: torch.Generator, *, hidden: int, options: PackedOptions) -> tuple[Tensor, ...]:
    weight = getattr(module, options.up)
    ids_TK, weights_TK = random_choice(weight, generator, num_experts=options.total)
    hidden_TH = random_hidden(weight, generator, ids_TK.shape[0], hidden)
    return (hidden_TH, weights_TK, ids_TK) if options.ids_last else (hidden_TH, ids_TK, weights_TK)
