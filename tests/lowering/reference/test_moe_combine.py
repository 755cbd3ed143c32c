"""The oracle of the combine stage against one einsum, and by hand."""

import pytest
import torch

from lowering.reference.moe_combine import moe_combine_reference
from tests.support.inputs import FORMS, combine_args
from tests.support.oracle import assert_near_exact


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_the_dense_form(form):
    slots, weights = combine_args(form)
    wanted = torch.einsum("tkh,tk->th", slots.view(*weights.shape, form.hidden), weights)
    assert_near_exact(moe_combine_reference(slots, weights), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_by_hand(dtype):
    """The sum is taken in fp32 at least: 1 + 2^-9 + 2^-9 is lost when bf16 adds it up."""
    slots = torch.tensor([[1.0], [1.0], [1.0], [4.0]], dtype=dtype)
    weights = torch.tensor([[1.0, 2.0**-9, 2.0**-9], [1.0, 1.0, 2.0**-9]])
    out = moe_combine_reference(torch.cat((slots, slots[:2])), weights)
    assert out.dtype == dtype
    exact = torch.tensor([[1.0 + 2.0**-8], [5.0 + 2.0**-9]], dtype=torch.float64)
    assert torch.equal(out, exact.to(dtype))
