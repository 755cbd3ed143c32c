"""The text of a region is what people read in a report."""

import sympy

from lowering.region import MoERegion
from lowering.spec import ExpertSpec


def test_text_names_sizes_form_and_neighbours():
    experts = ExpertSpec(8, 64, 32, "silu(g) * u", bias=True, transposed=True)
    region = MoERegion("model.layers.0.mlp.experts", experts, None, sympy.Symbol("s0"), 2, ("add", "mul"))
    assert str(region) == ("E=8 K=2 H=64 I=32 bfloat16 silu(g) * u (gated, bias, transposed), T=s0, then add, mul")
    assert region.rows == 2 * sympy.Symbol("s0")


def test_text_of_a_block_that_nothing_reads():
    experts = ExpertSpec(8, 64, 32, "square(relu(g))", gated=False)
    assert str(MoERegion("", experts, None, sympy.Integer(5), 1)).endswith("(ungated), T=5, then -")
