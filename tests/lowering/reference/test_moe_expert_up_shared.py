"""The oracle of the up stage with a shared expert: that expert as one more expert that every token chooses."""

import pytest
import torch

from lowering.reference.moe_expert_up_shared import moe_expert_up_shared_reference
from tests.support.inputs import FORMS, up_shared_args
from tests.support.oracle import assert_near_exact


@pytest.mark.parametrize("name", ["plain", "ungated", "one_token", "no_tokens"])
def test_equals_the_dense_form(name):
    hidden, w13, b13, order, offsets, rows, w1, w3, top_k, act, interleaved = up_shared_args(FORMS[name])
    options = {"top_k": top_k, "act": act, "b13_EJ": b13, "interleaved": interleaved}
    _, shared = moe_expert_up_shared_reference(hidden, w13, order, offsets, rows, w1, w3, **options)
    pre = torch.einsum("td,sd->ts", rows, w1)
    if w3 is None:
        wanted = torch.relu(pre).square()
    else:
        wanted = torch.nn.functional.silu(pre) * torch.einsum("td,sd->ts", rows, w3)
    assert_near_exact(shared, wanted)
