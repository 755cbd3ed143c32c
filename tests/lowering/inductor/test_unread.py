"""Rows of no expert, which kernels leave as they are where nobody reads them, and write as zeros everywhere else."""

import pytest
import torch

from lowering.schedule.schedule import Loop, Schedule
from tests.lowering.inductor.test_many_rows import FORM, LOOPS, generate
from tests.support.inputs import make_block
from tests.support.interpreter import interpreter
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

ops = torch.ops.diffulex
LOOPS = {"plain": Loop(), **LOOPS}


def stages(hidden_TH, ids_TK, w13_EJH, w2_EHI, num_experts=FORM.experts):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, num_experts)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, FORM.top_k, "swiglu")
    return act_NI, ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)


def known(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    """The ids computed, as rows of a rank's weights are."""
    ids_TK = torch.where(ids_TK == 3, -1, ids_TK)
    _, slots_NH = stages(hidden_TH, ids_TK, w13_EJH, w2_EHI)
    return ops.moe_combine(slots_NH, weights_TK, ids_TK, FORM.experts)


def widened(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    _, slots_NH = stages(hidden_TH, ids_TK, w13_EJH, w2_EHI)
    wide = torch.promote_types(slots_NH.dtype, torch.float32)
    return ops.moe_combine(slots_NH.to(wide), weights_TK, ids_TK, FORM.experts).tanh()


def without_ids(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    return ops.moe_combine(stages(hidden_TH, ids_TK, w13_EJH, w2_EHI)[1], weights_TK)


def of_other_ids(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    _, slots_NH = stages(hidden_TH, ids_TK, w13_EJH, w2_EHI)
    return ops.moe_combine(slots_NH, weights_TK, torch.where(ids_TK < 0, 0, ids_TK), FORM.experts)


def of_more_experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    _, slots_NH = stages(hidden_TH, ids_TK, w13_EJH, w2_EHI)
    return ops.moe_combine(slots_NH, weights_TK, ids_TK, FORM.experts + 1)


def read_elsewhere(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    _, slots_NH = stages(hidden_TH, ids_TK, w13_EJH, w2_EHI)
    return ops.moe_combine(slots_NH, weights_TK, ids_TK, FORM.experts), slots_NH.amax(1)


def changed_between(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, FORM.experts)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, FORM.top_k, "swiglu")
    slots_NH = ops.moe_expert_down(act_NI + 1, w2_EHI, None, order_N, offsets_E1)
    return ops.moe_combine(slots_NH, weights_TK, ids_TK, FORM.experts), act_NI.amax(1)


def inputs_of(form=FORM):
    block = make_block(form)
    generator = torch.Generator().manual_seed(5)
    weights_TK = torch.rand(form.tokens, form.top_k, generator=generator)
    return [block.hidden_TH, block.ids_TK, weights_TK, block.w13_EJH, block.w2_EHI]


def zeroed(code):
    """Which of the expert GEMMs write zeros behind the rows of experts."""
    texts = {stage: code.kernel(stage).function for stage in ("moe_expert_up", "moe_expert_down")}
    return [
        stage.rpartition("_")[2]
        for stage, text in texts.items()
        if "belong to no expert" in text or "if start >= end" in text
    ]


def check(code, function, inputs):
    found = interpreter().graph(code, function, inputs)
    doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    told, exact = function(*inputs), function(*doubles)
    many = isinstance(told, tuple)
    for ours, eager, oracle in zip(found, told if many else [told], exact if many else [exact], strict=True):
        assert_oracle_ratio(ours, eager, oracle)


@pytest.mark.parametrize("function", [known, widened])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_nothing_is_written_where_nothing_is_read(loop, function, monkeypatch):
    inputs = inputs_of(FORM.replace(dtype=torch.float16) if function is widened else FORM)
    assert ((inputs[1] < 0) | (inputs[1] >= FORM.experts)).any()
    code, decisions = generate(monkeypatch, Schedule(16, 16, 16, 4, 3, loop), inputs, function=function)
    assert zeroed(code) == []
    assert all("_unread" in decisions[stage].outcome for stage in ("moe_expert_up", "moe_expert_down"))
    check(code, function, inputs)


@pytest.mark.parametrize("loop", [Loop(), Loop(tma=True)], ids=["plain", "tma"])
@pytest.mark.parametrize(
    ("function", "written"),
    [
        (without_ids, ["down"]),
        (of_other_ids, ["down"]),
        (of_more_experts, ["down"]),
        (read_elsewhere, ["down"]),
        (changed_between, ["up"]),
    ],
)
def test_zeros_are_written_where_something_is_read(function, written, loop, monkeypatch):
    inputs = inputs_of()
    code, _ = generate(monkeypatch, Schedule(16, 16, 16, 4, 3, loop), inputs, function=function)
    assert zeroed(code) == written
    check(code, function, inputs)


def test_slots_of_no_expert_are_not_read(monkeypatch):
    """NaN in them and nowhere else."""
    weights_TK, ids_TK = torch.rand(9, 3), torch.randint(-2, 7, (9, 3))
    inside_N = ((ids_TK >= 0) & (ids_TK < 4)).reshape(-1, 1)
    slots_NH = torch.where(inside_N, torch.randn(27, 32), torch.nan)

    def combined(slots_NH, weights_TK, ids_TK):
        return ops.moe_combine(slots_NH, weights_TK, ids_TK, 4)

    code, _ = generate(monkeypatch, None, [slots_NH, weights_TK, ids_TK], function=combined)
    (found,) = interpreter().graph(code, combined, [slots_NH, weights_TK, ids_TK])
    wanted = ops.moe_combine(torch.where(inside_N, slots_NH, 0.0), weights_TK)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(combined(slots_NH, weights_TK, ids_TK), wanted)
