"""The report of a model on an H100 that is not there."""

import dataclasses
import json

import pytest
import torch

from diffulex.explaining.offline import explain_offline
from lowering.report import Cost, microseconds
from lowering.schedule.device import H100
from lowering.state import batch_invariant
from tests.support.inputs import BlockForm
from tests.support.two_layers import Model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

T, K, E, H, I = 64, 4, 16, 512, 256  # noqa: E741
FORM = BlockForm(tokens=T, top_k=K, experts=E, hidden=H, width=I, dtype=torch.bfloat16)


def explained(form=FORM, *, dynamic=False):
    model = Model(form).eval()
    names = ("hidden_TH", "ids_TK", "weights_TK")
    inputs = dict(zip(names, model.inputs, strict=True))
    torch._dynamo.reset()
    for tensor in inputs.values() if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    return explain_offline(model, **inputs)


@pytest.fixture(scope="module")
def report():
    return explained()


def test_bytes_flop_and_times_of_each_layer(report):
    assert report.all_captured and (report.graphs, report.breaks) == (1, 0)
    rows = T * K
    hit = E * (1 - (1 - 1 / E) ** rows)
    for layer in report.layers:
        assert layer.backend == "generated Triton"
        up, down = (next(d.cost for d in layer.lowered if d.subject == f"moe_expert_{n}") for n in ("up", "down"))
        assert up.bytes == pytest.approx(2 * (hit * 2 * I * H + rows * (H + I)))
        assert down.bytes == pytest.approx(2 * (hit * I * H + rows * (H + I)))
        assert (up.flop, down.flop) == (2 * rows * 2 * I * H, 2 * rows * I * H)
        assert up.floor_us == pytest.approx(1e6 * up.bytes / H100.bandwidth, rel=1e-3)  # few rows: the bytes decide
        assert up.device == "NVIDIA H100 80GB HBM3" and up.rows == rows
        assert layer.cost == Cost(up.device, rows, *(a + b for a, b in zip(values(up), values(down), strict=True)))
        assert layer.measured_us is None
        assert layer.schedules == "from the cost model"
        assert f"  schedules   {layer.schedules}" in str(report).splitlines()
        assert [d.subject for d in layer.lowered if d.cost is not None] == ["moe_expert_up", "moe_expert_down"]


def test_each_stage_names_its_own_kernels(report):
    """By the names that Inductor makes; the two layers are alike and share them."""
    for layer in report.layers:
        assert [d.subject for d in layer.lowered if not d.kernels] == []
        assert all(d.subject in name for d in layer.lowered for name in d.kernels)
        assert all(f"  generated   {name}" in str(report).splitlines() for name in layer.generated)
        assert len(layer.generated) == len(layer.lowered) == 4


def values(cost):
    return dataclasses.astuple(cost)[2:-1]


def test_they_are_in_text_and_in_json(report):
    layer = report.layers[0]
    cost = layer.cost
    fraction = cost.floor_us / cost.predicted_us
    floor = f"floor {microseconds(cost.floor_us)} ({fraction:.0%})"
    assert f"predicted {microseconds(cost.predicted_us)} at 256 rows, {floor}" in str(report)
    parsed = json.loads(report.to_json())["layers"][0]
    assert parsed["cost"] == dataclasses.asdict(cost) | {"floor_of_predicted": fraction}
    assert [stage["stage"] for stage in parsed["stages"]] == [d.subject for d in layer.lowered]
    assert parsed["stages"][1]["cost"]["predicted_us"] == layer.lowered[1].cost.predicted_us
    assert "lowered" not in parsed


def test_symbolic_lengths_are_told_for_the_inputs(report):
    layer, exact = explained(dynamic=True).layers[0], report.layers[0]
    assert "T=s" in layer.form
    assert (layer.cost.rows, layer.cost.bytes) == (T * K, pytest.approx(exact.cost.bytes))


def test_batch_invariance_and_what_it_costs(report):
    """The time of the one schedule beside that of the schedules for these rows, which the default mode takes."""
    with batch_invariant():
        found = explained()
    layer, default = found.layers[0], report.layers[0]
    assert layer.invariance.startswith("but for: the routing (STRUCTURE: the expert ids come from placeholder")
    assert layer.cost.usual_us == pytest.approx(default.cost.predicted_us)
    assert layer.cost.usual_us < layer.cost.predicted_us
    assert f", {microseconds(layer.cost.usual_us)} by the schedule for these rows" in layer.times
    assert f"  invariance  {layer.invariance}" in str(found).splitlines()
    assert (default.invariance, default.cost.usual_us) == ("", None)
    assert "by the schedule for these rows" not in str(report)


def test_a_dtype_that_the_model_was_not_fitted_to_has_no_times():
    layer = explained(FORM.replace(dtype=torch.float32)).layers[0]
    assert layer.backend == "generated Triton"
    assert layer.cost is None and layer.times == ""


def test_a_layer_of_which_one_gemm_is_not_known_has_no_sum(report):
    """Half of a layer's time would be taken for all of it."""
    layer = report.layers[0]
    half = [dataclasses.replace(d, cost=None) if d.subject == "moe_expert_up" else d for d in layer.lowered]
    assert dataclasses.replace(layer, lowered=tuple(half)).cost is None
