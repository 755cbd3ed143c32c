"""Reports say what was compiled: for models that run through the ops, and for those that do not, with the reason."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import diffulex
from diffulex.explain import LayerReport, Report, find_experts, layer_reports
from lowering.errors import Reason, ReasonCode
from lowering.report import Decision
from tests.support.experts import make_case
from tests.support.inputs import FORMS

FORM = FORMS["plain"].replace(dtype=torch.float32)


def interface(self, *tensors):
    """What transformers' decorated experts do: look their function up by the name in the configuration."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS[self.config._experts_implementation](self, *tensors)


class Model(nn.Module):
    """Two layers of experts in one list; `ids` and weights are given, so that no graph needs C++."""

    def __init__(self, *, breaks=False, implementation="grouped_mm"):
        super().__init__()
        case = make_case(FORM, interface)
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": make_case(FORM, interface).module}) for _ in range(2))
        for layer in self.layers:
            layer["experts"].config._experts_implementation = implementation
        self.breaks, self.inputs = breaks, case.inputs

    def forward(self, hidden, ids, weights):
        hidden = self.layers[0]["experts"](hidden, ids, weights)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.layers[1]["experts"](hidden, ids, weights)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def explain(model):
    return diffulex.explain(model.eval(), *model.inputs)


def test_a_model_that_is_captured():
    report = explain(Model())
    assert report.all_captured, str(report)
    assert (report.graphs, report.breaks, report.break_reasons) == (1, 0, ())
    assert [layer.name for layer in report.layers] == ["layers.0.experts", "layers.1.experts"]
    for layer in report.layers:
        assert layer.backend == "the ops' own kernels"
        assert layer.activation == "folded silu(g) * u"
        assert "E=5 K=2 H=8 I=6 float32 silu(g) * u" in layer.form
        assert [kernel.split()[0] for kernel in layer.kernels] == [
            "moe_dispatch",
            "moe_expert_up",
            "moe_expert_down",
            "moe_combine",
        ]
        assert all("NOT_CUDA" in kernel for kernel in layer.kernels)
        assert layer.reason is None


def test_it_reads_as_text_and_as_json():
    report = explain(Model())
    text = str(report)
    assert text.startswith(
        "2 MoE layers, 1 graph(s), 0 graph break(s)\nlayers.0.experts: captured, the ops' own kernels\n"
    )
    assert "  activation  folded silu(g) * u" in text
    parsed = json.loads(report.to_json())
    assert [layer["name"] for layer in parsed["layers"]] == ["layers.0.experts", "layers.1.experts"]
    assert (parsed["graphs"], "decisions" in parsed) == (1, False)


def test_graph_breaks_are_counted_and_named():
    report = explain(Model(breaks=True))
    assert report.all_captured
    assert report.graphs == 2
    assert report.breaks >= 1  # Dynamo counts a break again in each frame it unwinds to
    assert "graph_break" in " ".join(report.break_reasons)
    assert f"  break: {report.break_reasons[0]}" in str(report)


def test_a_switched_off_compiler_is_seen(monkeypatch):
    """Dynamo's part alone: what stock Inductor would do with the graph takes long and leaves no decisions."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with diffulex.disabled():
        report = explain(Model())
    assert not report.all_captured
    assert {(layer.backend, layer.captured) for layer in report.layers} == {("stock", False)}
    assert all("grouped_mm" in layer.reason for layer in report.layers)
    assert "not captured: STRUCTURE" in str(report)


def test_earlier_compilations_stay():
    """Nothing is compiled again afterwards, what others count is not cleared, and caches are as they were."""
    model = Model()
    seen = []
    compiled = torch.compile(model, backend=lambda graph, inputs: seen.append(graph) or graph.forward)
    compiled(*model.inputs)
    counters["stats"]["calls_captured"] += 1000
    explain(model)
    explain(compiled)
    compiled(*model.inputs)
    assert len(seen) == 1
    assert counters["stats"]["calls_captured"] >= 1000
    assert not torch._inductor.config.force_disable_caches


@pytest.mark.parametrize("train", [False, True])
def test_the_mode_of_the_model_decides_what_is_explained(train):
    model = Model().train(train)
    report = diffulex.explain(model, *model.inputs)
    assert report.all_captured
    assert all(layer.activation.startswith("stays aten (SHARED_USE" if train else "folded") for layer in report.layers)
    with torch.no_grad():
        assert diffulex.explain(model, *model.inputs).layers[0].activation.startswith("folded")


# Reports without a compilation

UP = Decision("lower", "moe_expert_up", "model.layers.1.mlp.experts", "triton up")
DOWN = dataclasses.replace(UP, subject="moe_expert_down", outcome="triton down")
ROUTE = Decision("lower", "moe_route", "model.layers.1.mlp.gate", "triton route")


def named(module, name):
    """A model that holds `module` under a dotted name."""
    for part in reversed(name.split(".")):
        outer = nn.Module()
        outer.add_module(part, module)
        module = outer
    return module


def report_of(decisions, name="model.layers.1.mlp.experts", implementation="grouped_mm"):
    experts = make_case(FORM).module
    experts.config = SimpleNamespace(_experts_implementation=implementation)
    (layer,) = layer_reports(named(experts, name), decisions)
    return layer


def test_generated_kernels():
    layer = report_of([UP, DOWN, ROUTE])
    assert (layer.captured, layer.backend) == (True, "generated Triton")
    assert layer.kernels == ("moe_expert_up triton up", "moe_expert_down triton down", "moe_route   triton route")


def test_one_stage_with_its_own_kernel():
    refused = dataclasses.replace(DOWN, outcome="own", reason=Reason(ReasonCode.DTYPE, "torch.float64"))
    layer = report_of([UP, refused])
    assert (layer.captured, layer.backend) == (True, "the ops' own kernels")
    assert "moe_expert_down own (DTYPE: torch.float64)" in layer.kernels


@pytest.mark.parametrize("missing", [UP, DOWN])
def test_both_stages_have_to_be_there(missing):
    layer = report_of([decision for decision in (UP, DOWN) if decision is not missing])
    assert (layer.captured, layer.backend) == (False, "stock")


def test_the_reason_of_the_spine_comes_first():
    spine = Decision("recognise", "spine_pass", UP.layer, "stock", Reason(ReasonCode.SHAPE, "not K ids a token"))
    assert report_of([spine]).reason == "SHAPE: not K ids a token"


@pytest.mark.parametrize(
    ("implementation", "code"), [("eager", "EAGER_EXPERTS"), (None, "NO_INTERFACE"), ("sonicmoe", "STRUCTURE")]
)
def test_reasons_that_the_configuration_gives(implementation, code):
    assert report_of([], implementation=implementation).reason.startswith(code)


@pytest.mark.parametrize(
    ("name", "mine"),
    [
        ("model.layers.1.mlp.experts", True),
        ("layers.1.mlp.experts", True),  # what was compiled holds the model that is explained
        ("mlp.experts", True),
        ("model.layers.11.mlp.experts", False),
        ("1.mlp.experts", True),
        ("11.mlp.experts", False),
        ("s.1.mlp.experts", False),
        ("lp.experts", False),
    ],
)
def test_decisions_belong_to_the_layer_they_name(name, mine):
    layer = report_of([UP, DOWN, ROUTE], name=name)
    assert layer.captured == mine
    assert len(layer.kernels) == 3 * mine


def test_a_router_of_a_layer_whose_number_ends_alike():
    other = dataclasses.replace(ROUTE, layer="11.mlp.gate")
    assert report_of([UP, DOWN, other], name="1.mlp.experts").kernels == (
        "moe_expert_up triton up",
        "moe_expert_down triton down",
    )


def test_experts_are_found_by_their_weights():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = 4
            self.router = nn.Parameter(torch.zeros(4, 8))
            self.experts = make_case(FORM).module
            self.dense = nn.Linear(4, 4)

    assert list(find_experts(Holder())) == ["experts"]
    assert find_experts(nn.Linear(2, 2)) == {}


def test_a_model_without_experts_is_not_captured():
    report = Report((), 1, 0)
    assert not report.all_captured
    assert str(report) == "0 MoE layers, 1 graph(s), 0 graph break(s)"


def test_one_layer_that_is_not_captured_spoils_it():
    good = LayerReport("a", True, "generated Triton", "", (), "", "")
    bad = dataclasses.replace(good, name="b", captured=False, reason="DTYPE: x")
    assert Report((good,), 1, 0).all_captured
    assert not Report((good, bad), 1, 0).all_captured
    assert "b: not captured: DTYPE: x" in str(Report((good, bad), 1, 0))
