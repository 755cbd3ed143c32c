"""The slots of one token are not sorted where only its two expert GEMMs would see it: each is a row tile."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

import diffulex
from lowering.inductor.fake_device import H100 as FAKE
from lowering.inductor.offline import compile_kernels, offline_source
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from lowering.schedule.device import DeviceSpec
from lowering.schedule.plan import candidates
from lowering.schedule.schedule import GemmShape
from tests.support.interpreter import interpreter
from tests.support.oracle import assert_oracle_ratio
from tests.support.tuned import keep, tuned_folder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

ops = torch.ops.diffulex
E, H, WIDTH, SHARED = 5, 32, 16, 24
SLOTS = "nowhere: a slot is a row tile"
SORTED = "in the kernel of moe_expert_up"


def stages(hidden_TH, ids_TK, w13_EJH, w2_EHI, b13_EJ=None, b2_EH=None, act="swiglu"):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, E)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, b13_EJ, order_N, offsets_E1, ids_TK.shape[1], act)
    return ops.moe_expert_down(act_NI, w2_EHI, b2_EH, order_N, offsets_E1), act_NI, order_N


def plain(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, b13_EJ, b2_EH):
    return ops.moe_combine(stages(hidden_TH, ids_TK, w13_EJH, w2_EHI)[0], weights_TK)


def biased(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, b13_EJ, b2_EH):
    return ops.moe_combine(stages(hidden_TH, ids_TK, w13_EJH, w2_EHI, b13_EJ, b2_EH)[0], weights_TK)


def ungated(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, b13_EJ, b2_EH):
    slots_NH, _, _ = stages(hidden_TH, ids_TK, w13_EJH[:, :WIDTH], w2_EHI, act="relu2")
    return ops.moe_combine(slots_NH, weights_TK)


def transposed(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, b13_EJ, b2_EH):
    """Weights whose columns are consecutive."""
    w13_EJH, w2_EHI = (weight.transpose(1, 2).contiguous().transpose(1, 2) for weight in (w13_EJH, w2_EHI))
    return ops.moe_combine(stages(hidden_TH, ids_TK, w13_EJH, w2_EHI)[0], weights_TK)


def with_shared(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, w1_SH, w3_SH, w2_HS):
    """A pass takes the shared expert into the stages."""
    shared_TH = (silu(hidden_TH @ w1_SH.t()) * (hidden_TH @ w3_SH.t())) @ w2_HS.t()
    return ops.moe_combine(stages(hidden_TH, ids_TK, w13_EJH, w2_EHI)[0], weights_TK) + shared_TH


def inputs_of(top_k, seed=0, dtype=torch.int32, tokens=1, shared=False, experts=E):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(tokens, H), (tokens, top_k), (experts, 2 * WIDTH, H), (experts, H, WIDTH)]
    sizes += [(SHARED, H), (SHARED, H), (H, SHARED)] if shared else [(experts, 2 * WIDTH), (experts, H)]
    hidden_TH, weights_TK, *weights = (torch.randn(size, generator=generator) / 4 for size in sizes)
    ids_TK = torch.randint(-1, experts + 2, (tokens, top_k), generator=generator, dtype=dtype)
    return [hidden_TH, ids_TK, weights_TK, *weights]


def generated(function, inputs, **options):
    register_lowerings()
    torch._dynamo.reset()
    with collect() as decisions:
        code = offline_source(function, inputs, **options)
    return code, [d.outcome for d in decisions if d.stage == "lower" and d.subject == "moe_dispatch"]


def check(code, function, inputs):
    (out,) = interpreter().graph(code, function, inputs)
    doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    assert_oracle_ratio(out, function(*inputs), function(*doubles))


@pytest.fixture(scope="module")
def codes():
    return {}


@settings(max_examples=16, phases=(Phase.explicit, Phase.generate))
@given(
    function=st.sampled_from([plain, biased, ungated, transposed, with_shared]),
    form=st.sampled_from([(1, torch.int32), (4, torch.int64)]),
    seed=st.integers(0, 9999),
)
def test_one_token(codes, function, form, seed):
    """Any ids: those of no expert and several times the same among them."""
    top_k, dtype = form
    inputs = inputs_of(top_k, seed, dtype, shared=function is with_shared)
    if (function, top_k, dtype) not in codes:
        codes[function, top_k, dtype] = generated(function, inputs)
    code, told = codes[function, top_k, dtype]
    assert told == [SLOTS]
    gemms = [kernel for kernel in code.kernels if "moe_expert" in kernel.name]
    assert len(gemms) == 2 and all("arg_ORDER" not in kernel.source for kernel in gemms)
    assert ("SHARED_A" in gemms[0].source) == (function is with_shared)
    check(code, function, inputs)


def test_ids_that_are_none(codes):
    inputs = inputs_of(3)
    for value in (-1, E, torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min, 2**32):
        inputs[1] = torch.full((1, 3), value, dtype=torch.int64)
        if "none" not in codes:
            codes["none"] = generated(biased, inputs)[0]
        (out,) = interpreter().graph(codes["none"], biased, inputs)
        assert not out.any()


def test_the_kernels_compile():
    code, told = generated(plain, [t.bfloat16() if t.is_floating_point() else t for t in inputs_of(4)])
    assert told == [SLOTS]
    facts = compile_kernels(code)
    assert len(facts) == 2 and not any(fact.spill_bytes for fact in facts)


def shows_the_order(*inputs):
    slots_NH, _, order_N = stages(inputs[0], inputs[1], *inputs[3:5])
    return slots_NH, order_N


def shows_act(*inputs):
    slots_NH, act_NI, _ = stages(inputs[0], inputs[1], *inputs[3:5])
    return slots_NH, act_NI


def changes_act(*inputs):
    """A weight for each row in expert order: rows in another order would get others."""
    order_N, _, offsets_E1 = ops.moe_dispatch(inputs[1], E)
    act_NI = ops.moe_expert_up(inputs[0], inputs[3], None, order_N, offsets_E1, inputs[1].shape[1], "swiglu")
    rows_N = torch.arange(1, act_NI.shape[0] + 1, device=act_NI.device)
    return ops.moe_expert_down(act_NI * rows_N[:, None], inputs[4], None, order_N, offsets_E1)


def three_readers(*inputs):
    order_N, _, offsets_E1 = ops.moe_dispatch(inputs[1], E)
    act_NI = ops.moe_expert_up(inputs[0], inputs[3], None, order_N, offsets_E1, inputs[1].shape[1], "swiglu")
    more_NI = ops.moe_expert_up(inputs[0] + 1, inputs[3], None, order_N, offsets_E1, inputs[1].shape[1], "swiglu")
    return ops.moe_expert_down(act_NI, inputs[4], None, order_N, offsets_E1), more_NI


@pytest.mark.parametrize("function", [shows_the_order, shows_act, changes_act, three_readers])
def test_whoever_would_see_it_finds_them_sorted(function):
    inputs = inputs_of(4)
    code, told = generated(function, inputs)
    assert told == [SORTED]
    wanted = torch.utils._pytree.tree_leaves(function(*inputs))
    for ours, theirs in zip(interpreter().graph(code, function, inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_two_tokens_are_sorted():
    inputs = inputs_of(4, tokens=2)
    code, told = generated(plain, inputs)
    assert told == [SORTED]
    check(code, plain, inputs)


def test_more_slots_than_experts_are_sorted():
    inputs = inputs_of(E + 1)
    code, told = generated(plain, inputs)
    assert told == [SORTED]
    check(code, plain, inputs)


def test_results_that_do_not_depend_on_the_batch_come_in_one_order():
    with diffulex.batch_invariant():
        _, told = generated(plain, inputs_of(4))
    assert told[0].startswith("triton moe_dispatch")


@pytest.mark.parametrize("function", [plain, biased, with_shared])
@pytest.mark.parametrize("stage", ["up", "down"])
@pytest.mark.parametrize("tma", [False, True])
def test_a_tuned_schedule_for_rows_in_order_has_another_loop_here(tma, stage, function, tmp_path):
    """Kernels that read slots where they stand have its tiles, with no groups and by pointers."""
    device = DeviceSpec.of_properties(FAKE)
    dtype = torch.float16 if tma else torch.float32
    depth, width = (H, WIDTH) if stage == "up" else (WIDTH, H)
    shape = GemmShape(E, depth, width, stage == "up", dtype.itemsize)
    loops = (found for found in candidates(shape, device) if found.loop.tma == tma)
    schedule = next(found for found in loops if tma or found.loop.grouped)
    inputs = inputs_of(4, shared=function is with_shared)
    inputs = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs]
    with tuned_folder(tmp_path), collect() as decisions:
        keep(device, {shape: {4: {schedule: 1e-6}}})
        code, told = generated(function, inputs)
    assert told == [SLOTS]
    reasons = [decision.reason.detail for decision in decisions if decision.stage == "lower" and decision.reason]
    assert [reason.endswith("for rows that are sorted") for reason in reasons] == ([True] if function is biased else [])
    vectors = any("_row_of_expert" in kernel.source for kernel in code.kernels)
    tiles = f"BLOCK_M : tl.constexpr = {schedule.block_m}\n"
    assert vectors == (function is not biased) and not code.extern_calls
    assert any(tiles in kernel.source for kernel in code.kernels) == (function is biased)
    check(code, function, inputs)


def test_a_tuned_loop_that_a_shared_expert_cannot_have_here_is_told(tmp_path):
    """The down stage stays with the GEMM, as its slots are shown; it reads them in place, with the shared expert."""

    def shown(*inputs):
        slots_NH, _, _ = stages(inputs[0], inputs[1], *inputs[3:5])
        w1_SH, w3_SH, w2_HS = inputs[5:]
        shared_TH = (silu(inputs[0] @ w1_SH.t()) * (inputs[0] @ w3_SH.t())) @ w2_HS.t()
        return ops.moe_combine(slots_NH, inputs[2]) + shared_TH + slots_NH.sum(0)

    device, shape = DeviceSpec.of_properties(FAKE), GemmShape(E, WIDTH, H, False, 4)
    schedule = next(found for found in candidates(shape, device) if found.loop.grouped and not found.loop.tma)
    inputs = inputs_of(4, shared=True)
    with tuned_folder(tmp_path), collect() as decisions:
        keep(device, {shape: {4: {schedule: 1e-6}}})
        code, told = generated(shown, inputs)
    assert told == [SLOTS] and not code.extern_calls
    (reason,) = [decision.reason for decision in decisions if decision.stage == "lower" and decision.reason]
    assert reason.detail == f"{schedule} is for rows that are sorted"
    check(code, shown, inputs)
