"""Tiny layers and input sets for the tests of `diffulex.benching`."""

import torch

from diffulex.benching.inputs import make_inputs
from diffulex.benching.layers import build_layer
from diffulex.benching.shapes import Case, Shape
from lowering.spec import ExpertSpec

CPU = torch.device("cpu")
SHAPE = Shape(num_experts=8, top_k=2, hidden=64, intermediate=32)
FORMS = {
    "plain": ExpertSpec(8, 64, 32, "silu(g) * u"),
    "gelu": ExpertSpec(8, 64, 32, "gelu(g) * u"),
    "gpt_oss": ExpertSpec(8, 64, 32, "swiglu_oai", bias=True, interleaved=True, transposed=True),
    "ungated": ExpertSpec(8, 64, 32, "square(relu(g))", gated=False),
}


def tiny_layer(form="plain", *, dtype=torch.float32, device=CPU):
    """A layer of 8 experts, 2 a token, 64 x 32."""
    return build_layer(Case("tiny", SHAPE, FORMS[form]), dtype=dtype, device=device)


def tiny_inputs(tokens, *, sets=1, dtype=torch.float32, routing="uniform"):
    """Input sets for it."""
    return make_inputs(SHAPE, tokens, sets=sets, routing=routing, dtype=dtype, device="cpu")
