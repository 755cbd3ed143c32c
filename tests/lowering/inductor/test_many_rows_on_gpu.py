"""The kernels for many rows on a real GPU, eager and compiled: bf16, real tiles, symbolic token counts, CUDA graphs."""

import concurrent.futures
import dataclasses

import pytest
import torch

from lowering.inductor import lowerings
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from lowering.schedule.schedule import Loop, Schedule
from lowering.templates import eager
from tests.support.inputs import BlockForm, make_block, sort_slots
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.gpu

ops = torch.ops.diffulex
SCHEDULES = [
    Schedule(128, 128, 64, 8, 3, Loop(grouped=True)),
    Schedule(128, 128, 64, 8, 4, Loop(tma=True)),
    Schedule(128, 128, 64, 8, 4, Loop(tma=True, flatten=True, subtiles=2)),
    Schedule(64, 128, 64, 4, 4, Loop(tma=True, flatten=True)),
]
FORM = BlockForm(tokens=3000, top_k=3, experts=7, hidden=520, width=328, ids="sentinels", dtype=torch.bfloat16)


def chain(hidden_TH, w13_EJH, w2_EHI, order_N, offsets_E1, interleaved=False):
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, FORM.top_k, "swiglu", interleaved)
    return torch.tanh(ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)) + 1.0


def inputs_of(form):
    block = make_block(form, "cuda")
    slots = sort_slots(block.ids_TK.cpu(), form.experts)
    return [block.hidden_TH, block.w13_EJH, block.w2_EHI, slots.order_N.cuda(), slots.offsets_E1.cuda()]


def assert_right(ours, inputs, interleaved=False):
    """By ratio to the ops on the CPU in the same dtype."""
    inputs = [tensor.cpu() for tensor in inputs]
    doubles = [t.double() if t.is_floating_point() else t for t in inputs]
    assert_oracle_ratio(ours.cpu(), chain(*inputs, interleaved), chain(*doubles, interleaved))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_eager(schedule, interleaved, transposed):
    inputs = inputs_of(FORM.replace(transposed=transposed))
    hidden_TH, w13_EJH, w2_EHI, order_N, offsets_E1 = inputs
    act_NI = eager.moe_expert_up(
        hidden_TH, w13_EJH, None, order_N, offsets_E1, act="swiglu", interleaved=interleaved, schedule=schedule
    )
    slots_NH = eager.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1, schedule=schedule)
    assert_right(torch.tanh(slots_NH) + 1.0, inputs, interleaved)


@pytest.mark.parametrize(("mode", "transposed"), [(None, False), (None, True), ("reduce-overhead", False)])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_compiled(schedule, mode, transposed, monkeypatch):
    monkeypatch.setattr(lowerings, "schedule_of", lambda rows, shape, device: (schedule, None))
    register_lowerings()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        compiled = torch.compile(chain, dynamic=True, mode=mode, fullgraph=True)
        for tokens in (FORM.tokens, 40, 4096):
            inputs = inputs_of(FORM.replace(tokens=tokens, transposed=transposed))
            for _ in range(3):
                out = compiled(*inputs).clone()
            assert_right(out, inputs)


def known(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, FORM.experts)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, FORM.top_k, "swiglu")
    slots_NH = ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)
    return ops.moe_combine(slots_NH, weights_TK, ids_TK, FORM.experts)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rows_that_nobody_writes_are_not_read(schedule, monkeypatch):
    """Those of no expert, in memory that holds NaN."""
    monkeypatch.setattr(lowerings, "schedule_of", lambda rows, shape, device: (schedule, None))
    register_lowerings()
    torch._dynamo.reset()
    block = make_block(FORM, "cuda")
    inputs = [block.hidden_TH, block.ids_TK, block.weights_TK, block.w13_EJH, block.w2_EHI]
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad(), collect() as decisions:
        compiled = torch.compile(known, dynamic=False, fullgraph=True)
        compiled(*inputs)
        torch.cuda.empty_cache()
        torch.full((2**27,), torch.nan, dtype=FORM.dtype, device="cuda")  # what the allocator gives out again
        out_TH = compiled(*inputs)
    outcomes = {decision.subject: decision.outcome for decision in decisions if decision.stage == "lower"}
    assert all("_unread" in outcomes[stage] for stage in ("moe_expert_up", "moe_expert_down")), outcomes
    inputs = [tensor.cpu() for tensor in inputs]
    doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    assert_oracle_ratio(out_TH.cpu(), known(*inputs), known(*doubles))


def in_thread(function, *args):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def test_threads_that_set_no_allocator(monkeypatch):
    """Descriptors lie in memory that triton asks for, by thread."""
    monkeypatch.setattr(lowerings, "schedule_of", lambda rows, shape, device: (SCHEDULES[2], None))
    register_lowerings()
    torch._dynamo.reset()
    inputs = inputs_of(FORM)
    order_N, offsets_E1 = inputs[3:]

    def up(schedule):
        return eager.moe_expert_up(*inputs[:2], None, order_N, offsets_E1, act="swiglu", schedule=schedule)

    wanted = up(SCHEDULES[2])
    assert torch.equal(in_thread(up, SCHEDULES[2]), wanted)
    assert torch.equal(in_thread(up, dataclasses.replace(SCHEDULES[2], num_stages=3)), wanted)  # compiled there, too
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        compiled = torch.compile(chain, fullgraph=True)
        assert_right(compiled(*inputs), inputs)
        assert torch.equal(in_thread(torch.no_grad()(compiled), *inputs), compiled(*inputs))
