"""The kernels with specialised warps without a GPU: compiled for sm_90, refused with reasons, called by graphs."""

import contextlib
import dataclasses
import itertools
import re

import pytest
import torch
import triton

from lowering.activation import canonical, is_gated
from lowering.errors import MoEUnsupportedError, ReasonCode
from lowering.inductor import _compat, lowerings
from lowering.inductor.offline import offline_source
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from lowering.schedule.device import H100
from lowering.schedule.plan import candidates, invariant_plan, plan
from lowering.schedule.schedule import SPLIT_DEPTH, GemmShape, Schedule, numbers_of
from lowering.state import batch_invariant
from lowering.templates import eager, standalone
from lowering.templates.eager import gemm_constants, index_constants, specialized_arguments
from tests.support.blocks import Block
from tests.support.catalogue import raises_catalogue
from tests.support.inputs import BlockForm
from tests.support.launches import compile_for_h100, on_meta, sass_of

GATED, PLAIN = Schedule.specialized(gated=True), Schedule.specialized(gated=False)
IN_PIECES = Schedule.specialized(gated=True, split_k=True)
SHAPES = {
    "qwen3": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
    "llada2": (256, 8, 2048, 512),
    "dsv3, one of four ranks": (64, 8, 7168, 2048),
    "200 experts": (200, 8, 1024, 256),
}
DEEP = {  # whose last tiles go in pieces
    "mixtral": (*SHAPES["mixtral"], "down"),
    "128 experts": (128, 1, 5120, 8192, "down"),
    "up": (16, 2, 8192, 2048, "up"),
    "256 experts up": (256, 2, 8192, 2048, "up"),
}
LOCAL = re.compile(r"\b(STL|LDL)\b")
# instructions with local memory that an activation may have, outside of loops
ACTS = {
    **dict.fromkeys(["silu(g) * u", "gelu_tanh(g) * u", "min(g, 7.0) * sigmoid(1.702 * g) * (u + 1.0)"], 0),
    **dict.fromkeys(["tanh(g) * u", "relu(g) * relu(g)", "identity"], 0),
    "gelu(g) * u": 450,
    "log1p(exp(g))": 160,
}


def compiled(sizes, stage, *, act="silu(g) * u", unread=True, dtype=torch.bfloat16, wide=False):
    num_experts, top_k, hidden, width = sizes
    up, gated, rows = stage == "up", stage == "up" and is_gated(canonical(act)), 64 * top_k
    out_width, depth = (width, hidden) if up else (hidden, width)
    tensors = {
        "A": on_meta(64 if up else rows, depth, dtype=dtype),
        "W": on_meta(num_experts, out_width * (2 if gated else 1), depth, dtype=dtype),
        "ORDER": on_meta(rows, dtype=torch.int64 if wide else torch.int32),
        "OFFSETS": on_meta(num_experts + 1, dtype=torch.int64 if wide else torch.int32),
        "OUT": on_meta(rows, out_width, dtype=dtype),
    }
    variant = eager.up_variant(dtype, act=act, bias=False) if up else eager.down_variant(dtype, bias=False)
    schedule = GemmShape(num_experts, depth, out_width, gated).specialized
    schedule = schedule.without_split_k() if wide else schedule
    variant = dataclasses.replace(variant, unread=unread)
    variant = variant.scheduled(schedule, depth=depth, strides=tensors["W"].stride())
    constants = gemm_constants(num_experts, top_k if up else 1, width=out_width, schedule=schedule)
    tensors |= specialized_arguments(tensors, schedule, gather=up, programs=H100.num_sms)
    return compile_for_h100(
        variant.source(),
        tensors,
        constants=constants | ({"ROW_OFFSET": "gl.int64"} if wide else index_constants(tensors, schedule)),
        num_warps=schedule.launched_warps,
        num_stages=schedule.num_stages,
    )


def assert_good(kernel, *, most_local=0):
    """No local memory, but for what a rare activation may need outside of the main loop."""
    lines = sass_of(kernel)
    assert sum(bool(LOCAL.search(line)) for line in lines) <= most_local
    products = [at for at, line in enumerate(lines) if "HGMMA" in line]
    assert products and len(products) % 8 == 0, "a step has two products of four parts"
    for first, last in zip(products[::8], products[7::8], strict=True):
        assert last - first < 150, "not one step"
        assert not LOCAL.search("\n".join(lines[first:last]))
    assert kernel.metadata.shared <= H100.shared_memory
    ptx = kernel.asm["ptx"]
    assert "cp.async.bulk.tensor.5d" in ptx
    # of tiles and of pieces, whole numbers: no result depends on who comes first
    atomics = re.findall(r"\b(?:atom|red)\.\S*", ptx)
    assert atomics.pop(atomics.index("atom.global.gpu.relaxed.add.u32"))
    assert atomics == ["atom.global.gpu.acq_rel.add.u32"] * len(atomics)
    return len(atomics)


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("stage", ["up", "down"])
def test_models_compile(sizes, stage):
    kernel, _ = compiled(sizes, stage)
    assert assert_good(kernel) == (3 if (sizes[2] if stage == "up" else sizes[3]) >= SPLIT_DEPTH else 0)
    assert ("cp.async.cg" in kernel.asm["ptx"]) == (stage == "up"), "gathered rows by asynchronous copies of 16 bytes"
    assert "st.global.v4" in kernel.asm["ptx"], "16 bytes at once"


@pytest.mark.parametrize("sizes", DEEP.values(), ids=DEEP)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_deep_reductions_compile(sizes, dtype):
    """All threads of a group have written their sums before one of them tells so, and read those of others behind."""
    kernel, _ = compiled(sizes[:4], sizes[4], dtype=dtype)
    assert assert_good(kernel) == 3
    ahead, *told = kernel.asm["ptx"].split("atom.global.gpu.acq_rel.add.u32")
    for before, after in itertools.pairwise([ahead, *told]):
        barrier = before.rindex("bar.sync")
        assert "st.global" in before[:barrier]
        assert not re.search(r"st\.global|ld\.global", before[barrier:])
        assert after.index("bar.sync") < after.index("ld.global")
        assert "ld.global.cg" in after


@pytest.mark.parametrize(("name", "most_local"), [("qwen3", 4), ("llada2", 8), ("mixtral", 6)])
def test_wide_indices_compile(name, most_local):
    """Rows that begin beyond 2^31 elements take two registers each, and the most shared memory there is."""
    assert_good(compiled(SHAPES[name], "up", wide=True)[0], most_local=most_local)
    assert assert_good(compiled(SHAPES[name], "down", wide=True)[0]) == 0, "in one piece"


@pytest.mark.parametrize(("act", "most_local"), ACTS.items(), ids=ACTS)
def test_activations_compile(act, most_local):
    kernel, _ = compiled((16, 4, 1024, 512), "up", act=act, unread=False, dtype=torch.float16)
    assert_good(kernel, most_local=most_local)


def test_only_what_is_whole_is_planned():
    def planned(shape, device=H100):
        return [found for found in candidates(shape, device) if found.loop.specialized]

    shape = GemmShape(64, 2048, 768, True)
    assert planned(shape) == [GATED]
    assert planned(dataclasses.replace(shape, gated=False)) == [PLAIN]
    others = [("num_experts", 0), ("num_experts", 257), ("depth", 0), ("depth", 2080), ("width", 832)]
    for name, value in [*others, ("element_size", 4), ("descriptors", False), ("rows_follow", False)]:
        assert not planned(dataclasses.replace(shape, **{name: value})), (name, value)
    assert planned(dataclasses.replace(shape, depth=SPLIT_DEPTH)) == [IN_PIECES]
    assert planned(dataclasses.replace(shape, depth=SPLIT_DEPTH - 64)) == [GATED]
    for capability in ((8, 0), (10, 0), (12, 0)):
        assert not planned(shape, dataclasses.replace(H100, capability=capability))


def test_the_nearest_other_schedule_is_one_that_is_planned():
    for schedule, gated in ((GATED, True), (PLAIN, False)):
        assert schedule.without_specialized() in candidates(GemmShape(64, 2048, 768, gated), H100)


def test_rows_that_may_not_depend_on_others_are_not_summed_in_pieces():
    shapes = (GemmShape(8, 4096, 14336, True), GemmShape(8, 14336, 4096, False))
    found = invariant_plan(shapes, H100)
    assert found.max_rows is None
    assert found.schedules == tuple(each.without_split_k() for each in plan(shapes, H100, max_ranges=1)[0].schedules)
    assert [each.loop.specialized for each in found.schedules] == [True, True]
    assert [each.loop.split_k for each in plan(shapes, H100, max_ranges=1)[0].schedules] == [False, True]


class Device:
    num_sms, capability = 132, (9, 0)


@pytest.fixture
def launches(monkeypatch):
    calls = []
    monkeypatch.setattr(eager, "device_spec", lambda index: Device)
    monkeypatch.setattr(standalone, "launch", lambda text, tensors, **options: calls.append((text, tensors, options)))
    return calls


def up_on_meta(schedule, *, bias=False, hidden=64, width=128, strides=None, **options):
    w13 = on_meta(4, 2 * width, hidden)
    w13 = w13 if strides is None else w13.as_strided(w13.shape, strides)
    b13 = on_meta(4, 2 * width) if bias else None
    order, offsets = on_meta(12, dtype=torch.int32), on_meta(5, dtype=torch.int32)
    return eager.moe_expert_up(
        on_meta(6, hidden), w13, b13, order, offsets, act="silu(g) * u", schedule=schedule, **options
    )


def up_of_rows(rows):
    order, offsets = torch.zeros(rows, dtype=torch.int32), torch.zeros(5, dtype=torch.int64)
    hidden, w13 = torch.zeros(rows, 64, dtype=torch.bfloat16), torch.zeros(4, 256, 64, dtype=torch.bfloat16)
    eager.moe_expert_up(hidden, w13, None, order, offsets, act="silu(g) * u", schedule=GATED)


def test_each_launch_counts_from_zero(launches):
    for rows in (12, 12, 0):
        up_of_rows(rows)
    counts = [tensors["TAKEN"] for _, tensors, options in launches if options["grid"] != (0,)]
    assert [(count.tolist(), count.dtype) for count in counts] == 2 * [([0], torch.int32)]
    assert counts[0].data_ptr() != counts[1].data_ptr()


@pytest.mark.parametrize("invariant", [False, True])
def test_a_deep_reduction_of_a_plan(launches, monkeypatch, invariant):
    monkeypatch.setattr(eager, "device_spec", lambda index: H100)
    order, offsets = on_meta(4096, dtype=torch.int32), on_meta(9, dtype=torch.int32)
    with batch_invariant() if invariant else contextlib.nullcontext():
        eager.moe_expert_down(on_meta(4096, 14336), on_meta(8, 4096, 14336), None, order, offsets)
    ((text, tensors, options),) = launches
    assert ("PARTIALS" in text, "PARTIALS" in tensors) == (not invariant, not invariant)
    assert "gluon" in text
    assert options["grid"] == (132,)


def test_no_rows_are_launched_without_descriptors(launches):
    order, offsets = torch.zeros(0, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    w2 = torch.zeros(4, 256, 64, dtype=torch.bfloat16)
    eager.moe_expert_down(torch.zeros(0, 64, dtype=torch.bfloat16), w2, None, order, offsets, schedule=PLAIN)
    up_of_rows(0)
    assert [options["grid"] for *_, options in launches] == [(0,), (0,)]


REFUSED = {
    "bias": ({"bias": True}, "with bias"),
    "interleaved": ({"interleaved": True}, "of alternating halves"),
    "transposed": ({"strides": (256 * 64, 1, 256)}, "transposed"),
    "apart": ({"strides": (512 * 64, 64, 1)}, "of weight rows that do not follow one another"),
    "deep": ({"hidden": 96}, "not whole steps"),
    "wide": ({"width": 192}, "192 wide"),
}


def test_a_shallow_reduction_is_in_one_piece(launches):
    with raises_catalogue(
        MoEUnsupportedError, where="moe_expert_up", got="sums over 64 columns, below 8192, are not cut"
    ):
        up_on_meta(IN_PIECES)
    up_on_meta(IN_PIECES, hidden=SPLIT_DEPTH)
    up_on_meta(GATED, hidden=SPLIT_DEPTH)
    assert ["PARTIALS" in tensors for _, tensors, _ in launches] == [True, False]


@pytest.mark.parametrize("change", REFUSED)
def test_an_explicit_request_is_refused_with_the_reason(change, launches):
    options, got = REFUSED[change]
    with raises_catalogue(MoEUnsupportedError, where="moe_expert_up", got=got if change != "deep" else "96 deep"):
        up_on_meta(GATED, **options)
    assert not launches
    up_on_meta(GATED.without_specialized().without_tma(), **options)
    assert launches


@pytest.mark.parametrize("change", REFUSED)
def test_a_plan_falls_back_and_says_why(change, launches, monkeypatch):
    monkeypatch.setattr(eager, "schedule_for", lambda rows, shape, device: GATED)
    options, got = REFUSED[change]
    with collect() as decisions:
        up_on_meta(None, **options)
    (found,) = decisions
    assert (found.outcome, found.reason.code) == ("no specialised warps", ReasonCode.SHAPE)
    assert (got if change != "deep" else "96 deep") in found.reason.detail
    ((text, _, launched),) = launches
    assert "gluon" not in text
    assert launched["num_warps"] == 8


def test_another_triton_is_told(launches, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "9.9.0")
    standalone.gluon_refusal.cache_clear()
    try:
        with raises_catalogue(MoEUnsupportedError, where="moe_expert_up", got="not that of triton 9.9.0"):
            up_on_meta(GATED)
    finally:
        monkeypatch.undo()
        standalone.gluon_refusal.cache_clear()
    assert standalone.gluon_refusal() is None


@pytest.mark.parametrize("change", [{"block_n": 256}, {"block_k": 32}, {"block_m": 128}, {"num_stages": 3}])
def test_there_is_one_such_schedule(change, launches):
    with raises_catalogue(MoEUnsupportedError, where="moe_expert_up", got="specialised warps have 192x128x64"):
        up_on_meta(dataclasses.replace(GATED, **change))
    up_on_meta(dataclasses.replace(GATED, group_m=2))
    assert len(launches) == 1


def test_other_devices_refuse_them(launches, monkeypatch):
    monkeypatch.setattr(Device, "capability", (10, 0))
    with raises_catalogue(MoEUnsupportedError, where="moe_expert_up", got="as sm_90 alone does"):
        up_on_meta(GATED)


def test_more_rows_than_are_counted(launches):
    order, offsets = on_meta(1 << 34, dtype=torch.int32), on_meta(5, dtype=torch.int32)
    args = (on_meta(1 << 33, 64), on_meta(4, 256, 64), None, order, offsets)
    with raises_catalogue(MoEUnsupportedError, where="moe_expert_up", got="more than specialised warps count"):
        eager.moe_expert_up(*args, act="silu(g) * u", schedule=GATED)


def test_rows_that_are_counted_in_64_bits(launches):
    hidden, w13 = on_meta(1 << 20, 4096), on_meta(4, 256, 4096)
    order, offsets = on_meta(2 << 20, dtype=torch.int32), on_meta(5, dtype=torch.int32)
    eager.moe_expert_up(hidden, w13, None, order, offsets, act="silu(g) * u", schedule=GATED)
    part = on_meta(300_000, 8192)[:, :4096]  # fewer elements, as far from one another
    order = on_meta(300_000, dtype=torch.int32)
    eager.moe_expert_up(part, w13, None, order, offsets, act="silu(g) * u", schedule=GATED)
    assert [options["constants"]["ROW_OFFSET"] for _, _, options in launches] == ["gl.int64", "gl.int64"]


def test_far_rows_are_summed_in_one_piece(launches):
    """What a graph or a plan says is taken as it can be, an explicit request is refused."""
    part = on_meta(300_000, SPLIT_DEPTH)
    w13, order, offsets = (
        on_meta(4, 256, SPLIT_DEPTH),
        on_meta(300_000, dtype=torch.int32),
        on_meta(5, dtype=torch.int32),
    )
    with raises_catalogue(MoEUnsupportedError, where="moe_expert_up", got="rows begin beyond 2^31 elements"):
        eager.moe_expert_up(part, w13, None, order, offsets, act="silu(g) * u", schedule=IN_PIECES)
    with collect() as decisions:
        for rows in (part, part[:100]):
            eager.expert_gemm_specialized(
                *(rows, w13, order, offsets), act="silu(g) * u", up=True, unread=True, schedule=numbers_of(IN_PIECES)
            )
    (found,) = decisions
    assert (found.outcome, found.reason.code) == ("sums in one piece", ReasonCode.SHAPE)
    assert ["PARTIALS" in tensors for _, tensors, _ in launches] == [False, True]


FORM = BlockForm(tokens=4096, top_k=4, experts=8, hidden=1024, width=512, dtype=torch.bfloat16)


def lowered(monkeypatch, form=FORM):
    monkeypatch.setattr(
        lowerings, "schedule_of", lambda rows, shape, device: (Schedule.specialized(gated=shape.gated), None)
    )
    register_lowerings()
    torch._dynamo.reset()
    function = Block(form)
    with collect() as decisions:
        code = offline_source(function, function.inputs())
    return code, {d.subject: d for d in decisions if d.stage == "lower"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")
def test_a_graph_calls_them(monkeypatch):
    code, decisions = lowered(monkeypatch)
    assert [name for name in code.extern_calls if "_expert_gemm_specialized" in name] == list(code.extern_calls)
    assert len(code.extern_calls) == 2
    for stage in ("moe_expert_up", "moe_expert_down"):
        found = decisions[stage]
        assert (found.reason, found.kernel_refusal) == (None, None)
        assert re.match(rf"gluon {stage}_[0-9a-f]{{8}}(_unread)? 192x", found.outcome)
        assert found.cost is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")
@pytest.mark.parametrize("case", ["bias", "C++ wrapper", "backward"])
def test_a_graph_that_cannot_says_why(case, monkeypatch):
    code_of = {"bias": ReasonCode.SHAPE, "C++ wrapper": ReasonCode.WRAPPER, "backward": ReasonCode.SCHEDULE}
    if case == "C++ wrapper":
        monkeypatch.setattr(_compat, "calls_python", lambda: False)
    if case == "backward":
        monkeypatch.setattr(_compat, "is_backward", lambda: True)
    code, decisions = lowered(monkeypatch, FORM.replace(bias=case == "bias"))
    assert code.extern_calls == ()
    for stage in ("moe_expert_up", "moe_expert_down"):
        reason = decisions[stage].reason
        assert reason.code is code_of[case]
        assert "make_tensor_descriptor" in code.kernel(stage).function
        assert "128" in decisions[stage].outcome


def test_the_op_a_graph_calls_takes_the_numbers_of_a_schedule(launches):
    """What the generated code says is what is launched."""
    hidden, w13 = on_meta(6, 64), on_meta(4, 256, 64)
    order, offsets = on_meta(12, dtype=torch.int32), on_meta(5, dtype=torch.int32)
    schedule = dataclasses.replace(GATED, group_m=5)
    out = eager.expert_gemm_specialized(
        *(hidden, w13, order, offsets), act="silu(g) * u", up=True, unread=True, schedule=numbers_of(schedule)
    )
    fake = torch.ops.diffulex._expert_gemm_specialized(
        *(hidden, w13, order, offsets), "silu(g) * u", True, True, numbers_of(schedule)
    )
    assert out.shape == fake.shape == (12, 128)
    ((text, _, options),) = launches
    assert options["constants"]["GROUP_M"] == 5
    assert (options["num_warps"], options["num_stages"]) == (4, 4)
    assert "zeros" not in text.partition("def_kernel")[2], "unread rows are left as they are"
