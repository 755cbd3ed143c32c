"""The kernels for many rows as Inductor renders them: fused neighbours, slots of no expert, reasons for pointers."""

import pytest
import torch

from lowering.errors import ReasonCode
from lowering.inductor import lowerings
from lowering.inductor.offline import compile_kernels, offline_source
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from lowering.schedule.schedule import Loop, Schedule
from tests.support.blocks import Block
from tests.support.inputs import BlockForm, make_block
from tests.support.interpreter import interpreter
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

ops = torch.ops.diffulex
FORM = BlockForm(tokens=40, top_k=3, experts=5, hidden=32, width=24, ids="sentinels", dtype=torch.float32)
TMA = Loop(tma=True)
LOOPS = {
    "grouped": Loop(grouped=True),
    "tma": TMA,
    "flatten": Loop(tma=True, flatten=True, subtiles=2),
}


def block(hidden_TH, ids_TK, w13_EJH, w2_EHI, scale_H):
    """With a neighbour behind each expert GEMM that fuses into it."""
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, FORM.experts)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, FORM.top_k, "swiglu")
    slots_NH = ops.moe_expert_down(torch.relu(act_NI) + 0.5, w2_EHI, None, order_N, offsets_E1)
    return (torch.tanh(slots_NH) + 1.0) * scale_H


def block_inputs(form=FORM):
    parts = make_block(form)
    scale_H = torch.linspace(0.5, 1.5, form.hidden)
    return [parts.hidden_TH, parts.ids_TK, parts.w13_EJH, parts.w2_EHI, scale_H]


def generate(monkeypatch, schedule, inputs, *, dynamic=(), function=block):
    monkeypatch.setattr(lowerings, "schedule_of", lambda rows, shape, device: (schedule, None))
    register_lowerings()
    torch._dynamo.reset()
    for tensor, dim in dynamic:
        torch._dynamo.mark_dynamic(tensor, dim)
    with collect() as decisions:
        code = offline_source(function, inputs)
    return code, {d.subject: d for d in decisions if d.stage == "lower"}


@pytest.mark.parametrize(("dynamic", "transposed"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_neighbours_fuse_and_the_block_is_computed(loop, dynamic, transposed, monkeypatch):
    form = FORM.replace(transposed=transposed)
    inputs = block_inputs(form)
    symbolic = [(tensor, 0) for tensor in inputs[:2]] if dynamic else []
    code, decisions = generate(monkeypatch, Schedule(16, 16, 16, 4, 3, loop), inputs, dynamic=symbolic)
    assert code.extern_calls == ()
    assert len(code.calls) == 3
    assert "tanh" in code.kernel("moe_expert_down").function
    for stage in ("moe_expert_up", "moe_expert_down"):
        assert decisions[stage].reason is None
        assert ("make_tensor_descriptor" in code.kernel(stage).function) == loop.tma
    for other in (form, form.replace(tokens=7, ids="none")) if dynamic else (form,):
        inputs = block_inputs(other)
        (out,) = interpreter().graph(code, block, inputs)
        doubles = [t.double() if t.is_floating_point() else t for t in inputs]
        assert_oracle_ratio(out, block(*inputs), block(*doubles))


@pytest.mark.parametrize("transposed", [False, True])
def test_what_descriptors_do_not_take_is_recorded(transposed, monkeypatch):
    form, code = FORM.replace(hidden=30, width=17, transposed=transposed), ReasonCode.ALIGNMENT
    source, decisions = generate(monkeypatch, Schedule(16, 16, 16, 4, 3, TMA), block_inputs(form))
    for stage in ("moe_expert_up", "moe_expert_down"):
        assert decisions[stage].reason.code is code
        assert "make_tensor_descriptor" not in source.kernel(stage).function


WIDE = BlockForm(tokens=4096, top_k=4, experts=8, hidden=1024, width=512, dtype=torch.bfloat16)
NARROW = WIDE.replace(hidden=1020, width=506)


@pytest.mark.parametrize(
    ("form", "code", "dynamic"),
    [
        (WIDE, None, True),
        (WIDE.replace(transposed=True), None, True),
        (NARROW, ReasonCode.ALIGNMENT, False),
        (NARROW.replace(transposed=True), ReasonCode.ALIGNMENT, False),
        (NARROW, ReasonCode.ALIGNMENT, True),
        (NARROW.replace(tokens=2), None, False),  # so few rows want none
        (NARROW.replace(tokens=2), None, True),
        (NARROW.replace(dtype=torch.float32), None, False),
    ],
)
def test_weights_that_no_descriptor_reads_are_recorded_where_the_plan_wanted_one(form, code, dynamic):
    register_lowerings()
    torch._dynamo.reset()
    function = Block(form)
    inputs = function.inputs()
    for tensor in inputs[:3] if dynamic else []:
        torch._dynamo.mark_dynamic(tensor, 0)
    with collect() as decisions:
        source = offline_source(function, inputs)
    for stage in ("moe_expert_up", "moe_expert_down"):
        (found,) = (d for d in decisions if d.stage == "lower" and d.subject == stage)
        assert (found.reason and found.reason.code) == code
        assert found.outcome.startswith(("triton", "gluon")) and found.kernel_refusal is None
        if code:
            assert "make_tensor_descriptor" not in source.kernel(stage).function


def test_strides_are_those_the_kernel_is_written_for(monkeypatch):
    """Inductor lays out what a graph computes by who reads it, unless it is told to keep what it has."""

    def computed(hidden_TH, ids_TK, w13_EHJ, w2_EIH, scale_H):
        return block(hidden_TH, ids_TK, w13_EHJ.transpose(1, 2) * 2.0, w2_EIH.transpose(1, 2) * 2.0, scale_H)

    inputs = block_inputs()
    inputs[2:4] = [weight.transpose(1, 2).contiguous() for weight in inputs[2:4]]
    code, _ = generate(monkeypatch, Schedule(16, 16, 16, 4, 3, TMA), inputs, function=computed)
    (out,) = interpreter().graph(code, computed, inputs)
    doubles = [t.double() if t.is_floating_point() else t for t in inputs]
    assert_oracle_ratio(out, computed(*inputs), computed(*doubles))


def test_symbolic_strides_stay_symbolic(monkeypatch):
    """A refused operand does not tie the graph to its token count."""

    def down(act_IN, w2_EHI, order_N, offsets_E1):
        return ops.moe_expert_down(act_IN.t(), w2_EHI, None, order_N, offsets_E1)

    offsets = torch.tensor([0, 20, 40, 60, 80, 120], dtype=torch.int32)
    inputs = [torch.randn(32, 120), torch.randn(5, 16, 32), torch.arange(120, dtype=torch.int32), offsets]
    dynamic = ((inputs[0], 1), (inputs[2], 0))
    code, decisions = generate(monkeypatch, Schedule(16, 16, 16, 4, 3, TMA), inputs, dynamic=dynamic, function=down)
    assert decisions["moe_expert_down"].reason.code is ReasonCode.LAYOUT
    assert "120" not in code.kernel("moe_expert_down").function


def test_offsets_of_64_bits_compile(monkeypatch):
    def down(act_NI, w2_EHI, order_N, offsets_E1):
        return ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)

    dtype = torch.bfloat16
    inputs = [torch.empty(512, 64, dtype=dtype), torch.empty(5, 128, 64, dtype=dtype)]
    inputs += [torch.empty(512, dtype=torch.int64), torch.empty(6, dtype=torch.int64)]
    code, _ = generate(monkeypatch, Schedule(64, 64, 64, 4, 3, TMA), inputs, function=down)
    (facts,) = compile_kernels(code)
    assert facts.tma > 0


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_real_tiles_compile_without_spills(loop, monkeypatch):
    with torch.device("meta"):
        sizes = ((4096, 2048), (4096, 3), (5, 1536, 2048), (5, 2048, 768), (2048,))
        dtypes = (torch.bfloat16, torch.int32, torch.bfloat16, torch.bfloat16, torch.bfloat16)
        inputs = [torch.empty(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    code, _ = generate(monkeypatch, Schedule(128, 128, 64, 8, 3, loop), inputs)
    for facts in compile_kernels(code):
        assert facts.spill_bytes == 0, facts
        if "expert" in facts.name:
            assert facts.wgmma > 0, facts
            assert (facts.tma > 0) == loop.tma, facts
