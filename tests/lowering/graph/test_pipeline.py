"""All passes over the graph of a stock block: what each contributes, what is reported, what can be left out."""

import copy
import dataclasses
import logging

import pytest
import torch
from torch.fx import GraphModule

from lowering.graph import pipeline
from lowering.graph.dataflow import arguments, aten
from lowering.graph.pipeline import run_passes
from lowering.report import collect
from lowering.state import disabled
from tests.support.graphs import applied, backend_with, calls, trace
from tests.support.models import TINY, build_model
from tests.support.oracle import assert_oracle_ratio

moe = torch.ops.diffulex
PASSES = (
    "bystander_pass",
    "spine_pass",
    "route_pass",
    "router_linear_pass",
    "activation_pass",
    "shared_expert_pass",
    "route_linear_pass",
)


class Stock:
    """A block of a stock model as Inductor's passes meet it, and one input."""

    def __init__(self):
        model = build_model("qwen3_moe", dataclasses.replace(TINY, layers=1), dtype=torch.bfloat16)
        self.block = model.model.layers[0].mlp
        self.hidden_BTH = torch.randn(1, 9, TINY.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
        graphs = []
        backend = backend_with(lambda graph: graphs.append(copy.deepcopy(graph)))
        torch._dynamo.reset()
        with torch.no_grad(), disabled():
            torch.compile(self.block, backend=backend, fullgraph=True)(self.hidden_BTH)
        self._graph = graphs[0]

    def graph(self):
        return copy.deepcopy(self._graph)

    def run(self, graph):
        """The graph's output; its inputs are told apart by their shapes."""
        tensors = [self.hidden_BTH, *self.block.parameters()]
        shapes = [node.meta["val"].shape for node in graph.nodes if node.op == "placeholder"]
        found = [next(t for t in tensors if t.shape == shape) for shape in shapes]
        with torch.no_grad():
            return GraphModule(torch.nn.Module(), graph)(*found)[0]


@pytest.fixture(scope="module")
def stock():
    return Stock()


def outcomes(decisions):
    return {decision.subject: decision.outcome for decision in decisions}


def test_a_stock_block_becomes_stage_ops(stock):
    graph = stock.graph()
    with collect() as decisions:
        assert run_passes(graph) is graph
    ops = (moe.moe_route, moe.moe_dispatch, moe.moe_expert_up, moe.moe_expert_down, moe.moe_combine)
    assert [len(calls(graph, op.default)) for op in ops] == [1] * 5
    left = (aten._grouped_mm.default, aten.sort.default, aten.topk.default, aten.histc.default, aten.index_put.default)
    assert not calls(graph, *left)
    (up,) = calls(graph, moe.moe_expert_up.default)
    assert arguments(up)["act"] == "silu(g) * u"
    found = outcomes(decisions)
    assert found["spine_pass"] == "stage ops"
    assert found["route_pass"].startswith("moe_route")
    assert found["activation_pass"] == "folded silu(g) * u"
    assert "E=8 K=2 H=64 I=32" in found["region"]
    assert {decision.stage for decision in decisions} == {"recognise"}
    assert {decision.layer for decision in decisions if decision.subject in ("spine_pass", "activation_pass")} == {
        "experts"
    }
    refused = {decision.subject for decision in decisions if decision.reason is not None}
    assert refused <= {"router_linear_pass", "route_linear_pass"}  # of use to GPUs only


def test_the_passes_compute_the_same(stock):
    graph = stock.graph()
    eager = stock.run(graph)
    with torch.no_grad():
        double = copy.deepcopy(stock.block).double()
        double.experts.config._experts_implementation = "eager"
        exact = double(stock.hidden_BTH.double())
    assert_oracle_ratio(stock.run(run_passes(graph)), eager, exact)


@pytest.mark.parametrize(
    ("name", "op", "count"),
    [
        ("spine_pass", aten._grouped_mm.default, 2),
        ("route_pass", aten.topk.default, 1),
        ("activation_pass", aten.exp.default, 1),
    ],
)
def test_a_pass_can_be_left_out(stock, name, op, count):
    graph = stock.graph()
    with collect() as decisions:
        run_passes(graph, skip={name})
    assert len(calls(graph, op)) >= count
    assert name not in outcomes(decisions)


def test_all_passes_can_be_left_out(stock):
    graph = stock.graph()
    before = str(graph)
    with collect() as decisions:
        run_passes(graph, skip=PASSES)
    assert (str(graph), decisions) == (before, [])


def test_the_names_of_the_passes():
    assert tuple(pipeline._PASSES) == PASSES


def test_a_second_run_changes_nothing(stock):
    graph = run_passes(stock.graph())
    before = str(graph)
    assert str(run_passes(graph)) == before


def test_each_pass_is_timed(stock, caplog):
    with caplog.at_level(logging.DEBUG, logger="diffulex"):
        run_passes(stock.graph())
    timed = [message.split(" took ")[0] for message in caplog.messages if " took " in message]
    assert timed == list(PASSES)


def test_a_graph_without_experts_is_left_alone():
    module = trace(lambda x, w: torch.softmax(x @ w, -1).topk(2)[0].sum(0), torch.randn(4, 8), torch.randn(8, 8))
    before = str(module.graph)
    with collect() as decisions:
        applied(run_passes, module)
    assert (str(module.graph), decisions) == (before, [])


def test_dead_nodes_of_others_stay():
    """A graph without experts costs one look at each node and is not cleaned up for anyone."""
    module = trace(lambda x: x + 1, torch.randn(3))
    node = next(node for node in module.graph.nodes if node.op == "call_function")
    with module.graph.inserting_after(node):
        module.graph.call_function(aten.neg.default, (node,))
    run_passes(module.graph)
    assert len(calls(module.graph, aten.neg.default)) == 1


def test_a_broken_graph_is_not_returned(stock, monkeypatch):
    """Every pass's result is checked before Inductor gets it."""

    def break_it(graph):
        node = calls(graph, aten._grouped_mm.default)[0]
        node.append(calls(graph, aten.sort.default)[0])  # used before it is defined

    monkeypatch.setitem(pipeline._PASSES, "spine_pass", break_it)
    with pytest.raises(RuntimeError, match="used before"):
        run_passes(stock.graph(), skip=set(PASSES) - {"spine_pass"})
