"""Experts of any form: what they compute under each implementation, and what the compiler makes of them."""

import pytest
import torch
from torch import nn

from diffulex.benching.inputs import route
from diffulex.benching.layers import weight_bytes
from diffulex.explaining.offline import explain_offline
from lowering.reference.moe_block import moe_block_reference
from tests.support.benching import FORMS, tiny_inputs, tiny_layer


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "diffulex"])
@pytest.mark.parametrize("form", FORMS)
def test_every_implementation_computes_the_form(form, implementation):
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # torch has no other product
    layer = tiny_layer(form, dtype=dtype)
    for parameter in layer.module.parameters():
        parameter.mul_(10)  # activations with a size at which clamps and curves show
    (one,) = tiny_inputs(9, dtype=dtype)
    expected = moe_block_reference(one.hidden_TH, one.weights_TK, one.ids_TK, experts=layer.weights())
    found = layer.with_implementation(implementation)(one.hidden_TH, one.ids_TK, one.weights_TK)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=50 * eps * float(expected.abs().max()))


def test_implementations_share_weights_and_nothing_else():
    layer = tiny_layer()
    first, second = layer.with_implementation("eager"), layer.with_implementation("diffulex")
    assert first.config._experts_implementation == "eager" and second.config._experts_implementation == "diffulex"
    assert first.down_proj is second.down_proj is layer.module.down_proj


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_counted(form):
    layer = tiny_layer(form, dtype=torch.bfloat16)
    matrices = sum(parameter.nbytes for parameter in layer.module.parameters() if parameter.dim() == 3)
    assert weight_bytes(FORMS[form], torch.bfloat16) == matrices


class Block(nn.Module):
    """What is compiled on CUDA for "logits"."""

    def __init__(self, layer):
        super().__init__()
        self.experts, self.top_k = layer.with_implementation("grouped_mm"), layer.case.shape.top_k

    def forward(self, hidden, logits):
        weights, ids = route(logits, self.top_k, dtype=hidden.dtype)
        return self.experts(hidden, ids, weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")
@pytest.mark.parametrize("form", ["plain", "gpt_oss"])
def test_the_layer_and_its_router_are_captured(form, fresh_dynamo):
    """So that on CUDA it is the generated kernels that are timed."""
    layer = tiny_layer(form, dtype=torch.bfloat16, device=torch.device("meta"))
    (one,) = tiny_inputs(4, dtype=torch.bfloat16)
    report = explain_offline(Block(layer).eval(), hidden=one.hidden_TH, logits=one.logits_TE)
    (found,) = report.layers
    assert found.captured and found.generated and found.router.startswith("moe_route top 2 of softmax, renorm")
    assert found.activation.startswith("folded")
