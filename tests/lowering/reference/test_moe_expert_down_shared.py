"""The oracle of the down stage with a shared expert against one einsum."""

import pytest
import torch

from lowering.reference.moe_expert_down_shared import moe_expert_down_shared_reference
from tests.support.inputs import FORMS, down_shared_args
from tests.support.oracle import assert_near_exact


@pytest.mark.parametrize("name", ["plain", "one_token", "no_tokens"])
def test_equals_the_dense_form(name):
    act, w2, b2, order, offsets, shared, shared_w2, _ = down_shared_args(FORMS[name])
    _, out = moe_expert_down_shared_reference(act, w2, order, offsets, shared, shared_w2, b2_EH=b2)
    assert_near_exact(out, torch.einsum("ts,ds->td", shared, shared_w2))
