"""The whole generated MoE block (wrapper, every template, the fused combine) computes on the CPU what the ops compute.

The code is what Inductor generates for a faked H100; Triton's interpreter runs it.
"""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lowering.inductor.offline import offline_source
from lowering.inductor.passes import register_lowerings
from tests.support.interpreter import interpreter
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

ops = torch.ops.diffulex
ONCE = (Phase.explicit, Phase.generate)  # shrinking would take hundreds of interpreted runs
E, H, WIDTH, K = 5, 32, 24, 3


def experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, E)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, K, "swiglu")
    slots_NH = ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)
    return hidden_TH + ops.moe_combine(slots_NH, weights_TK)


def block(hidden_TH, gate_EH, w13_EJH, w2_EHI):
    """Router, experts, residual and norm."""
    weights_TK, ids_TK = ops.moe_route(hidden_TH @ gate_EH.T, None, None, K)
    out_TH = experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI)
    return out_TH * torch.rsqrt(out_TH.square().mean(-1, keepdim=True) + 1e-6)


def expert_inputs(tokens, seed, dtype=torch.float32):
    """Ids include E, which is no expert: those slots contribute nothing."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(tokens, H), (tokens, K), (E, 2 * WIDTH, H), (E, H, WIDTH)]
    hidden_TH, weights_TK, w13_EJH, w2_EHI = (torch.randn(size, generator=generator, dtype=dtype) for size in sizes)
    ids_TK = torch.randint(0, E + 1, (tokens, K), generator=generator, dtype=torch.int32)
    return [hidden_TH, ids_TK, weights_TK.float(), w13_EJH / 6, w2_EHI / 5]


def block_inputs(tokens, seed):
    hidden_TH, _, _, w13_EJH, w2_EHI = expert_inputs(tokens, seed)
    return [hidden_TH, torch.randn(E, H, generator=torch.Generator().manual_seed(seed + 1)), w13_EJH, w2_EHI]


def generated(fn, inputs, marked):
    register_lowerings()
    for tensor in inputs[:marked]:
        torch._dynamo.mark_dynamic(tensor, 0)
    return offline_source(fn, inputs)


@pytest.fixture(scope="module")
def experts_code():
    return generated(experts, expert_inputs(16, 0), marked=3)


@pytest.fixture(scope="module")
def block_code():
    return generated(block, block_inputs(16, 0), marked=1)


def check(code, fn, inputs):
    (out,) = interpreter().graph(code, fn, inputs)
    double = [tensor.double() if tensor.is_floating_point() and tensor.shape[-1] != K else tensor for tensor in inputs]
    assert_oracle_ratio(out, fn(*inputs), fn(*double))


def test_every_stage_is_generated(block_code):
    assert len(block_code.calls) == 5 and block_code.extern_calls == ("extern_kernels.mm",)
    for stage in ("moe_route", "moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine"):
        assert block_code.kernel(stage)


@settings(max_examples=6, phases=ONCE)
@given(tokens=st.integers(2, 40), seed=st.integers(0, 9999))
def test_experts_with_slots_of_no_expert(experts_code, tokens, seed):
    check(experts_code, experts, expert_inputs(tokens, seed))


@settings(max_examples=4, phases=ONCE)
@given(tokens=st.integers(2, 40), seed=st.integers(0, 9999))
def test_block(block_code, tokens, seed):
    check(block_code, block, block_inputs(tokens, seed))
