"""`diffulex::moe_dispatch` against its oracle and its invariants: stable, complete, sentinels last; what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from lowering.errors import MoEDtypeError, MoERangeError, MoEShapeError
from lowering.ops import moe_dispatch
from lowering.ops.moe_dispatch import dispatch_schedule
from lowering.reference.moe_dispatch import moe_dispatch_reference
from lowering.templates import standalone
from lowering.templates.render import template_text
from tests.support.catalogue import assert_refused
from tests.support.inputs import DEVICES
from tests.support.interpreter import interpreter

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
INT_DTYPES = (torch.int32, torch.int64)
OUTSIDE = (-1, -(2**31), 2**31 - 1)
OUTSIDE_INT64 = (2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63))


def make_ids(kind, tokens, top_k, num_experts, dtype=torch.int32, seed=0):
    """even; skewed: half of the slots to one expert; few: two experts; outside: half of the ids; none is valid."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, top_k)
    ids = torch.randint(0, num_experts, shape, generator=generator)
    half = torch.rand(shape, generator=generator) < 0.5
    if kind == "skewed":
        ids = torch.where(half, num_experts // 2, ids)
    if kind == "few":
        ids = torch.where(half, 0, num_experts - 1)
    if kind in ("outside", "none"):
        pool = torch.tensor([num_experts, *OUTSIDE, *(OUTSIDE_INT64 if dtype == torch.int64 else ())])
        drawn = pool[torch.randint(0, len(pool), shape, generator=generator)]
        ids = torch.where(half, drawn, ids) if kind == "outside" else drawn
    return ids.to(dtype)


KINDS = ("even", "skewed", "few", "outside", "none")


def assert_same(ours, wanted):
    for name, tensor, oracle in zip(("order", "token", "offsets"), ours, wanted, strict=True):
        assert tensor.dtype == torch.int32, name
        assert tensor.is_contiguous(), name
        assert torch.equal(tensor.cpu(), oracle), name


def assert_invariants(ids, num_experts, outputs):
    """What a stable sort by expert means, checked without a sort."""
    order, token, offsets = (tensor.cpu().long() for tensor in outputs)
    slots, top_k = ids.numel(), ids.shape[1]
    expert = ids.cpu().reshape(-1).long()
    expert = torch.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    inverse = torch.empty(slots, dtype=torch.int64)
    inverse[order] = torch.arange(slots)
    assert torch.equal(order[inverse], torch.arange(slots)), "order is not a permutation"
    assert torch.equal(token, order // top_k)
    counts = torch.bincount(expert, minlength=num_experts + 1)
    assert offsets[0] == 0
    assert torch.equal(offsets.diff(), counts[:num_experts])
    assert offsets[-1] == slots - counts[num_experts]
    in_order = expert[order]
    assert (in_order.diff() >= 0).all(), "experts do not ascend"
    assert (order.diff()[in_order.diff() == 0] > 0).all(), "not stable"


@given(
    st.sampled_from(KINDS),
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(1, 300),
    st.sampled_from(INT_DTYPES),
    st.integers(0, 2**16),
)
def test_equals_reference(kind, tokens, top_k, num_experts, dtype, seed):
    ids = make_ids(kind, tokens, top_k, num_experts, dtype, seed)
    outputs = moe_dispatch(ids, num_experts)
    assert_same(outputs, moe_dispatch_reference(ids, num_experts))
    assert_invariants(ids, num_experts, outputs)


SIZES = {
    "no_tokens": (0, 2, 5),
    "one_slot": (1, 1, 1),
    "one_token": (1, 8, 128),
    "one_expert": (77, 3, 1),
    "decode": (64, 8, 128),
    "odd": (331, 3, 7),
    "one_chunk_exactly": (4096, 8, 60),
    "more_than_a_chunk": (4099, 8, 64),
    "wide": (1500, 8, 256),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", INT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, kind, dtype, device):
    tokens, top_k, num_experts = SIZES[size]
    ids = make_ids(kind, tokens, top_k, num_experts, dtype)
    outputs = moe_dispatch(ids.to(device), num_experts)
    assert_same(outputs, moe_dispatch_reference(ids, num_experts))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [131072, 262144 + 8])
def test_invariants_of_many_slots(slots, kind, device):
    ids = make_ids(kind, slots // 8, 8, 128)
    assert_invariants(ids, 128, moe_dispatch(ids.to(device), 128))


@pytest.mark.parametrize("num_experts", [2**15 - 2, 2**15 - 1, 2**15, 100_000])
def test_more_experts_than_16_bits(num_experts):
    ids = make_ids("outside", 500, 4, num_experts)
    ids[0] = torch.tensor([num_experts - 1, 0, num_experts, num_experts - 2])
    assert_invariants(ids, num_experts, moe_dispatch(ids, num_experts))


@pytest.mark.parametrize("device", DEVICES)
def test_strides_do_not_matter(device):
    ids = make_ids("outside", 50, 4, 9).to(device)
    wanted = [tensor.cpu() for tensor in moe_dispatch(ids, 9)]
    assert_same(moe_dispatch(ids.t().contiguous().t(), 9), wanted)
    assert_same(moe_dispatch(torch.cat((ids, ids), 1)[:, 4:], 9), wanted)
    assert_same(moe_dispatch(ids[:1].expand(50, 4), 9), moe_dispatch_reference(ids[:1].expand(50, 4).cpu(), 9))


def test_outputs_do_not_alias_the_input():
    ids = make_ids("even", 4, 2, 3)
    before = ids.clone()
    for tensor in moe_dispatch(ids, 3):
        tensor.fill_(-5)
    assert torch.equal(ids, before)


@pytest.mark.gpu
def test_no_host_sync_and_cuda_graphs():
    ids = make_ids("even", 64, 8, 128).cuda()
    moe_dispatch(ids, 128)  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_dispatch(ids, 128)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        outputs = moe_dispatch(ids, 128)
    ids.copy_(make_ids("outside", 64, 8, 128, seed=1))
    graph.replay()
    assert_same(outputs, moe_dispatch_reference(ids.cpu(), 128))


# --- the generated kernel in Triton's interpreter --------------------------------------------------------------------

KERNEL_CASES = {
    "no_tokens": (0, 2, 3, {}),
    "one_slot": (1, 1, 1, {}),
    "one_block": (16, 8, 3, {}),
    "blocks_and_a_rest": (37, 8, 4, {"BLOCK": 32}),
    "more_blocks_of_one_expert": (41, 5, 1, {"BLOCK": 16}),
    "two_kernels": (150, 4, 6, {"BLOCK": 64, "PROGRAMS": 8, "ROWS": 4}),
    "two_kernels_no_tokens": (0, 4, 6, {"BLOCK": 16, "PROGRAMS": 2, "ROWS": 2}),
    "two_kernels_short": (5, 3, 4, {"BLOCK": 16, "PROGRAMS": 2, "ROWS": 1}),
    "two_kernels_idle_programs": (9, 2, 3, {"BLOCK": 16, "PROGRAMS": 4, "ROWS": 2}),
    "two_kernels_all_bins": (33, 2, 8, {"BLOCK": 16, "PROGRAMS": 2, "ROWS": 1}),
}


def run_template(name, tensors, constants, programs):
    kernel = standalone.render(template_text(name), name, constants=tuple(constants.items()), output_rank=1)
    after = interpreter().kernel(kernel.source, kernel.arguments(tensors), grid=(programs,), name=kernel.name)
    return dict(zip((*kernel.pointers, "OUT"), after, strict=False))


def run_kernel(ids, num_experts, changes):
    tokens, top_k = ids.shape
    order, token = (torch.full((tokens * top_k,), -7, dtype=torch.int32) for _ in range(2))
    offsets = torch.full((num_experts + 1,), -7, dtype=torch.int32)
    constants = dispatch_schedule(tokens * top_k, num_experts, top_k=top_k).constants | changes
    tensors = {"IDS": ids, "ORDER": order, "TOKEN": token, "OUT": offsets}
    if "PROGRAMS" in changes:
        programs = changes["PROGRAMS"]
        constants["BINS"] = 1 << (num_experts - 1).bit_length()
        counts = torch.full((programs, constants["BINS"]), -7, dtype=torch.int32)
        after = run_template("moe_dispatch_count", {"IDS": ids, "OUT": counts}, constants, programs)
        after = run_template("moe_dispatch_place", tensors | {"COUNTS": after["OUT"]}, constants, programs)
    else:
        after = run_template("moe_dispatch", tensors, constants, num_experts + 1)
    return after["ORDER"], after["TOKEN"], after["OUT"]


@pytest.mark.parametrize("dtype", INT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["even", "skewed", "outside", "none"])
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_kernel_in_the_interpreter(case, kind, dtype):
    tokens, top_k, num_experts, schedule = KERNEL_CASES[case]
    ids = make_ids(kind, tokens, top_k, num_experts, dtype)
    assert_same(run_kernel(ids, num_experts, schedule), moe_dispatch_reference(ids, num_experts))


# --- tracing ---------------------------------------------------------------------------------------------------------


def test_one_dynamic_graph():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: moe_dispatch(ids, 6), backend=counter, fullgraph=True)
    for tokens in (5, 3, 64):
        ids = make_ids("outside", tokens, 2, 6)
        torch._dynamo.mark_dynamic(ids, 0)
        assert_same(compiled(ids), moe_dispatch_reference(ids, 6))
    assert counter.frame_count == 1


def test_exports_with_a_dynamic_number_of_tokens():
    class Dispatch(torch.nn.Module):
        def forward(self, ids):
            return moe_dispatch(ids, 6)

    tokens = torch.export.Dim("tokens", min=0)
    program = torch.export.export(Dispatch(), (make_ids("even", 5, 2, 6),), dynamic_shapes=({0: tokens},))
    for count in (0, 1, 9):
        ids = make_ids("outside", count, 2, 6)
        assert_same(program.module()(ids), moe_dispatch_reference(ids, 6))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", INT_DTYPES, ids=str)
@pytest.mark.parametrize("size", ["no_tokens", "one_slot", "decode", "odd"])
def test_opcheck(size, dtype, device):
    tokens, top_k, num_experts = SIZES[size]
    ids = make_ids("outside", tokens, top_k, num_experts, dtype).to(device)
    outcome = torch.library.opcheck(moe_dispatch, (ids, num_experts), test_utils=UTILITIES)
    assert outcome == dict.fromkeys(UTILITIES, "SUCCESS")


# --- refusals --------------------------------------------------------------------------------------------------------

GOOD = {"ids": torch.zeros(5, 2, dtype=torch.int32), "num_experts": 4}
BAD = {
    "rank": ({"ids": torch.zeros(10, dtype=torch.int32)}, MoEShapeError, "(10,)"),
    "dtype": ({"ids": torch.zeros(5, 2)}, MoEDtypeError, "torch.float32"),
    "int16": ({"ids": torch.zeros(5, 2, dtype=torch.int16)}, MoEDtypeError, "torch.int16"),
    "no_slots_per_token": ({"ids": torch.zeros(5, 0, dtype=torch.int32)}, MoEShapeError, "(5, 0)"),
    "no_experts": ({"num_experts": 0}, MoERangeError, "num_experts=0"),
    "negative_experts": ({"num_experts": -3}, MoERangeError, "num_experts=-3"),
    "too_many_slots": (
        {"ids": torch.zeros(2**30, 2, dtype=torch.int32, device="meta")},  # on meta: were it not refused, no memory
        MoERangeError,
        str(2**31),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    changes, kind, got = BAD[case]
    assert_refused(moe_dispatch, GOOD | changes, kind, got=got)


def test_accepts_what_the_refusals_change():
    moe_dispatch(**GOOD)
