"""What the lowerings generate for an H100: which kernels, what fuses into them, that they compute the right thing in
Triton's interpreter; what gets no kernel, and the reason it is recorded with.
"""

import dataclasses
import sys

import pytest
import torch

from lowering.errors import ReasonCode
from lowering.inductor import lowerings, unsorted_slots
from lowering.inductor.fake_device import A100, B200, H100
from lowering.inductor.offline import compile_kernels, offline_source
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from tests.support.blocks import Block
from tests.support.inputs import WIDE, BlockForm, make_block, sort_slots
from tests.support.interpreter import interpreter
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

ops = torch.ops.diffulex
SMALL = BlockForm(tokens=6, top_k=2, experts=4, hidden=32, width=16, dtype=torch.float32)


def code_of(function, inputs, **options):
    """The generated code, and the decisions of the lowerings."""
    register_lowerings()
    torch._dynamo.reset()
    with collect() as decisions:
        code = offline_source(function, inputs, **options)
    return code, {d.subject: d for d in decisions if d.stage == "lower"}


def check(code, function, inputs):
    (out,) = interpreter().graph(code, function, inputs)
    doubles = [t.double() if t.is_floating_point() else t for t in inputs]
    assert_oracle_ratio(out, function(*inputs), function(*doubles))


def kernel_names(code):
    stages = ("moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine")
    return [next((stage for stage in stages if stage in name), name) for name in code.calls]


FORMS = {
    "plain": SMALL,
    "gpt_oss": SMALL.replace(act="swiglu_oai", bias=True, interleaved=True, transposed=True),
    "ungated": SMALL.replace(act="relu2"),
    "biased": SMALL.replace(act="geglu", bias=True, hidden=48),
    "sentinels": SMALL.replace(ids="sentinels", bias=True),
    "top1": SMALL.replace(top_k=1),
    "top8": SMALL.replace(top_k=8, experts=9),
    "primes": SMALL.replace(tokens=7, hidden=11, width=5, experts=7),
    "fp16": SMALL.replace(dtype=torch.float16),
    "more": SMALL.replace(tokens=33, ids="sentinels"),
    "transposed": SMALL.replace(tokens=40, transposed=True, hidden=24, width=20),
}
EXPERTS = ["moe_expert_up", "moe_expert_down", "moe_combine"]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_kernels_compute_the_block(form):
    """One per stage, but for few slots; residual and norm are in that of the combine; no weights are copied."""
    function = Block(form)
    inputs = function.inputs()
    code, decisions = code_of(function, inputs)
    sorted_apart = form.tokens * form.top_k > unsorted_slots.MOST_SLOTS
    assert kernel_names(code) == [*(["moe_dispatch"] if sorted_apart else []), *EXPERTS]
    assert code.extern_calls == ()
    combine = code.kernel("moe_combine").function
    assert "rsqrt" in combine
    assert combine.count("tl.store") == 1
    assert {name: decision.reason for name, decision in decisions.items()} == dict.fromkeys(["moe_dispatch", *EXPERTS])
    check(code, function, inputs)


@pytest.mark.parametrize("act", ["swiglu_oai", "swiglu", "relu2"])
@pytest.mark.parametrize("tokens", [2, 4096])
def test_transposed_weights_are_read_many_at_a_time(act, tokens):
    """Asynchronous copies of 4 bytes or more; without them a model of GPT-OSS's sizes took 30 times as long."""
    form = SMALL.replace(tokens=tokens, hidden=1024, width=512, act=act, interleaved=act == "swiglu_oai")
    function = Block(form.replace(transposed=True, dtype=torch.bfloat16))
    code, _ = code_of(function, function.inputs())
    experts = tuple(kernel for kernel in code.kernels if "moe_expert" in kernel.name)
    for facts in compile_kernels(dataclasses.replace(code, kernels=experts)):
        assert facts.cp_async + facts.tma and not facts.spill_bytes, facts
        assert (facts.tma > 0) == (tokens == 4096), facts


def test_one_kernel_for_the_router():
    def route(logits_TE, bias_E):
        weights_TK, ids_TK = ops.moe_route(logits_TE, bias_E, None, 2, "sigmoid", 2, 1)
        return weights_TK, ids_TK

    inputs = [torch.randn(7, 8), torch.randn(8)]
    code, decisions = code_of(route, inputs)
    assert (len(code.calls), code.extern_calls) == (1, ())
    assert decisions["moe_route"].outcome.startswith("triton moe_route")
    weights_TK, ids_TK = interpreter().graph(code, route, inputs)
    wanted_weights_TK, wanted_ids_TK = route(*inputs)
    assert torch.equal(ids_TK, wanted_ids_TK)
    torch.testing.assert_close(weights_TK, wanted_weights_TK)


def test_pointwise_neighbours_go_into_the_expert_kernels():
    """A scale per column behind the up stage, a function of the result behind the down stage."""

    def function(hidden_TH, ids_TK, scale_I, w13_EJH, w2_EHI):
        order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, SMALL.experts)
        act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, SMALL.top_k, "swiglu") * scale_I
        return torch.tanh(ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)) + 1.0

    block = make_block(SMALL)
    inputs = [block.hidden_TH, block.ids_TK, torch.randn(SMALL.width), block.w13_EJH, block.w2_EHI]
    code, _ = code_of(function, inputs)
    assert kernel_names(code) == ["moe_expert_up", "moe_expert_down"]
    assert "tanh" in code.kernel("moe_expert_down").function
    check(code, function, inputs)


@pytest.mark.parametrize("indices", [(False, False), (True, False), (False, True), (True, True)])
def test_weight_gradients(indices):
    def function(left, right, index_N, offsets_E1):
        left_index, right_index = (index_N if used else None for used in indices)
        return ops.moe_expert_grad_weight(left, right, left_index, right_index, offsets_E1) * 2.0

    slots = sort_slots(make_block(SMALL).ids_TK, SMALL.experts)
    rows = SMALL.tokens * SMALL.top_k
    inputs = [torch.randn(rows, 24), torch.randn(rows, 40), slots.order_N, slots.offsets_E1]
    code, decisions = code_of(function, inputs)
    assert (len(code.calls), code.extern_calls) == (1, ())
    assert decisions["moe_expert_grad_weight"].reason is None
    check(code, function, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [64, 8192])
@pytest.mark.parametrize("gpu", [A100, H100, B200], ids=lambda gpu: f"sm_{gpu.arch}")
def test_a_real_shape_compiles_without_spills(gpu, tokens):
    form = WIDE.replace(tokens=tokens, top_k=8, experts=64, hidden=2048, width=768, dtype=torch.bfloat16)
    function = Block(form)
    with torch.device("meta"):
        sizes = ((tokens, 2048), (64, 1536, 2048), (64, 2048, 768))
        hidden_TH, w13_EJH, w2_EHI = (torch.empty(size, dtype=torch.bfloat16) for size in sizes)
        inputs = [hidden_TH, torch.empty(tokens, 8, dtype=torch.int32), torch.empty(tokens, 8), w13_EJH, w2_EHI]
    code, _ = code_of(function, inputs, gpu=gpu)
    for facts in compile_kernels(code):
        assert facts.spill_bytes == 0, facts
        assert facts.shared_bytes <= gpu.shared_memory_per_block_optin, facts
        if "expert" in facts.name and tokens > 64:
            assert (facts.wgmma > 0) == (gpu is H100), facts
        if gpu is A100:
            assert facts.tma == 0, facts


def test_outputs_beyond_32_bits_of_a_symbolic_size_compile():
    """Inductor passes sizes as int64 then; the kernel's row numbers stay int32."""
    rows, hidden, width = 320_000, 7168, 32
    act, w2 = torch.empty(rows, width, dtype=torch.bfloat16), torch.empty(4, hidden, width, dtype=torch.bfloat16)
    order, offsets = torch.empty(rows, dtype=torch.int32), torch.empty(5, dtype=torch.int32)

    def function(act, w2, order, offsets):
        return ops.moe_expert_down(act, w2, None, order, offsets)

    code, _ = code_of(function, [act, w2, order, offsets], dynamic=True)
    assert len(compile_kernels(code)) == 1
    assert "'i64'" in code.kernels[0].source


# What gets no kernel


@pytest.mark.parametrize("ids", [None, torch.tensor([[0, 1, 2], [-1, 2, 9]])], ids=["all", "of experts"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_which_products_of_the_combine_are_rounded_is_said(top_k, ids):
    """None of them: left to the assembler, it would depend on what the kernel is fused with."""
    slots, weights, other = torch.randn(2 * top_k, 8), torch.rand(2, top_k), torch.randn(2, 8)
    inputs = [slots, weights, other] if ids is None else [slots, weights, other, ids[:, :top_k].contiguous()]

    def added(slots, weights, other, ids=None):
        return other + ops.moe_combine(slots, weights, ids, 0 if ids is None else 4)

    code, _ = code_of(added, inputs)
    text = code.kernel("moe_combine").function
    assert text.count("tl.fma(") == top_k
    assert " * " not in "".join(line for line in text.splitlines() if "tmp" in line and "tl.load" not in line)
    check(code, added, inputs)


def test_fp64_weights_of_the_combine_take_the_op():
    """It computes in fp64 where either operand is, which the generated kernel does not."""
    slots, weights = torch.randn(6, 4), torch.rand(3, 2, dtype=torch.float64)
    _, decisions = code_of(lambda slots, weights: ops.moe_combine(slots, weights), [slots, weights])
    assert decisions["moe_combine"].reason.code is ReasonCode.DTYPE


def test_fp64_takes_the_ops_own_kernels():
    function = Block(SMALL)
    code, decisions = code_of(function, function.inputs(), dtype=torch.float64)
    for op in ("moe_expert_up", "moe_expert_down", "moe_combine"):
        assert f"torch.ops.diffulex.{op}.default" in code.extern_calls
        assert decisions[op].outcome == "the op's own kernel"
        assert decisions[op].reason.code is ReasonCode.DTYPE
    assert decisions["moe_dispatch"].reason is None


def test_the_cpu_takes_the_ops_own_kernels():
    """A real compilation: each op is a call of the wrapper, recorded with its reason, and the result is the ops'."""

    def function(logits_TE, hidden_TH, w13_EJH, w2_EHI):
        weights_TK, ids_TK = ops.moe_route(logits_TE, None, None, 2)
        order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, 4)
        act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, 2, "swiglu")
        return ops.moe_combine(ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1), weights_TK)

    block = make_block(SMALL)
    inputs = [torch.randn(SMALL.tokens, 4), block.hidden_TH, block.w13_EJH, block.w2_EHI]
    torch._dynamo.reset()
    with collect() as decisions, torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        out = torch.compile(function, fullgraph=True)(*inputs)
    lowered = {d.subject: d for d in decisions if d.stage == "lower"}
    assert list(lowered) == ["moe_route", "moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine"]
    assert {d.reason.code for d in lowered.values()} == {ReasonCode.NOT_CUDA}
    torch.testing.assert_close(out, function(*inputs))


class Value:
    """What `refusal` asks an IR node."""

    def __init__(self, device, dtype):
        self.get_device = lambda: torch.device(device)
        self.get_dtype = lambda: dtype


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "code"),
    [
        ("cuda", torch.bfloat16, (9, 0), None),
        ("cuda", torch.float32, (8, 0), None),
        ("cuda", torch.bfloat16, (7, 5), ReasonCode.CAPABILITY),
        ("cuda", torch.float64, (9, 0), ReasonCode.DTYPE),
        ("cuda", torch.int8, (9, 0), ReasonCode.DTYPE),
        ("cpu", torch.bfloat16, (9, 0), ReasonCode.NOT_CUDA),
        ("xpu", torch.bfloat16, (9, 0), ReasonCode.NOT_CUDA),
    ],
)
def test_refusals(device, dtype, capability, code, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = lowerings.refusal(Value(device, dtype))
    assert (reason and reason.code) == code


def test_many_slots_are_dispatched_by_two_kernels(monkeypatch):
    monkeypatch.setattr(sys.modules["lowering.ops.moe_dispatch"], "_FEW_SLOTS", 4)
    function = Block(SMALL.replace(tokens=40, ids="sentinels"))
    inputs = function.inputs()
    code, decisions = code_of(function, inputs)
    assert kernel_names(code) == ["moe_dispatch", "moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine"]
    assert "moe_dispatch_count, moe_dispatch_place 2 programs" in decisions["moe_dispatch"].outcome
    check(code, function, inputs)


# Expected texts


@pytest.mark.parametrize("stage", ["moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine"])
def test_kernel_texts(stage, expected, texts):
    expected(f"block_{stage}", texts.kernel(stage).function)


@pytest.fixture(scope="module")
def texts():
    function = Block(WIDE.replace(act="swiglu_oai", bias=True, interleaved=True, dtype=torch.bfloat16))
    return code_of(function, function.inputs())[0]
