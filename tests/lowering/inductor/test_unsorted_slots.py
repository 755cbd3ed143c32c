"""Few slots are sorted by the first expert GEMM: that it sorts them right, and where a kernel of its own does it."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lowering.inductor import unsorted_slots
from lowering.inductor.offline import offline_source
from lowering.inductor.passes import register_lowerings
from lowering.ops.moe_dispatch import moe_dispatch
from lowering.report import collect
from tests.support.interpreter import interpreter
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

ops = torch.ops.diffulex
E, H, WIDTH = 5, 32, 16


def experts(hidden_TH, ids_TK, w13_EJH, w2_EHI):
    """The slots [N, H], and how they were sorted."""
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, E)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, ids_TK.shape[1], "swiglu")
    return ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1), order_N, offsets_E1


def inputs_of(tokens, top_k, seed=0, dtype=torch.int32):
    """Any ids, those of no expert and several times the same among them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(tokens, H), (E, 2 * WIDTH, H), (E, H, WIDTH)]
    hidden_TH, w13_EJH, w2_EHI = (torch.randn(size, generator=generator) for size in sizes)
    ids_TK = torch.randint(-1, E + 2, (tokens, top_k), generator=generator, dtype=dtype)
    return [hidden_TH, ids_TK, w13_EJH / 6, w2_EHI / 4]


def generated(function, inputs, *, dynamic=False):
    register_lowerings()
    torch._dynamo.reset()
    if dynamic:
        torch._dynamo.mark_dynamic(inputs[0], 0)
        torch._dynamo.mark_dynamic(inputs[1], 0)
    with collect() as decisions:
        code = offline_source(function, inputs)
    return code, [d.outcome for d in decisions if d.stage == "lower" and d.subject == "moe_dispatch"]


def check(code, inputs):
    slots_NH, order_N, offsets_E1 = interpreter().graph(code, experts, inputs)
    wanted_order_N, _, wanted_offsets_E1 = moe_dispatch(inputs[1], E)
    assert torch.equal(order_N, wanted_order_N)
    assert torch.equal(offsets_E1, wanted_offsets_E1)
    doubles = [t.double() if t.is_floating_point() else t for t in inputs]
    assert_oracle_ratio(slots_NH, experts(*inputs)[0], experts(*doubles)[0])


@pytest.fixture(scope="module")
def codes():
    return {}


@settings(max_examples=12, phases=(Phase.explicit, Phase.generate))
@given(
    size=st.sampled_from([(1, 1), (1, 8), (2, 3), (7, 5), (64, 1)]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 9999),
)
def test_what_is_sorted(codes, size, dtype, seed):
    inputs = inputs_of(*size, seed, dtype)
    if (size, dtype) not in codes:
        codes[size, dtype] = generated(experts, inputs)
    code, told = codes[size, dtype]
    assert told == ["in the kernel of moe_expert_up"]
    assert len(code.calls) == 2
    check(code, inputs)


@pytest.mark.parametrize("top_k", [1, 3])
def test_no_ids_of_experts(top_k):
    inputs = inputs_of(4, top_k)
    inputs[1] = torch.full_like(inputs[1], E)
    code, _ = generated(experts, inputs)
    slots_NH, order_N, offsets_E1 = interpreter().graph(code, experts, inputs)
    assert not slots_NH.any() and not offsets_E1.any()
    assert torch.equal(order_N, torch.arange(4 * top_k, dtype=torch.int32))


def test_many_slots_have_a_kernel_of_their_own():
    inputs = inputs_of(unsorted_slots.MOST_SLOTS + 1, 1)
    code, told = generated(experts, inputs)
    assert told == [f"triton moe_dispatch {E + 1} programs"]
    check(code, inputs)


def test_so_has_any_number_of_them():
    inputs = inputs_of(9, 2)
    code, told = generated(experts, inputs, dynamic=True)
    assert told[0].startswith("triton moe_dispatch")
    check(code, inputs_of(4, 2, seed=1))


def reads_tokens(hidden_TH, ids_TK, w13_EJH, w2_EHI):
    order_N, token_N, offsets_E1 = ops.moe_dispatch(ids_TK, E)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, ids_TK.shape[1], "swiglu")
    return act_NI, token_N


def reads_offsets_before(hidden_TH, ids_TK, w13_EJH, w2_EHI):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, E)
    counts_E = offsets_E1.diff() + 1
    hidden_TH = hidden_TH + counts_E.float().mean()
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, ids_TK.shape[1], "swiglu")
    return act_NI, counts_E


def sorts_alone(hidden_TH, ids_TK, w13_EJH, w2_EHI):
    return ops.moe_dispatch(ids_TK, E)[::2]


def second_stage_alone(hidden_TH, ids_TK, w13_EJH, w2_EHI):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, E)
    act_NI = hidden_TH[:, :WIDTH].repeat_interleave(ids_TK.shape[1], 0).contiguous()
    return ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)


def two_sorts(hidden_TH, ids_TK, w13_EJH, w2_EHI):
    """The order of one and the offsets of the other."""
    order_N, offsets_E1 = ops.moe_dispatch(ids_TK, E)[0], ops.moe_dispatch(ids_TK.flip(1), E)[2]
    return ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, ids_TK.shape[1], "swiglu")


@pytest.mark.parametrize("function", [reads_tokens, reads_offsets_before, sorts_alone, second_stage_alone, two_sorts])
def test_whoever_else_reads_them_finds_them_sorted(function):
    inputs = inputs_of(4, 3)
    code, told = generated(function, inputs)
    assert all(outcome.startswith("triton moe_dispatch") for outcome in told)
    wanted = torch.utils._pytree.tree_leaves(function(*inputs))
    for ours, theirs in zip(interpreter().graph(code, function, inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_second_reader_reads_what_the_first_one_sorted():
    def function(hidden_TH, ids_TK, w13_EJH, w2_EHI):
        order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, E)
        both = [
            ops.moe_expert_up(rows_TH, w13_EJH, None, order_N, offsets_E1, ids_TK.shape[1], "swiglu")
            for rows_TH in (hidden_TH, hidden_TH + 1)
        ]
        return both[0] + both[1]

    inputs = inputs_of(4, 3)
    code, told = generated(function, inputs)
    assert told == ["in the kernel of moe_expert_up"]
    (out,) = interpreter().graph(code, function, inputs)
    torch.testing.assert_close(out, function(*inputs))


def test_nothing_is_left_behind(monkeypatch):
    kept = {}
    monkeypatch.setattr(unsorted_slots, "_unsorted", kept)
    generated(experts, inputs_of(1, 2))
    assert list(kept.values()) == [{}]
