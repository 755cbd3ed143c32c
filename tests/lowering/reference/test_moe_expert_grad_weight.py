"""The oracle of the weight gradient against one einsum with a membership matrix."""

import pytest
import torch

from lowering.reference.moe_expert_grad_weight import moe_expert_grad_weight_reference
from tests.support.inputs import FORMS, grad_weight_args
from tests.support.oracle import assert_near_exact


@pytest.mark.parametrize(("left", "right"), [("row", "token"), ("slot", "row"), ("token", "slot")])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_the_dense_form(form, left, right):
    left_rows, right_rows, left_index, right_index, offsets = grad_weight_args(form, left=left, right=right)
    left_rows = left_rows if left_index is None else left_rows[left_index.long()]
    right_rows = right_rows if right_index is None else right_rows[right_index.long()]
    rows = torch.arange(left_rows.shape[0])
    member = ((rows >= offsets[:-1, None]) & (rows < offsets[1:, None])).double()
    out = moe_expert_grad_weight_reference(
        *grad_weight_args(form, left=left, right=right)[:2], offsets, left_index_N=left_index, right_index_N=right_index
    )
    assert_near_exact(out, torch.einsum("en,nl,nr->elr", member, left_rows, right_rows))
