"""The kernels of the ops in eager mode, run by Triton's interpreter on CPU tensors, against the oracles."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowering.activation import IDENTITY
from lowering.errors import MoEUnsupportedError, ReasonCode
from lowering.reference.moe_expert_down import moe_expert_down_reference
from lowering.reference.moe_expert_grad_weight import moe_expert_grad_weight_reference
from lowering.reference.moe_expert_up import moe_expert_up_reference
from lowering.report import collect
from lowering.schedule.device import H100
from lowering.schedule.plan import schedule_for
from lowering.schedule.schedule import GemmShape, Loop, Schedule
from lowering.state import batch_invariant
from lowering.templates import eager, standalone
from tests.support.catalogue import raises_catalogue
from tests.support.inputs import (
    FORMS,
    WIDE,
    WIDE_FORMS,
    cast,
    down_args,
    grad_weight_args,
    sort_slots,
    up_args,
)
from tests.support.launches import interpret
from tests.support.oracle import assert_oracle_ratio

SMALL = Schedule(16, 16, 16, 4, 2)
SCHEDULES = [SMALL, Schedule(32, 32, 16, 4, 3), Schedule(16, 64, 32, 4, 3), Schedule(64, 16, 64, 8, 2)]
MANY = [
    Schedule(16, 32, 16, 4, 3, Loop(grouped=True), group_m=2),
    Schedule(16, 16, 16, 4, 3, Loop(tma=True), group_m=1),
    Schedule(32, 16, 16, 4, 3, Loop(tma=True, flatten=True), group_m=3),
    Schedule(16, 32, 32, 4, 3, Loop(tma=True, flatten=True, subtiles=2), group_m=2),
]
# sizes of rows that tensor descriptors take
ALIGNED = WIDE.replace(hidden=48, width=40)
# primes are in no multiple of a tile, depth 48 is in whole steps of 16; tails, empty experts and no tokens are in FORMS
DTYPES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    interpret(monkeypatch)


def up(hidden, w13, b13, order, offsets, top_k, act=IDENTITY, interleaved=False, *, schedule=SMALL):
    return eager.moe_expert_up(hidden, w13, b13, order, offsets, act=act, interleaved=interleaved, schedule=schedule)


def up_reference(hidden, w13, b13, order, offsets, top_k, act=IDENTITY, interleaved=False):
    return moe_expert_up_reference(
        hidden, w13, order, offsets, top_k=top_k, b13_EJ=b13, act=act, interleaved=interleaved
    )


def down(act, w2, b2, order, offsets, *, schedule=SMALL):
    return eager.moe_expert_down(act, w2, b2, order, offsets, schedule=schedule)


def down_reference(act, w2, b2, order, offsets):
    return moe_expert_down_reference(act, w2, order, offsets, b2_EH=b2)


def grad_weight_reference(left, right, left_index, right_index, offsets):
    return moe_expert_grad_weight_reference(left, right, offsets, left_index_N=left_index, right_index_N=right_index)


def check(kernel, reference, args, **options):
    """By ratio to the oracle in the same dtype, which sums in the order of its rows."""
    ours = kernel(*args, **options)
    assert_oracle_ratio(ours, reference(*args), reference(*cast(args, torch.float64)))
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms(form, dtype):
    form = form.replace(dtype=dtype)
    check(up, up_reference, up_args(form))
    check(down, down_reference, down_args(form))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("form", WIDE_FORMS.values(), ids=WIDE_FORMS)
def test_schedules(form, schedule):
    form = form.replace(dtype=torch.float32)
    check(up, up_reference, up_args(form), schedule=schedule)
    check(down, down_reference, down_args(form), schedule=schedule)


class Few:
    """A device with three SMs, so that programs take several tiles."""

    num_sms = 3
    capability = (9, 0)


@pytest.fixture
def few_sms(monkeypatch):
    monkeypatch.setattr(eager, "device_spec", lambda index: Few)
    return SourceWatch(monkeypatch)


class SourceWatch:
    """The texts that were launched."""

    def __init__(self, monkeypatch):
        self.texts = []
        launch = standalone.launch

        def watched(text, tensors, **options):
            self.texts.append(text)
            launch(text, tensors, **options)

        monkeypatch.setattr(standalone, "launch", watched)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_with_many_rows(form, few_sms):
    form = form.replace(dtype=torch.float32)
    check(up, up_reference, up_args(form), schedule=MANY[0])
    check(down, down_reference, down_args(form), schedule=MANY[0])


@pytest.mark.parametrize("schedule", MANY[1:], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_that_descriptors_take(form, schedule, few_sms):
    form = form.replace(dtype=torch.float16, hidden=56, width=24)
    check(up, up_reference, up_args(form), schedule=schedule)
    check(down, down_reference, down_args(form), schedule=schedule)
    if form.tokens:
        assert all("w_desc.load" in text for text in few_sms.texts)


@pytest.mark.parametrize("schedule", MANY, ids=str)
def test_more_row_tiles_than_a_group(schedule, few_sms):
    """Whole groups, and one that is not full."""
    form = ALIGNED.replace(tokens=57, top_k=2, experts=3, ids="one", dtype=torch.float16)
    assert form.tokens * form.top_k > schedule.group_m * schedule.block_m
    check(up, up_reference, up_args(form), schedule=schedule)
    check(down, down_reference, down_args(form), schedule=schedule)


@pytest.mark.parametrize("act", [IDENTITY, "u", "swiglu", "geglu_tanh", "min(max(g, -0.5), 0.5) * u", "relu2"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("schedule", MANY, ids=str)
def test_activations_with_many_rows(act, interleaved, schedule, few_sms):
    args = up_args(ALIGNED.replace(dtype=torch.float32, bias=True, ids="sentinels"))[:6]
    check(
        lambda *args: up(*args, act, interleaved, schedule=schedule),
        lambda *args: up_reference(*args, act, interleaved),
        args,
    )


@pytest.mark.parametrize("schedule", MANY, ids=str)
def test_offsets_of_64_bits_with_many_rows(schedule, few_sms):
    form = ALIGNED.replace(dtype=torch.float32, ids="sentinels")
    for kernel, reference, args in ((up, up_reference, up_args(form)), (down, down_reference, down_args(form))):
        wide = [*args[:3], args[3].long(), args[4].long(), *args[5:]]
        check(kernel, reference, wide, schedule=schedule)


@pytest.mark.parametrize("schedule", MANY, ids=str)
def test_rows_of_no_expert_are_zero_with_many_rows(schedule, few_sms):
    form = ALIGNED.replace(dtype=torch.float32, ids="sentinels", bias=True)
    act, w2, b2, order, offsets = down_args(form)
    valid = int(offsets[-1])
    act[valid:] = torch.nan
    out = down(act, w2, b2, order, offsets, schedule=schedule)
    assert out[order[valid:].long()].eq(0).all()
    assert out[order[:valid].long()].isfinite().all()


@pytest.mark.parametrize("schedule", MANY, ids=str)
def test_nan_stays_in_its_rows_with_many_rows(schedule, few_sms):
    form = ALIGNED.replace(dtype=torch.float32, top_k=1)
    hidden, w13, b13, order, offsets, top_k, *_ = up_args(form)
    hidden[5] = torch.nan
    row = order.tolist().index(5)
    out = up(hidden, w13, b13, order, offsets, top_k, "swiglu", schedule=schedule)
    assert out[row].isnan().all()
    assert out.isnan().sum() == out.shape[1]
    act, w2, b2, order, offsets = down_args(form)
    act[7] = torch.nan
    out = down(act, w2, b2, order, offsets, schedule=schedule)
    assert out[order[7]].isnan().all()
    assert out.isnan().sum() == out.shape[1]


REFUSED = {
    "depth": (ReasonCode.ALIGNMENT, "strides (2016, 42, 1) of W"),
    "columns": (ReasonCode.ALIGNMENT, "strides (1680, 42, 1) of W"),
    "offset": (ReasonCode.ALIGNMENT, "A does not begin at a multiple of 16 bytes"),
}


def refused_args(change):
    """Rows of 168 bytes, weights stored column by column, an operand that begins in between."""
    sizes = {"depth": {"width": 42}, "columns": {"hidden": 42, "transposed": True}}
    form = ALIGNED.replace(dtype=torch.float32, **{"width": 40, **sizes.get(change, {})})
    act, *rest = down_args(form)
    if change == "offset":
        act = torch.cat((torch.zeros(1), act.reshape(-1)))[1:].reshape(act.shape)
    return act, *rest


@pytest.mark.parametrize("change", REFUSED)
def test_what_descriptors_do_not_take_comes_by_pointers(change, few_sms, monkeypatch):
    """As the plan says then, and with the reason."""
    plan = {True: MANY[1], False: MANY[0]}
    monkeypatch.setattr(eager, "schedule_for", lambda rows, shape, device, **_: plan[shape.descriptors])
    args = refused_args(change)
    with collect() as decisions:
        check(functools.partial(down, schedule=None), down_reference, args)
    assert not any("w_desc" in text for text in few_sms.texts)
    assert all("GROUP_M" in text for text in few_sms.texts)
    (found,) = decisions
    code, detail = REFUSED[change]
    assert (found.subject, found.reason.code) == ("moe_expert_down", code)
    assert detail in found.reason.detail


@pytest.mark.parametrize("change", REFUSED)
def test_descriptors_that_were_asked_for_are_refused(change, few_sms):
    """An explicit schedule is never another one."""
    with raises_catalogue(MoEUnsupportedError, where="moe_expert_down", got=REFUSED[change][1]):
        down(*refused_args(change), schedule=MANY[1])
    down(*refused_args(change), schedule=MANY[1].without_tma())


def test_devices_without_descriptors_refuse_them(few_sms, monkeypatch):
    monkeypatch.setattr(Few, "capability", (8, 0))
    with raises_catalogue(MoEUnsupportedError, where="moe_expert_down", got="need sm_90"):
        down(*down_args(ALIGNED.replace(dtype=torch.float32)), schedule=MANY[1])


@pytest.mark.parametrize(("capability", "dtype"), [((8, 0), torch.float16), ((9, 0), torch.float32)], ids=str)
def test_layouts_are_looked_at_where_descriptors_could_be_chosen(capability, dtype, monkeypatch):
    launches = Launches(monkeypatch, dataclasses.replace(H100, capability=capability))
    monkeypatch.setattr(eager, "tma_refusal", lambda *args, **options: pytest.fail("looked at"))
    with collect() as decisions:
        eager.moe_expert_down(*down_args(ALIGNED.replace(tokens=5000, dtype=dtype)))
    assert len(launches.calls) == 1 and not decisions


@pytest.mark.parametrize("act", [IDENTITY, "u", "swiglu", "geglu_tanh", "min(max(g, -0.5), 0.5) * u", "relu2"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_activations(act, interleaved):
    args = up_args(WIDE.replace(dtype=torch.float32, bias=True, ids="sentinels"))[:6]
    check(lambda *args: up(*args, act, interleaved), lambda *args: up_reference(*args, act, interleaved), args)


@pytest.mark.parametrize(("act", "function"), [("tanh(g)", torch.tanh), ("log1p(g)", torch.log1p)])
def test_small_arguments_keep_their_digits(act, function):
    """By relative error: the textbook forms of both lose all digits of 1e-7."""
    sign = torch.ones(1) if act == "log1p(g)" else torch.tensor([[1.0], [-1.0]])
    g = (sign * torch.logspace(-30, 1.5, 512)).reshape(-1, 1)
    special = torch.tensor([[0.0], [math.inf], [math.nan]])
    hidden = torch.cat((g, special))
    slots = torch.arange(len(hidden), dtype=torch.int32)
    offsets = torch.tensor([0, len(hidden)], dtype=torch.int32)
    ours = up(hidden, torch.ones(1, 1, 1), None, slots, offsets, 1, act)
    wanted = function(hidden.double())
    torch.testing.assert_close(ours.double(), wanted, rtol=5e-7, atol=0, equal_nan=True)


def test_rows_of_no_expert_are_zero_whatever_they_hold():
    """Their inputs are not read, the activation of zero is not stored: sigmoid(0) is not 0."""
    form = WIDE.replace(dtype=torch.float32, ids="none", bias=True)
    hidden, w13, b13, order, offsets, top_k, *_ = up_args(form)
    out = up(torch.full_like(hidden, torch.nan), w13, b13, order, offsets, top_k, "sigmoid(g)")
    assert out.eq(0).all()
    act, w2, b2, order, offsets = down_args(form)
    assert down(torch.full_like(act, torch.nan), w2, b2, order, offsets).eq(0).all()


def test_nan_stays_in_its_rows():
    form = WIDE.replace(dtype=torch.float32, top_k=1)
    hidden, w13, b13, order, offsets, top_k, *_ = up_args(form)
    hidden[5] = torch.nan
    row = order.tolist().index(5)
    out = up(hidden, w13, b13, order, offsets, top_k, "swiglu")
    assert out[row].isnan().all()
    assert out.isnan().sum() == out.shape[1]


def test_strided_inputs():
    """Rows of a wider tensor, columns of a transposed one, biases with gaps, rows all the same."""
    form = WIDE.replace(dtype=torch.float32, bias=True)
    hidden, w13, b13, order, offsets, *rest = up_args(form)
    wide = torch.cat((hidden, hidden), 1)[:, : form.hidden]
    check(up, up_reference, (wide, w13, torch.stack((b13, b13), 2)[..., 0], order, offsets, *rest))
    check(up, up_reference, (hidden.t().contiguous().t(), w13, b13, order, offsets, *rest))
    check(up, up_reference, (hidden[:1].expand_as(hidden), w13[..., ::2].repeat(1, 1, 2), b13, order, offsets, *rest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("left", ["row", "slot", "token"])
@pytest.mark.parametrize("right", ["row", "slot", "token"])
def test_grad_weight_by_every_index(left, right, dtype):
    form = WIDE.replace(dtype=dtype, ids="sentinels")
    check(eager.moe_expert_grad_weight, grad_weight_reference, grad_weight_args(form, left=left, right=right))


@pytest.mark.parametrize(
    "name", ["primes", "empty_experts", "no_tokens", "all_sentinels", "one_expert_gets_all", "width_one"]
)
def test_grad_weight_forms(name):
    args = grad_weight_args(FORMS[name].replace(dtype=torch.float32), left="row", right="slot")
    check(eager.moe_expert_grad_weight, grad_weight_reference, args)


def test_grad_weight_of_a_bias():
    """A column of ones, as the bias's gradient asks for: width 1."""
    left, _, _, index, offsets = grad_weight_args(WIDE.replace(dtype=torch.float32), left="row", right="slot")
    check(eager.moe_expert_grad_weight, grad_weight_reference, (left, torch.ones(len(left), 1), None, None, offsets))
    check(eager.moe_expert_grad_weight, grad_weight_reference, (left, torch.ones(len(left), 1), index, None, offsets))


class Launches:
    """What `standalone.launch` was asked for."""

    def __init__(self, monkeypatch, device=H100):
        self.calls = []
        monkeypatch.setattr(
            standalone, "launch", lambda text, _, **options: self.calls.append(options | {"text": text})
        )
        monkeypatch.setattr(eager, "device_spec", lambda index: device)


@pytest.mark.parametrize("tokens", [1, 100, 5000])
def test_the_schedule_is_planned_for_the_rows_of_the_call(tokens, monkeypatch):
    launches = Launches(monkeypatch)
    form = WIDE.replace(tokens=tokens, dtype=torch.float16)
    hidden, w13, b13, order, offsets, _, act, _ = up_args(form)
    eager.moe_expert_up(hidden, w13, b13, order, offsets, act=act)
    eager.moe_expert_down(*down_args(form))
    shapes = (GemmShape(6, 48, 40, True, 2), GemmShape(6, 40, 48, False, 2))
    for launch, shape in zip(launches.calls, shapes, strict=True):
        wanted = schedule_for(tokens * form.top_k, shape, device=H100)
        constants = launch["constants"]
        blocks = tuple(constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        assert Schedule(*blocks, launch["num_warps"], launch["num_stages"], wanted.loop, wanted.group_m) == wanted
        assert ("w_desc" in launch["text"]) == wanted.loop.tma
        assert (constants["NUM_EXPERTS"], constants["E_POW2"]) == (6, 32)
    assert [launch["constants"]["TOP_K"] for launch in launches.calls] == [form.top_k, 1]


def test_one_schedule_for_any_number_of_rows(monkeypatch):
    """Also where an operand begins in between, as rows of a batch may: by pointers, in the same tiles."""

    def asked_for():
        launches = Launches(monkeypatch)
        for tokens in (1, 100, 5000):
            form = WIDE.replace(tokens=tokens, dtype=torch.float16)
            hidden, w13, b13, order, offsets, _, act, _ = up_args(form)
            eager.moe_expert_up(hidden, w13, b13, order, offsets, act=act)
        for offset in (0, 1):
            act, w2, b2, order, offsets = down_args(WIDE.replace(tokens=5000, dtype=torch.float16))
            act = torch.cat((act.new_zeros(offset), act.reshape(-1)))[offset:].reshape(act.shape)
            eager.moe_expert_down(act, w2, b2, order, offsets)
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        return [(*(call["constants"][name] for name in names), call["num_warps"]) for call in launches.calls]

    with batch_invariant():
        *ups, down, shifted = asked_for()
    assert len(set(ups)) == 1 and down == shifted
    assert len(set(asked_for()[:3])) > 1


def test_offsets_beyond_32_bits(monkeypatch):
    launches = Launches(monkeypatch)
    rows, width = 1 << 20, 1 << 11
    act = torch.empty(rows, 16, dtype=torch.float16, device="meta")
    w2 = torch.empty(2, width, 16, dtype=torch.float16, device="meta")
    order, offsets = (torch.empty(n, dtype=torch.int32, device="meta") for n in (rows, 3))
    eager.moe_expert_down(act, w2, None, order, offsets)
    eager.moe_expert_down(act[:-1], w2, None, order[:-1], offsets)
    assert [launch["constants"]["INDEX_DTYPE"] for launch in launches.calls] == ["tl.int64", "tl.int32"]


@pytest.mark.parametrize(
    ("setting", "wide", "narrow"), [("allow_tf32", False, True), ("fp32_precision", "ieee", "tf32")]
)
def test_fp32_is_multiplied_as_torch_is_told(setting, wide, narrow):
    """By either of torch's settings; reading the older one raises once the newer was written."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for value, wanted in ((wide, "ieee"), (narrow, "tf32")):
            setattr(matmul, setting, value)
            assert eager.dot_precision(torch.float32) == wanted
            assert eager.dot_precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before


@given(st.integers(1, 1 << 20))
def test_power_of_two(number):
    found = eager.power_of_two(number)
    assert found >= number
    assert found & (found - 1) == 0
    assert found == 2 or found < 2 * number


@given(st.lists(st.integers(-1, 9), max_size=200), st.sampled_from([16, 32, 64]), st.integers(1, 300))
def test_the_grid_holds_every_tile(ids, block_m, width):
    """Each expert's rows and the tail begin a tile of their own, whatever the routing."""
    schedule = dataclasses.replace(SMALL, block_m=block_m)
    slots = sort_slots(torch.tensor(ids, dtype=torch.int32).reshape(-1, 1), 8)
    bounds = [*slots.offsets_E1.tolist(), len(ids)]
    tiles = sum(-(-(stop - start) // block_m) for start, stop in itertools.pairwise(bounds))
    columns = -(-width // schedule.block_n)
    grid = eager.gemm_grid(len(ids), width, num_experts=8, schedule=schedule)
    assert tiles * columns <= grid <= len(ids) * columns
