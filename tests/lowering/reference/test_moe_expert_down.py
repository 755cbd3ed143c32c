"""The oracle of the down stage against one einsum over all experts."""

import pytest
import torch

from lowering.reference.moe_expert_down import moe_expert_down_reference
from tests.support.inputs import FORMS, down_args
from tests.support.oracle import assert_near_exact


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_the_dense_form(form):
    act, w2, b2, order, offsets = down_args(form)
    out = torch.einsum("ni,ehi->neh", act, w2)
    out = out if b2 is None else out + b2
    experts = torch.repeat_interleave(torch.arange(form.experts), offsets.diff())
    wanted = act.new_zeros(act.shape[0], w2.shape[1])
    wanted[order[: len(experts)].long()] = out[torch.arange(len(experts)), experts]
    assert_near_exact(moe_expert_down_reference(act, w2, order, offsets, b2_EH=b2), wanted)
