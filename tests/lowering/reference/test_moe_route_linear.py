"""The oracle of a router with its product: the product as a sum, its routing that of `moe_route`."""

import pytest
import torch

from lowering.reference.moe_route import moe_route_reference
from lowering.reference.moe_route_linear import moe_route_linear_reference
from lowering.spec import RoutingSpec
from tests.support.inputs import route_linear_args
from tests.support.oracle import assert_near_exact


@pytest.mark.parametrize("product", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_dense_form(biased, product):
    hidden, weight, linear_bias, *_ = route_linear_args(dtype=torch.float64, linear_bias=biased)
    spec = RoutingSpec(2)
    given = {"linear_bias_E": linear_bias, "product_dtype": product}
    weights, ids, logits = moe_route_linear_reference(hidden, weight, spec=spec, **given)
    wanted = (hidden[:, None] * weight).sum(-1) + (linear_bias if biased else 0)
    if product is None:
        assert_near_exact(logits, wanted)
    else:
        assert torch.equal(logits, wanted.to(product).double())
    for ours, theirs in zip((weights, ids), moe_route_reference(logits, spec), strict=True):
        assert torch.equal(ours, theirs)
