"""A MoE block behind its router, written with the stage ops, as functions that a graph can be captured of."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import BlockForm, make_block

ops = torch.ops.diffulex


def rms_norm(x_TH: Tensor) -> Tensor:
    """x [T, H] over its root mean square, which is computed in fp32."""
    return x_TH * torch.rsqrt(x_TH.float().square().mean(-1, keepdim=True) + 1e-6).to(x_TH.dtype)


class Block:
    """Dispatch, both expert stages and combine of a form; with `tail`, residual and the next norm as well."""

    def __init__(self, form: BlockForm, *, tail: bool = True) -> None:
        self.form = form
        self.tail = tail

    def __call__(
        self,
        hidden_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        w13_EJH: Tensor,
        w2_EHI: Tensor,
        b13_EJ: Tensor | None = None,
        b2_EH: Tensor | None = None,
    ) -> Tensor:
        # one symbol for T, as in a model, where ids and weights come from hidden
        torch._check(ids_TK.shape[0] == hidden_TH.shape[0])
        torch._check(weights_TK.shape[0] == hidden_TH.shape[0])
        order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, self.form.experts)
        act_NI = ops.moe_expert_up(
            hidden_TH, w13_EJH, b13_EJ, order_N, offsets_E1, self.form.top_k, self.form.act, self.form.interleaved
        )
        slots_NH = ops.moe_expert_down(act_NI, w2_EHI, b2_EH, order_N, offsets_E1)
        out_TH = ops.moe_combine(slots_NH, weights_TK)
        return rms_norm(hidden_TH + out_TH) if self.tail else out_TH

    def inputs(self) -> list[Tensor]:
        """hidden [T, H], ids [T, K] int32, weights [T, K] fp32, w13, w2 and the biases the form has, in its dtype."""
        block = make_block(self.form)
        weights = (block.w13_EJH, block.w2_EHI, block.b13_EJ, block.b2_EH)
        return [block.hidden_TH, block.ids_TK, block.weights_TK, *(w for w in weights if w is not None)]
