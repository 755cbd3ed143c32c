"""Times belong to the stage and the layer that took them."""

import dataclasses

import pytest
import torch
from torch import nn

import diffulex
from diffulex.explaining.measure import Launch, attribute
from diffulex.explanation import LayerReport
from lowering.errors import MoEUnsupportedError, Reason, ReasonCode
from lowering.report import OWN_KERNEL, Cost, Decision, microseconds
from tests.support.two_layers import Model

UP = Decision("lower", "moe_expert_up", "layers.0", "triton up")
DOWN = dataclasses.replace(UP, subject="moe_expert_down", outcome="triton down")
OWN = dataclasses.replace(UP, outcome=OWN_KERNEL, reason=Reason(ReasonCode.NOT_CUDA, "device cpu"))


def kernels(*names, times=None):
    """Kernels one after the other, of which each takes as long as its number says."""
    return [Launch(name, at, (times or range(1, 100))[at], True) for at, name in enumerate(names)]


def times_of(launches, decisions, runs=1):
    return [decision.measured_us for decision in attribute(launches, decisions, runs=runs)]


def test_layers_that_share_a_kernel_get_their_own_launches():
    """Kernel names are those that Inductor makes, and others run between; launches may be told in any order."""
    run = ["triton_tem_fused_moe_expert_up_1", "triton_poi_fused_add_0", "triton_tem_fused__to_copy_moe_expert_down_2"]
    told = times_of(kernels(*run, *run)[::-1], [UP, DOWN, UP, DOWN])
    assert told == [1, 3, 4, 6]


def test_kernels_in_gluon_take_their_turn():
    called = dataclasses.replace(UP, outcome="gluon moe_expert_up_0123abcd 192x128x64")
    launches = kernels("triton_tem_fused_moe_expert_up_1", "_moe_expert_up_0123abcd_kernel", "triton_poi_fused_add_0")
    assert times_of(launches, [UP, called]) == [1, 2]


def test_the_median_of_the_runs():
    launches = kernels(*["triton_tem_fused_moe_expert_up_1"] * 6, times=[10, 1, 11, 3, 99, 2])
    assert times_of(launches, [UP, UP], runs=3) == [11, 2]


def test_a_stage_of_several_kernels_takes_their_sum():
    route = dataclasses.replace(UP, subject="moe_route", outcome="triton moe_route_linear")
    assert times_of(kernels(*["triton_tem_fused_moe_route_linear_1"] * 4), [route, route]) == [3, 7]


def test_a_kernel_of_two_stages_counts_once():
    combine = dataclasses.replace(UP, subject="moe_combine", outcome="Inductor IR")
    assert times_of(kernels("triton_tem_fused_moe_combine_moe_expert_up_1"), [UP, combine]) == [1, None]


@pytest.mark.parametrize(
    "names",
    [
        ["triton_tem_fused_moe_expert_up_1"] * 3,  # which of the three is the second layer's?
        ["_moe_expert_up_kernel"] * 2,  # the op's own
        ["triton_poi_fused_add_0"],
        [],
    ],
)
def test_what_cannot_be_told_apart_has_no_time(names):
    assert times_of(kernels(*names), [UP, UP]) == [None, None]


def test_ops_that_run_their_own_kernels_are_told_by_their_calls():
    calls = [Launch("diffulex::moe_expert_up", 1.0, 7.0, False), Launch("aten::mm", 2.0, 9.0, False)]
    assert times_of(calls, [OWN]) == [7.0]
    assert times_of(calls, [UP]) == [None]


def test_decisions_that_lower_nothing_have_no_time():
    assert times_of(kernels("triton_tem_fused_moe_expert_up_1"), [dataclasses.replace(UP, stage="plan"), UP]) == [
        None,
        1,
    ]


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_model_is_measured():
    model = Model().eval()
    report = diffulex.explain(model, *model.inputs, measure=True)
    for layer in report.layers:
        assert [decision.measured_us > 0 for decision in layer.lowered] == [True] * 4
        assert layer.measured_us == pytest.approx(sum(decision.measured_us for decision in layer.lowered))
        assert f"measured {microseconds(layer.measured_us)} in 4 of 4 stages" in layer.times
        assert all("; measured " in kernel for kernel in layer.kernels)
        assert layer.cost is None, "a CPU is not described"
    assert report.layers[0].measured_us != report.layers[1].measured_us


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_request_that_cannot_be_met_is_an_error():
    with pytest.raises(MoEUnsupportedError, match="none of them of a MoE layer"):
        diffulex.explain(nn.Linear(2, 2).eval(), torch.ones(1, 2), measure=True)
    with pytest.raises(MoEUnsupportedError, match="expected a model in inference, got one in training"):
        diffulex.explain(Model().train(), *Model().inputs, measure=True)


def test_the_part_of_the_floor_in_what_was_measured():
    """Of a stage by its own time, of a layer by that of all its stages."""
    cost = Cost("H100", 8, 1e6, 1e6, floor_us=50.0, predicted_us=80.0)
    stages = tuple(dataclasses.replace(decision, cost=cost, measured_us=100.0) for decision in (UP, DOWN))
    layer = LayerReport("a", True, "generated Triton", "", (), "", "", lowered=stages)
    assert stages[0].told == "triton up; predicted 80 us at 8 rows, floor 50 us (62%); measured 100 us (floor: 50%)"
    assert layer.times.endswith("measured 200 us in 2 of 2 stages (floor: 50%)")
    fields = layer.to_dict()
    assert (fields["floor_of_measured"], fields["stages"][0]["floor_of_measured"]) == (0.5, 0.5)
    assert "floor_of_measured" not in dataclasses.replace(layer, lowered=(UP, DOWN)).to_dict()
