"""A shared expert's products in the routed experts' kernels, or beside them: which, and that both compute the same."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

import diffulex  # noqa: F401  the pass that finds shared experts
from lowering.errors import ReasonCode
from lowering.inductor import lowerings, shared_lowerings
from lowering.inductor.offline import compile_kernels, offline_source
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from lowering.schedule.schedule import Loop, Schedule
from tests.lowering.inductor.test_generated_block import ONCE, WIDTH, E, H, K, check

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

ops = torch.ops.diffulex
SHARED = 40


def experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, act):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, E)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, K, act)
    return ops.moe_combine(ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1), weights_TK)


def block(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, w1_SH, w3_SH, shared_w2_HS):
    """Experts, and a shared one as models write it: a pass takes it into the stages."""
    shared_TH = (silu(hidden_TH @ w1_SH.t()) * (hidden_TH @ w3_SH.t())) @ shared_w2_HS.t()
    return hidden_TH + experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, "swiglu") + torch.tanh(shared_TH)


def ungated(hidden_TH, ids_TK, weights_TK, w1_EIH, w2_EHI, w1_SH, shared_w2_HS):
    shared_TH = torch.relu(hidden_TH @ w1_SH.t()).square() @ shared_w2_HS.t()
    return experts(hidden_TH, ids_TK, weights_TK, w1_EIH, w2_EHI, "relu2") + shared_TH


def inputs(tokens, seed, dtype=torch.float32, hidden=H, width=WIDTH, shared=SHARED):
    """Ids include E, which is no expert."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(tokens, hidden), (E, 2 * width, hidden), (E, hidden, width)]
    sizes += [(shared, hidden), (shared, hidden), (hidden, shared)]
    hidden_TH, *weights = (
        (torch.randn(size, generator=generator, dtype=torch.float64) * size[-1] ** -0.5).to(dtype) for size in sizes
    )
    ids_TK = torch.randint(0, E + 1, (tokens, K), generator=generator, dtype=torch.int32)
    return [hidden_TH * 6, ids_TK, torch.rand(tokens, K, generator=generator), *weights]


def ungated_inputs(tokens, seed):
    hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, w1_SH, _, shared_w2_HS = inputs(tokens, seed)
    return [hidden_TH, ids_TK, weights_TK, w13_EJH[:, :WIDTH], w2_EHI, w1_SH, shared_w2_HS]


def generated(fn, tensors, *, dynamic=True, most=math.inf):
    """`most` row tiles in the kernel: so small a model has one range of rows, without an end."""
    register_lowerings()
    for tensor in tensors[:3] if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_lowerings, "MAX_ROW_TILES", most)
        return offline_source(fn, tensors)


@pytest.fixture(scope="module")
def code():
    return generated(block, inputs(16, 0))


@pytest.fixture(scope="module")
def ungated_code():
    return generated(ungated, ungated_inputs(16, 0))


def test_the_shared_expert_costs_no_kernel(code, ungated_code):
    for found in (code, ungated_code):
        assert len(found.calls) == 4 and found.extern_calls == ()
        assert found.kernel("moe_expert_up_shared") and found.kernel("moe_expert_down_shared")


@settings(max_examples=6, phases=ONCE)
@given(tokens=st.integers(2, 40), seed=st.integers(0, 9999))
def test_in_the_kernels(code, tokens, seed):
    check(code, block, inputs(tokens, seed))


@settings(max_examples=4, phases=ONCE)
@given(tokens=st.integers(2, 40), seed=st.integers(0, 9999))
def test_ungated_in_the_kernels(ungated_code, tokens, seed):
    check(ungated_code, ungated, ungated_inputs(tokens, seed))


@pytest.mark.parametrize("tokens", [1, 7])
def test_fixed_token_counts(tokens):
    tensors = inputs(tokens, tokens)
    check(generated(block, tensors, dynamic=False), block, tensors)


def test_weights_of_symbolic_sizes():
    """All of them inputs of one graph for any sizes, as with `dynamic=True` and weights that no module holds."""
    tensors = inputs(16, 0)
    for tensor in tensors:
        for dim in range(tensor.dim()):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    found = generated(block, tensors, dynamic=False)
    assert found.extern_calls == () and found.kernel("moe_expert_up_shared")
    check(found, block, tensors)


def test_no_tokens():
    tensors = inputs(0, 0)
    assert generated(block, tensors, dynamic=False).extern_calls == ()


def test_rows_of_another_width():
    """The shared expert may read other rows than the experts: latent projections narrow only those of the experts."""

    def latent(wide_TD, down_HD, ids_TK, weights_TK, w13_EJH, w2_EHI, w1_SD, w3_SD, shared_w2_HS):
        shared_TH = (silu(wide_TD @ w1_SD.t()) * (wide_TD @ w3_SD.t())) @ shared_w2_HS.t()
        return experts(wide_TD @ down_HD.t(), ids_TK, weights_TK, w13_EJH, w2_EHI, "swiglu") + shared_TH

    narrow, wide = inputs(7, 3), inputs(7, 4, hidden=2 * H)
    tensors = [wide[0], wide[0], *narrow[1:5], wide[5], wide[6], narrow[7]]
    tensors[1] = torch.randn(H, 2 * H, generator=torch.Generator().manual_seed(5)) / 8
    found = generated(latent, tensors, dynamic=False)
    assert found.extern_calls == ("extern_kernels.mm",)
    check(found, latent, tensors)


def beside(tensors, **options):
    with collect() as decisions:
        found = generated(block, tensors, dynamic=False, **options)
    reasons = {d.outcome.split()[0]: d.reason for d in decisions if d.subject == "shared_expert"}
    return found, reasons


def test_many_row_tiles_stand_beside():
    tensors = inputs(40, 5)
    found, reasons = beside(tensors, most=1)
    assert {stage: reason.code for stage, reason in reasons.items()} == dict.fromkeys(
        ("up", "down"), ReasonCode.SCHEDULE
    )
    assert len(found.extern_calls) == 3
    check(found, block, tensors)


def test_what_cannot_be_read_alike_stands_beside():
    tensors = inputs(5, 6)
    tensors[5] = tensors[5].t().contiguous().t()
    found, reasons = beside(tensors)
    assert [(stage, reason.code) for stage, reason in reasons.items()] == [("up", ReasonCode.LAYOUT)]
    assert len(found.extern_calls) == 2
    check(found, block, tensors)


def test_gate_and_up_are_read_by_one_stride():
    tensors = inputs(5, 7)
    tensors[5] = torch.cat((tensors[5], tensors[5]), 1)[:, :H]
    found, reasons = beside(tensors)
    assert [(stage, reason.code) for stage, reason in reasons.items()] == [("up", ReasonCode.LAYOUT)]
    check(found, block, tensors)


def test_halves_of_one_weight():
    def merged(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, both_JH, shared_w2_HS):
        gate_TS, up_TS = (hidden_TH @ both_JH.t()).chunk(2, -1)
        shared_TH = (silu(gate_TS) * up_TS) @ shared_w2_HS.t()
        return experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, "swiglu") + shared_TH

    tensors = inputs(7, 8)
    tensors[5:7] = [torch.cat(tensors[5:7])]
    found = generated(merged, tensors, dynamic=False)
    assert found.extern_calls == ()
    check(found, merged, tensors)


def test_widths_that_are_no_multiple_of_a_block(monkeypatch):
    """The experts' widths are multiples of the depth of a tile, the shared expert's is not: its last step is masked."""
    schedule = Schedule(16, 16, 16, 4, 3)
    monkeypatch.setattr(lowerings, "schedule_of", lambda rows, shape, device: (schedule, None))
    tensors = inputs(7, 9, width=32, shared=40)
    check(generated(block, tensors), block, tensors)


def test_ids_of_no_expert_alone(code):
    """A rank whose tokens all go elsewhere: its shared expert still runs."""
    tensors = inputs(9, 10)
    tensors[1] = torch.full_like(tensors[1], E)
    check(code, block, tensors)


def test_routed_programs_write_routed_rows_alone(code):
    """Both kinds of programs run at once on a GPU; the interpreter runs one after the other and would not tell."""
    for stage in ("moe_expert_up_shared", "moe_expert_down_shared"):
        text = code.kernel(stage).function
        shared, routed = re.search(r"mask=mask & is_shared\)\s+mask = mask & (\w+)", text), "is_routed"
        assert shared and shared[1] == routed


def test_where_the_bound_lies():
    few = Schedule(16, 128, 128, 4, 3)
    most = shared_lowerings.MAX_ROW_TILES * 16
    assert shared_lowerings._size_refusal(few, 8 * most, 8) is None
    assert shared_lowerings._size_refusal(few, 8 * (most + 1), 8).code is ReasonCode.SCHEDULE
    assert shared_lowerings._size_refusal(few, None, 8).code is ReasonCode.SCHEDULE
    assert shared_lowerings._size_refusal(dataclasses.replace(few, loop=Loop(tma=True)), 8, 8) is not None


def test_what_the_compiler_makes_of_it():
    tensors = inputs(8, 0, dtype=torch.bfloat16, hidden=1024, width=512, shared=1024)
    found = generated(block, tensors)
    shared = tuple(kernel for kernel in found.kernels if "_shared" in kernel.name)
    facts = compile_kernels(dataclasses.replace(found, kernels=shared))
    assert len(facts) == 2
    assert all(kernel.spill_bytes == 0 and kernel.cp_async > 0 for kernel in facts)
