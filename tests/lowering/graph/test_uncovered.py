"""Products of a MoE block that stay a library's, and that they are told where results may not depend on the batch."""

import pytest
import torch
from torch.fx import Graph

from lowering.errors import Reason, ReasonCode
from lowering.graph.uncovered import library_products, note_uncovered
from lowering.report import collect
from lowering.state import batch_invariant

moe, aten = torch.ops.diffulex, torch.ops.aten


def graph_of(**layers):
    """A graph with a `moe_expert_up` in the module `layers["experts"]`, a router, and a product in each other one."""
    graph = Graph()

    def node(layer, target, *args):
        found = graph.call_function(target, args)
        found.meta["nn_module_stack"] = {"0": (f"L['self'].{layer}", object)} if layer else {}
        return found

    x = graph.placeholder("x")
    for name, layer in layers.items():
        if name == "experts":
            node(layer, moe.moe_expert_up.default, x, x, None, x, x, 2, "silu(g) * u")
        elif name == "router":
            node(layer, moe.moe_route.default, node(layer, aten.mm.default, x, x), None, None, 2)
        else:
            node(layer, getattr(aten, name).default, x, x)
    return graph


def found(**layers):
    return [node.target.overloadpacket for node in library_products(graph_of(**layers))]


def test_products_in_the_module_around_the_experts():
    layers = {"experts": "layers.0.mlp.experts", "router": "layers.0.mlp.gate", "mm": "layers.0.mlp.shared.up"}
    assert found(**layers, bmm="layers.0.attention", add="layers.0.mlp") == [aten.mm]


def test_products_of_another_block_or_of_one_with_a_longer_name():
    assert found(experts="layers.0.mlp.experts", mm="layers.1.mlp.shared", bmm="layers.0.mlp2") == []


@pytest.mark.parametrize(("experts", "products"), [("mlp", [aten.mm]), ("experts", [aten.mm, aten.bmm]), ("", [])])
def test_what_the_block_is(experts, products):
    """The module itself where it is not called `experts`, the whole model where nothing is around it, or not known."""
    assert found(experts=experts, mm="mlp.shared", bmm="head") == products


def test_no_experts_no_products():
    assert found(router="gate", mm="mlp") == []


def test_it_is_told_in_one_mode():
    reason = Reason(ReasonCode.LIBRARY)
    with collect() as decisions:
        note_uncovered("a product", reason, layer="mlp")
        with batch_invariant():
            note_uncovered("a product", reason, layer="mlp")
    assert [(d.subject, d.layer, d.outcome, d.reason) for d in decisions] == [
        ("batch_invariance", "mlp", "a product", reason)
    ]
