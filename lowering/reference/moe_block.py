"""The oracle of all tests: a whole MoE block as a per-token loop, with no sorting and no batching."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..activation import evaluate, split_gate


@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """The experts of one layer: w13 [E, J, H], w2 [E, H, I], biases [E, J] and [E, H], floating, any strides.

    act          formula or name of `lowering.activation`
    interleaved  gate and up rows of w13 alternate
    """

    w13_EJH: Tensor
    w2_EHI: Tensor
    b13_EJ: Tensor | None = None
    b2_EH: Tensor | None = None
    act: str = "silu(g) * u"
    interleaved: bool = False


def moe_block_reference(
    hidden_TH: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    *,
    experts: ExpertWeights,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """out[t] = sum over k of weights[t, k] * expert_{ids[t, k]}(hidden[t]), computed in `dtype` (fp64 by default).

    hidden [T, H] and weights [T, K] floating, ids [T, K] int.
    Ids outside [0, E) contribute nothing. Returns [T, H] in `dtype`. Differentiable by autograd, with gradients of
    zero for what no token uses.
    """
    tensors = (hidden_TH, weights_TK, experts.w13_EJH, experts.w2_EHI, experts.b13_EJ, experts.b2_EH)
    wide = [None if t is None else t.to(dtype) for t in tensors]
    hidden, weights, w13, w2, b13, b2 = wide
    assert hidden is not None and weights is not None and w13 is not None and w2 is not None
    rows = []
    for token, chosen in enumerate(ids_TK.tolist()):
        total_H = torch.zeros_like(hidden[token])
        for k, expert in enumerate(chosen):
            if not 0 <= expert < w13.shape[0]:
                continue
            pre_J = torch.mv(w13[expert], hidden[token])
            if b13 is not None:
                pre_J = pre_J + b13[expert]
            gate_1I, up_1I = split_gate(pre_J[None], experts.act, interleaved=experts.interleaved)
            slot_H = torch.mv(w2[expert], evaluate(experts.act, gate_1I, up_1I)[0])
            if b2 is not None:
                slot_H = slot_H + b2[expert]
            total_H = total_H + weights[token, k] * slot_H
        rows.append(total_H)
    out_TH = torch.stack(rows) if rows else hidden.new_zeros(hidden.shape)
    # Sums of nothing: a graph to every argument whatever was chosen, which reads no value that could be NaN.
    for t in (hidden, weights, w13, w2, b13, b2):
        out_TH = out_TH if t is None else out_TH + t[:0].sum()
    return out_TH
