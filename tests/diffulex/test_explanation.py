"""Reports say what was compiled: for models that run through the ops, and for those that do not, with the reason."""

import dataclasses
import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import diffulex
from diffulex.explanation import LayerReport, Report, find_experts, make_report
from lowering.errors import Reason, ReasonCode
from lowering.report import OWN_KERNEL, Decision
from tests.support.experts import make_case
from tests.support.graphs import stop_at_lowerings
from tests.support.two_layers import FORM, Model, interface


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _stopped(request, monkeypatch):
    """What is reported is known when a graph was lowered; one test goes through all of Inductor."""
    if request.function is not test_a_model_that_is_captured:
        stop_at_lowerings(monkeypatch)


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


def test_reports_are_public_and_their_module_is_not_hidden():
    module = importlib.import_module("diffulex.explanation")
    assert (diffulex.Report, diffulex.LayerReport, diffulex.explain) == (Report, LayerReport, module.explain)
    assert diffulex.explanation is module


def test_it_reads_as_text_and_as_json():
    report = explain(Model())
    text = str(report)
    assert text.startswith(
        "2 MoE layers, 1 graph(s), 0 graph break(s), explained for inference (no_grad)\n"
        "layers.0.experts: captured, the ops' own kernels\n"
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


def test_graphs_that_were_compiled_before_are_compiled_again():
    """Behind a break, frames are those of the model itself, which Dynamo knows already."""
    model = Model(breaks=True).eval()
    with torch.no_grad():
        torch.compile(model)(*model.inputs)
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        report = explain(model)
        assert report.all_captured, str(report)
        assert report.graphs == 2


def test_a_switched_off_compiler_is_seen(monkeypatch):
    """Dynamo's part alone: what stock Inductor would do with the graph takes long and leaves no decisions."""
    monkeypatch.setattr("diffulex.explanation.fresh_backend", lambda: "eager")
    with diffulex.disabled():
        report = explain(Model())
    assert not report.all_captured
    assert {(layer.backend, layer.captured) for layer in report.layers} == {("stock", False)}
    assert "not captured: DISABLED" in str(report)


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
    assert report.mode == ("training" if train else "inference (no_grad)")
    assert all(layer.activation.startswith("stays aten (SHARED_USE" if train else "folded") for layer in report.layers)
    with torch.no_grad():
        assert diffulex.explain(model, *model.inputs).layers[0].activation.startswith("folded")


def test_lengths_explained_before_leave_no_trace():
    """Dynamo makes a size that it has seen to change symbolic, of the next model too."""
    forms = []
    for tokens in (7, 9):
        model = Model()
        inputs = [tensor[:1].expand(tokens, *tensor.shape[1:]).contiguous() for tensor in model.inputs]
        forms += [layer.form for layer in diffulex.explain(model.eval(), *inputs).layers]
    assert ["T=7" in form or "T=9" in form for form in forms] == [True] * 4, forms


def test_the_backward_belongs_to_the_layer_of_its_forward():
    report = diffulex.explain(Model().train(), *Model().inputs)
    assert report.unattributed == ()
    for layer in report.layers:
        assert "moe_expert_up" in layer.stages and "moe_expert_down" in layer.stages


def test_experts_that_are_the_model():
    case = make_case(FORM, interface)
    case.module.config._experts_implementation = "grouped_mm"
    report = diffulex.explain(case.module.eval(), *case.inputs)
    assert report.all_captured
    assert "\n(the model): captured" in str(report)


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
    report = make_report(named(experts, name), decisions, graphs=1, breaks=0)
    return next(layer for layer in report.layers if layer.name == name)


def test_generated_kernels():
    layer = report_of([UP, DOWN, ROUTE])
    assert (layer.captured, layer.backend) == (True, "generated Triton")
    assert layer.kernels == ("moe_expert_up   triton up", "moe_expert_down triton down", "moe_route       triton route")


def test_what_may_depend_on_the_batch():
    """What is told of a router or of a shared expert belongs to the experts beside it."""
    said = [
        Decision("lower", "moe_expert_up", "mlp.experts", "triton"),
        Decision("plan", "batch_invariance", "mlp.gate", "the router's product", Reason(ReasonCode.DTYPE, "float32")),
        Decision("plan", "batch_invariance", "mlp.shared.up_proj", "aten.mm.default", Reason(ReasonCode.LIBRARY)),
    ]
    with diffulex.batch_invariant():
        (layer,) = make_report(nn.Module(), said, graphs=1, breaks=0).layers
        (sound,) = make_report(nn.Module(), said[:1], graphs=1, breaks=0).layers
    assert layer.invariance.startswith("but for: the router's product (DTYPE: float32); aten.mm.default (LIBRARY: ")
    assert sound.invariance == "what is computed for a token does not depend on the batch"
    assert make_report(nn.Module(), said, graphs=1, breaks=0).layers[0].invariance == ""


def test_one_stage_with_its_own_kernel():
    refused = dataclasses.replace(DOWN, outcome=OWN_KERNEL, reason=Reason(ReasonCode.DTYPE, "torch.float64"))
    layer = report_of([UP, refused])
    assert (layer.captured, layer.backend) == (True, "the ops' own kernels")
    assert "moe_expert_down the op's own kernel (DTYPE: torch.float64)" in layer.kernels


def test_a_generated_kernel_that_is_not_the_planned_one():
    """It is generated all the same, and the reason is shown."""
    pointers = dataclasses.replace(DOWN, reason=Reason(ReasonCode.LAYOUT, "rows of W are not consecutive"))
    layer = report_of([UP, pointers])
    assert (layer.captured, layer.backend) == (True, "generated Triton")
    assert "moe_expert_down triton down (LAYOUT: rows of W are not consecutive)" in layer.kernels


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
        "moe_expert_up   triton up",
        "moe_expert_down triton down",
    )


EAGER = SimpleNamespace(_experts_implementation="eager")


def layers_of(names, decisions):
    """The layers reported of a model with experts of these names, by name."""
    model = nn.Module()
    for name in names:
        inner = model
        for part in name.split(".")[:-1]:
            if not hasattr(inner, part):
                inner.add_module(part, nn.Module())
            inner = getattr(inner, part)
        inner.add_module(name.rpartition(".")[2], make_case(FORM).module)
        getattr(inner, name.rpartition(".")[2]).config = EAGER
    report = make_report(model, decisions, graphs=1, breaks=0)
    return {layer.name: layer for layer in report.layers}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_name_that_is_the_end_of_another(prefix):
    names = ["layers.0.experts", "mtp.layers.0.experts"]
    decisions = [dataclasses.replace(d, layer=f"{prefix}mtp.layers.0.experts") for d in (UP, DOWN)]
    decisions.append(dataclasses.replace(ROUTE, layer=f"{prefix}mtp.layers.0.gate"))
    layers = layers_of(names, decisions)
    assert [layers[name].captured for name in names] == [False, True]
    assert layers[names[0]].reason.startswith("EAGER_EXPERTS")
    assert [len(layers[name].kernels) for name in names] == [0, 3]


@pytest.mark.parametrize(
    ("layer", "owner"),
    [
        ("layers.0.gate", "layers.0.experts"),
        ("layers.0.router.linear", "layers.0.experts"),
        ("mtp.layers.0.router", "mtp.layers.0.experts"),
        ("layers.1.mlp.router", "layers.1.mlp"),
        ("gate", "experts"),
    ],
)
def test_routers_belong_to_the_nearest_experts(layer, owner):
    layers = layers_of(["experts", "layers.0.experts", "mtp.layers.0.experts", "layers.1.mlp"], [
        dataclasses.replace(ROUTE, layer=layer),
    ])  # fmt: skip
    assert [name for name, found in layers.items() if found.kernels] == [owner]


def test_every_decision_counts():
    """A stage that was refused in one graph and not in the next is no generated layer."""
    refused = dataclasses.replace(UP, outcome=OWN_KERNEL, reason=Reason(ReasonCode.SHAPE, "graph 1"))
    layer = report_of([refused, DOWN, UP, DOWN])
    assert layer.backend == "the ops' own kernels"
    assert layer.kernels == (
        "moe_expert_up   the op's own kernel (SHAPE: graph 1)",
        "moe_expert_up   triton up",
        "moe_expert_down triton down",
    )
    assert layer.stages == {"moe_expert_up", "moe_expert_down"}


def test_layers_without_a_module_of_experts():
    """A model that writes its experts out: the decisions name it."""
    spine = Decision("recognise", "spine_pass", "h.1.ffn", "stock", Reason(ReasonCode.SHAPE, "not K ids a token"))
    decisions = [dataclasses.replace(d, layer="h.0.ffn") for d in (UP, DOWN)] + [spine]
    report = make_report(nn.Linear(2, 2), decisions, graphs=1, breaks=0)
    assert [(layer.name, layer.captured) for layer in report.layers] == [("h.0.ffn", True), ("h.1.ffn", False)]
    assert report.layers[1].reason == "SHAPE: not K ids a token"
    assert report.unattributed == ()


def test_decisions_of_no_layer_are_shown():
    report = make_report(nn.Linear(2, 2), [dataclasses.replace(UP, layer="")], graphs=1, breaks=0)
    assert report.unattributed == ("moe_expert_up triton up",)
    assert "in no layer known by name:\n  moe_expert_up triton up" in str(report)


def test_a_device_without_kernels():
    experts = make_case(FORM).module.to("meta")
    experts.config = SimpleNamespace(_experts_implementation="grouped_mm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffulex.explanation, "DEVICES", frozenset({"cpu"}))
        (layer,) = make_report(named(experts, "experts"), [], graphs=1, breaks=0).layers
    assert layer.reason == "DEVICE: device meta"


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


def test_experts_in_lists_and_in_halves():
    """Families outside transformers' interface: a list of one module an expert, one bank for each of the two GEMMs."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts, self.weight = 4, nn.Parameter(torch.zeros(4, 8, 8))

    model = nn.ModuleDict(
        {
            "listed": nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}),
            "halves": nn.ModuleDict({"up": Half(), "down": Half()}),
        }
    )
    assert list(find_experts(model)) == ["listed.experts", "halves"]
    report = make_report(model, [], graphs=1, breaks=0)
    assert {layer.reason.partition(":")[0] for layer in report.layers} == {"NO_INTERFACE"}


def test_a_model_without_experts_is_not_captured():
    report = Report((), 1, 0)
    assert not report.all_captured
    assert str(report) == "0 MoE layers, 1 graph(s), 0 graph break(s), explained for inference (no_grad)"


def test_one_layer_that_is_not_captured_spoils_it():
    good = LayerReport("a", True, "generated Triton", "", (), "", "")
    bad = dataclasses.replace(good, name="b", captured=False, reason="DTYPE: x")
    assert Report((good,), 1, 0).all_captured
    assert not Report((good, bad), 1, 0).all_captured
    assert "b: not captured: DTYPE: x" in str(Report((good, bad), 1, 0))
