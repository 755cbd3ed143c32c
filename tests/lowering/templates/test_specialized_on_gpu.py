"""The kernels with specialised warps on a GPU: the ratio rule, the bits of other schedules, no wait, compiled."""

import dataclasses
from unittest import mock

import pytest
import torch

from lowering.inductor import lowerings
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from lowering.schedule.schedule import SPLIT_DEPTH, Loop, Schedule
from lowering.templates import eager, standalone
from tests.support.inputs import BlockForm, cast, down_args, make_block, sort_slots, up_args
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.gpu

ops = torch.ops.diffulex
FORM = BlockForm(tokens=1500, top_k=3, experts=7, hidden=512, width=384, ids="sentinels", dtype=torch.bfloat16)
OTHERS = Schedule(128, 128, 64, 8, 4, Loop(tma=True))
FORMS = {
    "sentinels": FORM,
    "fp16": FORM.replace(dtype=torch.float16),
    "one expert gets all": FORM.replace(ids="one"),
    "no valid id": FORM.replace(ids="none"),
    "experts without rows": FORM.replace(ids="sparse", experts=40),
    "many experts": FORM.replace(experts=256, ids="distinct"),
    "one token": FORM.replace(tokens=1),
    "no tokens": FORM.replace(tokens=0),
    "ungated": FORM.replace(act="relu2", width=512),
    "swiglu_oai": FORM.replace(act="swiglu_oai"),
    "top 1": FORM.replace(top_k=1, act="geglu_tanh"),
    "row tiles in groups": FORM.replace(tokens=9000, experts=2, top_k=1, ids="distinct"),
    "several waves": FORM.replace(tokens=3000, top_k=2, experts=2, hidden=2048, width=1536, ids="distinct"),
    "two row tiles": FORM.replace(tokens=2000, top_k=4, experts=32, hidden=2048, width=1536, ids="distinct"),
    "shallow": FORM.replace(hidden=256, width=128),
    "one step": FORM.replace(tokens=400, hidden=256, width=128, act="relu2").replace(width=256),
}


@pytest.fixture(autouse=True)
def _sm_90():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("kernels of sm_90 alone")


def operands(form):
    block = make_block(form, "cuda")
    slots = sort_slots(block.ids_TK.cpu(), form.experts)
    return block, slots.order_N.cuda(), slots.offsets_E1.cuda()


def chain(block, order_N, offsets_E1, form, schedules):
    up, down = schedules
    args = (order_N, offsets_E1)
    act_NI = eager.moe_expert_up(block.hidden_TH, block.w13_EJH, None, *args, act=form.act, schedule=up)
    return act_NI, eager.moe_expert_down(act_NI, block.w2_EHI, None, *args, schedule=down)


def specialized(form):
    gated = form.act != "relu2"
    return Schedule.specialized(gated=gated), Schedule.specialized(gated=False)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_values_and_bits(form):
    """Within the ratio rule, and the bits of a schedule that sums in the same steps, rows of no expert too."""
    found = operands(form)
    ours = chain(*found, form, specialized(form))
    theirs = chain(*found, form, (OTHERS, OTHERS))
    assert all(map(torch.equal, ours, theirs))
    block, order_N, offsets_E1 = found
    cpu = [t.cpu() for t in (block.hidden_TH, block.w13_EJH, block.w2_EHI, order_N, offsets_E1)]

    def slots(hidden_TH, w13_EJH, w2_EHI, order_N, offsets_E1):
        act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, form.top_k, form.act)
        return ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)

    doubles = [t.double() if t.is_floating_point() else t for t in cpu]
    assert_oracle_ratio(ours[1].cpu(), slots(*cpu), slots(*doubles))


@pytest.mark.parametrize("last", [70, 2000])
def test_experts_of_all_kinds(last):
    """With heaviest row tiles of one, two and three parts, which change places, and light ones at the end."""
    counts = torch.tensor([60, 700, 130, 1, 0, 192, 64, 300, 65, 0, last])
    form = FORM.replace(tokens=int(counts.sum()), top_k=1, experts=len(counts), hidden=2048, width=1536)
    block, *_ = operands(form)
    ids_N = torch.arange(form.experts).repeat_interleave(counts)
    ids_N = ids_N[torch.randperm(len(ids_N), generator=torch.Generator().manual_seed(0))]
    slots = sort_slots(ids_N[:, None], form.experts)
    found = block, slots.order_N.cuda(), slots.offsets_E1.cuda()
    assert torch.equal(found[2].diff().cpu(), counts)
    assert all(map(torch.equal, chain(*found, form, specialized(form)), chain(*found, form, (OTHERS, OTHERS))))


DEEP = FORM.replace(width=SPLIT_DEPTH)
GATHERED = FORM.replace(hidden=SPLIT_DEPTH)
IN_PIECES = {  # stage, form, and of 132 programs: in how many pieces so many last tiles go
    "all in two": ("down", DEEP.replace(hidden=768), 2, 63),
    "all in three": ("down", DEEP.replace(tokens=400), 3, 14),
    "the last ones in two": ("down", DEEP.replace(tokens=2000, hidden=2048), 2, 60),
    "the last ones in three": ("down", DEEP.replace(hidden=2048), 3, 36),
    "none": ("down", DEEP.replace(tokens=2000, hidden=1024), 1, 0),
    "pieces of unlike depth": ("down", DEEP.replace(width=SPLIT_DEPTH + 64, tokens=100, dtype=torch.float16), 3, 14),
    "no valid id": ("down", DEEP.replace(ids="none"), 1, 0),
    "gated": ("up", GATHERED, 2, 63),
    "ungated": ("up", GATHERED.replace(tokens=300, act="relu2", width=512), 3, 14),
    "many experts": ("up", GATHERED.replace(tokens=100, width=128, experts=40), 3, 40),
}


@pytest.mark.parametrize("case", IN_PIECES)
def test_in_pieces(case):
    """The ratio rule, the same bits each time, and each part of a tile added up once: when all its pieces are there."""
    stage, form, pieces, tiles = IN_PIECES[case]
    gated = stage == "up" and form.act != "relu2"
    schedule = Schedule.specialized(gated=gated, split_k=True)
    if stage == "up":
        args, rest, options = up_args(form)[:5], (form.top_k, form.act), {"act": form.act}
        on_gpu, on_cpu = eager.moe_expert_up, ops.moe_expert_up
    else:
        args, rest, options = down_args(form), (), {}
        on_gpu, on_cpu = eager.moe_expert_down, ops.moe_expert_down
    given = [arg if arg is None else arg.cuda() for arg in args]
    with mock.patch.object(standalone, "launch", wraps=standalone.launch) as launch:
        ours = on_gpu(*given, **options, schedule=schedule)
    assert_oracle_ratio(ours.cpu(), on_cpu(*args, *rest), on_cpu(*cast(args, torch.float64), *rest))
    for _ in range(20):
        assert torch.equal(ours, on_gpu(*given, **options, schedule=schedule))
    whole = on_gpu(*given, **options, schedule=schedule.without_split_k())
    assert torch.equal(ours, whole) == (pieces == 1)
    if eager.device_spec(0).num_sms == 132:
        counts = launch.call_args.args[1]["TAKEN"][1:]
        told, others = counts[: 3 * tiles].reshape(tiles, 3), counts[3 * tiles :]
        assert told.any(1).all()
        assert set(told.unique().tolist()) <= {0, pieces}
        assert not others.any()


def test_a_nan_stays_in_its_row():
    block, order_N, offsets_E1 = operands(FORM)
    block.hidden_TH[5] = torch.nan
    up, _ = specialized(FORM)
    args = (block.hidden_TH, block.w13_EJH, None, order_N, offsets_E1)
    out_NI = eager.moe_expert_up(*args, act=FORM.act, schedule=up)
    of_token_N = torch.zeros(len(out_NI), dtype=torch.bool, device="cuda")
    known = int(offsets_E1[-1])
    of_token_N[:known] = (order_N[:known] // FORM.top_k) == 5
    assert out_NI[of_token_N].isnan().all()
    assert not out_NI[~of_token_N].isnan().any()


def test_the_same_bits_each_time():
    form = FORM.replace(tokens=4000, experts=9)
    found, schedules = operands(form), specialized(form)
    first = chain(*found, form, schedules)
    for _ in range(40):
        assert all(map(torch.equal, first, chain(*found, form, schedules)))


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled(mode, monkeypatch):
    """A layer whose plan has them, at token counts that change, by the ratio rule."""
    monkeypatch.setattr(
        lowerings, "schedule_of", lambda rows, shape, device: (Schedule.specialized(gated=shape.gated), None)
    )
    form = BlockForm(tokens=2048, top_k=4, experts=16, hidden=1024, width=512, dtype=torch.bfloat16)
    block = make_block(form, "cuda")

    def layer(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
        order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, form.experts)
        act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, form.top_k, form.act)
        slots_NH = ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)
        return ops.moe_combine(slots_NH, weights_TK)

    register_lowerings()
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, mode=mode)
    inputs = [block.hidden_TH, block.ids_TK, block.weights_TK.float(), block.w13_EJH, block.w2_EHI]
    with torch.no_grad(), collect() as decisions:
        for tokens in (2048, 1900, 2048, 1000):
            cut = [tensor[:tokens].contiguous() for tensor in inputs[:3]] + inputs[3:]
            for _ in range(3):
                ours = run(*cut).clone()
            cut = [tensor.cpu() for tensor in cut]
            oracle = layer(*[t.double() if t.is_floating_point() else t for t in cut])
            assert_oracle_ratio(ours.cpu(), layer(*cut), oracle)
    told = [d.outcome for d in decisions if d.stage == "lower" and d.subject.startswith("moe_expert")]
    assert told
    assert all(outcome.startswith("gluon") for outcome in told), told


def test_nothing_waits_for_the_device():
    found = operands(FORM)
    chain(*found, FORM, specialized(FORM))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chain(*found, FORM, specialized(FORM))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_each_tile_is_taken_once():
    """A program takes one tile for each that it has: as many are taken as there are."""
    form = FORMS["several waves"]
    block, order_N, offsets_E1 = operands(form)
    with mock.patch.object(standalone, "launch", wraps=standalone.launch) as launch:
        chain(block, order_N, offsets_E1, form, specialized(form))
        taken = [int(call.args[1]["TAKEN"]) for call in launch.call_args_list]
    row_tiles = sum(-(-count // 192) for count in offsets_E1.diff().tolist())
    assert taken == [row_tiles * (form.width // 128), row_tiles * (form.hidden // 256)]


def test_whichever_program_takes_a_tile(monkeypatch):
    """The same bits from one program that takes all of them, from a few, and from many beside another kernel."""
    form = FORMS["several waves"]
    found, launch = operands(form), standalone.launch
    wanted = chain(*found, form, specialized(form))
    for programs in (1, 2, 7):
        monkeypatch.setattr(
            standalone, "launch", lambda *args, grid, n=programs, **options: launch(*args, grid=(n,), **options)
        )
        assert all(map(torch.equal, wanted, chain(*found, form, specialized(form)))), programs
    monkeypatch.setattr(standalone, "launch", launch)
    side, busy = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(10):
        with torch.cuda.stream(side):
            busy @ busy
        assert all(map(torch.equal, wanted, chain(*found, form, specialized(form))))


def test_rows_that_lie_apart():
    """Parts of wider rows, of A and of the weights, and experts of one step."""
    form = FORM.replace(hidden=64, act="relu2", width=512)
    block, order_N, offsets_E1 = operands(form)
    wide_TH = block.hidden_TH.new_full((form.tokens, 128), torch.nan)
    wide_EIH = block.w13_EJH.new_full((form.experts, 512, 192), torch.nan)
    wide_TH[:, :64], wide_EIH[..., :64] = block.hidden_TH, block.w13_EJH
    args, options = (None, order_N, offsets_E1), {"act": form.act, "schedule": specialized(form)[0]}
    wanted_NI = eager.moe_expert_up(block.hidden_TH, block.w13_EJH, *args, act=form.act, schedule=OTHERS)
    assert torch.equal(wanted_NI, eager.moe_expert_up(wide_TH[:, :64], wide_EIH[..., :64], *args, **options))
    act_NI = wanted_NI.new_full((len(wanted_NI), 576), torch.nan)
    act_NI[:, :512] = wanted_NI
    wide_EHI = block.w2_EHI.new_full((form.experts, 256, 1024), torch.nan)
    wide_EHI[..., :512] = torch.randn_like(wide_EHI[..., :512])
    parts = (act_NI[:, :512], wide_EHI[..., :512])
    ours_NH = eager.moe_expert_down(*parts, *args, schedule=specialized(form)[1])
    assert torch.equal(ours_NH, eager.moe_expert_down(*map(torch.clone, parts), *args, schedule=OTHERS))


def test_wide_indices():
    block, order_N, offsets_E1 = operands(FORM)
    wanted = chain(block, order_N, offsets_E1, FORM, specialized(FORM))
    assert all(map(torch.equal, wanted, chain(block, order_N.long(), offsets_E1.long(), FORM, specialized(FORM))))


def test_groups_of_another_height():
    """Where a group of row tiles ends, and where an expert has fewer than one."""
    form = FORMS["row tiles in groups"]
    found = operands(form)
    wanted = chain(*found, form, (OTHERS, OTHERS))
    for group_m in (1, 3, 16):
        schedules = [dataclasses.replace(schedule, group_m=group_m) for schedule in specialized(form)]
        assert all(map(torch.equal, wanted, chain(*found, form, schedules)))
