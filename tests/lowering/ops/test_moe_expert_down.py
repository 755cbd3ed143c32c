"""`diffulex::moe_expert_down` against its oracle: forms, dtypes, gradients; what it refuses; what may not leak."""

import functools
import math

import pytest
import torch
from torch.nn import functional

from lowering.errors import MoEDeviceError, MoEDtypeError, MoEShapeError
from lowering.ops import moe_expert_down
from lowering.ops.moe_expert_down import _cuda
from lowering.reference.moe_expert_down import moe_expert_down_reference
from tests.support.catalogue import assert_refused, named
from tests.support.inputs import (
    DEVICES,
    FORMS,
    LOW_DTYPES,
    WIDE_FORMS,
    BlockForm,
    cast,
    down_args,
    in_strides,
    with_grad,
)
from tests.support.oracle import CountOps, assert_near_exact, assert_oracle_ratio, gradients, random_like

TAILED = FORMS["sentinels"]


def reference(act, w2, b2, order, offsets):
    return moe_expert_down_reference(act, w2, order, offsets, b2_EH=b2)


def eager(act, w2, b2, order, offsets):
    """One linear per expert in the inputs' own dtype, rows put back by index."""
    bounds = offsets.tolist()
    out = act.new_zeros(act.shape[0], w2.shape[1])
    for e in range(len(bounds) - 1):
        rows = slice(bounds[e], bounds[e + 1])
        out = out.index_put((order[rows].long(),), functional.linear(act[rows], w2[e], None if b2 is None else b2[e]))
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_reference(form, device):
    args = down_args(form, device)
    assert_near_exact(moe_expert_down(*args), reference(*args))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_fp64_path_of_cuda_equals_the_reference(form):
    """It is made of torch functions that never read the offsets, so it runs here too."""
    args = down_args(form)
    assert_near_exact(_cuda(*args), reference(*args))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("form", WIDE_FORMS.values(), ids=WIDE_FORMS)
def test_error_ratio(form, dtype, device):
    args = down_args(form.replace(dtype=dtype), device)
    assert_oracle_ratio(moe_expert_down(*args), eager(*args), reference(*cast(args, torch.float64)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_equal_those_of_the_reference(form, device):
    args = with_grad(down_args(form, device))
    grad = random_like(moe_expert_down(*args))
    ours, wanted = gradients(moe_expert_down, args, grad), gradients(reference, args, grad)
    assert set(ours) == set(wanted) == {0, 1} | ({2} if form.bias else set())
    for position, oracle in wanted.items():
        assert_near_exact(ours[position], oracle, what=f"gradient {position}")


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("form", WIDE_FORMS.values(), ids=WIDE_FORMS)
def test_gradient_error_ratio(form, dtype):
    args = with_grad(down_args(form.replace(dtype=dtype)))
    double = with_grad(cast(args, torch.float64))
    grad = random_like(moe_expert_down(*args))
    found = [gradients(moe_expert_down, args, grad), gradients(eager, args, grad), gradients(reference, double, grad)]
    for position in found[0]:
        assert_oracle_ratio(*(grads[position] for grads in found), what=f"gradient {position}")


@pytest.mark.parametrize("name", ["biased", "transposed", "sentinels"])
def test_gradcheck(name):
    form = FORMS[name].replace(tokens=3, hidden=3, width=2, experts=3, bias=True)
    act, w2, b2, *rest = with_grad(down_args(form))
    assert torch.autograd.gradcheck(lambda a, w, b: moe_expert_down(a, w, b, *rest), (act, w2, b2))
    assert torch.autograd.gradgradcheck(lambda a, w, b: moe_expert_down(a, w, b, *rest), (act, w2, b2))


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_only_the_asked_gradient_is_made(asked):
    args = list(down_args(FORMS["biased"]))
    args[asked].requires_grad_()
    moe_expert_down(*args).sum().backward()  # an expanded gradient of stride 0
    assert [a.grad is not None for a in args[:3]] == [i == asked for i in range(3)]
    assert args[asked].grad.shape == args[asked].shape


def test_frozen_experts_cost_no_weight_gradient():
    args = list(down_args(FORMS["biased"]))
    args[0].requires_grad_()
    out = moe_expert_down(*args)
    with CountOps() as counted:
        out.sum().backward()
    assert counted.calls["moe_expert_grad_weight"] == 0
    assert counted.calls["moe_expert_up"] == 1


def test_slots_of_no_expert_are_zero_whatever_their_rows_hold():
    """With a bias and NaN in the rows past offsets[E]: the bias may not be added, the rows may not be read."""
    act, w2, b2, order, offsets = down_args(TAILED)
    valid = int(offsets[-1])
    assert 0 < valid < order.numel(), "the form must have valid and invalid slots"
    clean = moe_expert_down(act, w2, b2, order, offsets)
    act[valid:] = math.nan
    dirty = moe_expert_down(act, w2, b2, order, offsets)
    assert torch.equal(clean, dirty)
    invalid = dirty[order[valid:].long()]
    assert torch.equal(invalid, torch.zeros_like(invalid))
    assert (dirty[order[:valid].long()] != 0).any(1).all()


def test_rows_go_to_their_slots():
    """With w2 the identity and row r holding r, slot order[r] holds r."""
    order = torch.tensor([3, 0, 2, 1], dtype=torch.int32)
    act = torch.arange(4.0)[:, None].expand(4, 2).contiguous()
    w2 = torch.eye(2).expand(2, 2, 2)
    slots = moe_expert_down(act, w2, None, order, torch.tensor([0, 1, 3], dtype=torch.int32))
    assert slots[:, 0].tolist() == [1.0, 0.0, 2.0, 0.0]  # slot 1 is row 3, which belongs to no expert


def test_nan_in_one_row_stays_there():
    args = down_args(FORMS["primes"])
    clean = moe_expert_down(*args)
    args[0][5, 1] = math.nan
    dirty = moe_expert_down(*args)
    slot = int(args[3][5])
    assert dirty[slot].isnan().all()
    rest = torch.arange(dirty.shape[0]) != slot
    assert torch.equal(dirty[rest], clean[rest])


def test_gradients_of_invalid_slots_are_ignored():
    args = with_grad(down_args(TAILED))
    grad = random_like(moe_expert_down(*args))
    grads = []
    for filler in (0.0, math.nan):
        grad[args[3][int(args[4][-1]) :].long()] = filler
        grads.append(gradients(moe_expert_down, args, grad))
    for position, wanted in grads[0].items():
        assert torch.equal(grads[1][position], wanted), f"gradient {position}"


@pytest.mark.parametrize("device", DEVICES)
def test_strides_do_not_matter(device):
    """Of no input, the vectors of integers included."""
    same = assert_near_exact if device == "cpu" else functools.partial(torch.testing.assert_close, rtol=0, atol=0)
    args = down_args(FORMS["biased"].replace(dtype=torch.float64 if device == "cpu" else torch.float32), device)
    wanted = moe_expert_down(*args)
    strided = [in_strides(a) for a in args]
    same(moe_expert_down(*strided), wanted)
    same(moe_expert_down(functional.pad(args[0], (1, 2))[:, 1:-2], *args[1:]), wanted)


def test_experts_may_share_one_weight():
    """A weight of stride 0 over experts."""
    act, w2, b2, order, offsets = down_args(FORMS["primes"])
    shared = w2[:1].expand_as(w2)
    assert_near_exact(
        moe_expert_down(act, shared, b2, order, offsets), moe_expert_down(act, shared.contiguous(), b2, order, offsets)
    )


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_both_integer_types(integer):
    act, w2, b2, order, offsets = args = down_args(TAILED)
    assert torch.equal(moe_expert_down(act, w2, b2, order.to(integer), offsets.to(integer)), moe_expert_down(*args))


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_bitwise_repeatable(dtype):
    args = down_args(WIDE_FORMS["gpt_oss"].replace(dtype=dtype))
    first = moe_expert_down(*args)
    assert all(torch.equal(first, moe_expert_down(*args)) for _ in range(3))


FORM = BlockForm(bias=True, dtype=torch.float32)
BAD = {
    "act_rank": ({"act": lambda a: a["act"][None]}, MoEShapeError, "(1, 14, 6)"),
    "w2_rank": ({"w2": lambda a: a["w2"][0]}, MoEShapeError, "(8, 6)"),
    "b2_rank": ({"b2": lambda a: a["b2"][0]}, MoEShapeError, "(8,)"),
    "order_rank": ({"order": lambda a: a["order"].view(7, 2)}, MoEShapeError, "(7, 2)"),
    "offsets_rank": ({"offsets": lambda a: a["offsets"][None]}, MoEShapeError, "(1, 6)"),
    "act_width": ({"act": lambda a: a["act"][:, 1:]}, MoEShapeError, "5"),
    "transposed_w2": ({"w2": lambda a: a["w2"].mT}, MoEShapeError, "6"),
    "order_length": ({"order": lambda a: a["order"][1:]}, MoEShapeError, "13"),
    "experts_of_offsets": ({"offsets": lambda a: a["offsets"][1:]}, MoEShapeError, "5"),
    "experts_of_b2": ({"b2": lambda a: a["b2"][1:]}, MoEShapeError, "4"),
    "width_of_b2": ({"b2": lambda a: a["b2"][:, 1:]}, MoEShapeError, "7"),
    "act_dtype": ({"act": lambda a: a["act"].int()}, MoEDtypeError, "torch.int32"),
    "w2_dtype": ({"w2": lambda a: a["w2"].bfloat16()}, MoEDtypeError, "torch.bfloat16"),
    "b2_dtype": ({"b2": lambda a: a["b2"].double()}, MoEDtypeError, "torch.float64"),
    "order_dtype": ({"order": lambda a: a["order"].short()}, MoEDtypeError, "torch.int16"),
    "offsets_dtype": ({"offsets": lambda a: a["offsets"].float()}, MoEDtypeError, "torch.float32"),
    **{
        f"{name}_device": ({name: lambda a, name=name: a[name].to("meta")}, MoEDeviceError, "meta")
        for name in ("w2", "b2", "order", "offsets")
    },
    "act_device": ({"act": lambda a: a["act"].to("meta")}, MoEDeviceError, "cpu"),
}


@pytest.mark.parametrize(("changes", "kind", "got"), BAD.values(), ids=BAD)
def test_refused(changes, kind, got):
    arguments = named(moe_expert_down, down_args(FORM))
    broken = arguments | {name: change(arguments) for name, change in changes.items()}
    assert_refused(moe_expert_down, broken, kind, got=got)


def test_the_refused_arguments_are_right_before_they_are_broken():
    arguments = named(moe_expert_down, down_args(FORM))
    assert moe_expert_down(**arguments).shape == (14, 8)
    assert moe_expert_down(**{name: value.to("meta") for name, value in arguments.items()}).is_meta
