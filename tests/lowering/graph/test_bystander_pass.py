"""Graphs of `torch.export`: the passes find in them what they find in a graph of Dynamo's."""

import copy
import dataclasses

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lowering.graph.bystander_pass import bystander_pass
from lowering.graph.dataflow import aten
from lowering.graph.pipeline import run_passes
from lowering.inductor.fake_device import fake_gpu
from lowering.inductor.offline import fake_cuda, fake_cuda_module
from lowering.report import collect
from tests.support.graphs import calls
from tests.support.models import FAMILIES, TINY, build_model

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")


def exported(family: str) -> Graph:
    """The graph of a block on a faked GPU, any number of tokens, decomposed as Inductor does it."""
    block = build_model(family, dataclasses.replace(TINY, layers=1)).model.layers[0].mlp
    with fake_gpu():
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        fake = fake_cuda_module(block, mode=mode, dtype=torch.bfloat16)
        inputs = fake_cuda((torch.empty(1, 9, TINY.hidden, dtype=torch.bfloat16),), mode=mode)
        tokens = torch.export.Dim("tokens", min=2, max=4096)
        program = torch.export.export(fake, inputs, dynamic_shapes=({1: tokens},), strict=False)
        return program.run_decompositions(select_decomp_table()).graph


@needs_no_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_routers_and_shared_experts_are_found(family):
    graph = exported(family)
    assert calls(graph, aten._assert_tensor_metadata.default) and calls(graph, aten.sym_size.int)
    with collect() as decisions:
        run_passes(graph)
    found = {decision.subject: decision for decision in decisions}
    assert found["route_pass"].outcome.startswith("moe_route"), found["route_pass"]
    assert found["activation_pass"].outcome.startswith("folded")
    assert found["route_linear_pass"].reason is None, found["route_linear_pass"]
    if family == "deepseek_v3":
        assert found["shared_expert_pass"].outcome == "in the experts' stages", found["shared_expert_pass"]


class Casts(torch.nn.Module):
    """Two casts, and sizes that are read of an input and of values made of it."""

    def forward(self, x_TH, y_TH):
        wide_TH = (x_TH + 1).to(torch.float64)
        return wide_TH.new_full((wide_TH.shape[0], y_TH.shape[0]), 2.0), wide_TH.relu().to(torch.float32) * 2


def test_what_the_graph_computes_stays():
    inputs = (torch.randn(5, 3), torch.randn(4, 3))
    first, second = torch.export.Dim("first"), torch.export.Dim("second")
    program = torch.export.export(Casts(), inputs, dynamic_shapes=({0: first}, {0: second}))
    module = copy.deepcopy(program.graph_module)
    assert len(calls(module.graph, aten._assert_tensor_metadata.default)) == 2
    (relu,) = calls(module.graph, aten.relu.default)
    with module.graph.inserting_before(relu):
        again = module.graph.call_function(aten.sym_size.int, (relu.args[0], 0))
        again.meta["val"] = calls(module.graph, aten.sym_size.int)[0].meta["val"]
    module.graph.output_node().args = ((*module.graph.output_node().args[0], again),)
    bystander_pass(module.graph)
    module.graph.lint()
    module.recompile()
    assert not calls(module.graph, aten._assert_tensor_metadata.default)
    assert len(calls(module.graph, aten.sym_size.int)) == 2  # one for each of the two lengths
    for lengths in ((5, 4), (2, 7)):
        tensors = [torch.randn(length, 3) for length in lengths]
        filled, doubled, size = module(*tensors)
        assert size == lengths[0]
        for ours, wanted in zip((filled, doubled), Casts()(*tensors), strict=True):
            assert torch.equal(ours, wanted)
