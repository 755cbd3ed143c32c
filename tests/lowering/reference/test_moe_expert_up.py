"""The oracle of the up stage against one einsum over all experts."""

import pytest
import torch

from lowering.activation import evaluate, split_gate
from lowering.reference.moe_expert_up import moe_expert_up_reference
from tests.support.inputs import FORMS, up_args
from tests.support.oracle import assert_near_exact


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_the_dense_form(form):
    hidden, w13, b13, order, offsets, top_k, act, interleaved = up_args(form)
    pre = torch.einsum("nh,ejh->nej", hidden[order.long() // top_k], w13)
    pre = pre if b13 is None else pre + b13
    experts = torch.repeat_interleave(torch.arange(form.experts), offsets.diff())
    chosen = pre[torch.arange(len(experts)), experts]
    wanted = evaluate(act, *split_gate(chosen, act, interleaved=interleaved))
    tail = wanted.new_zeros(order.numel() - len(experts), wanted.shape[1])
    out = moe_expert_up_reference(
        hidden, w13, order, offsets, top_k=top_k, b13_EJ=b13, act=act, interleaved=interleaved
    )
    assert_near_exact(out, torch.cat((wanted, tail)))
