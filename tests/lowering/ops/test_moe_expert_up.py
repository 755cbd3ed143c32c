"""`diffulex::moe_expert_up` against its oracle: forms, dtypes, gradients; what it refuses; what may not leak."""

import functools
import math

import pytest
import torch
from torch.nn import functional

from lowering.activation import IDENTITY, evaluate, split_gate
from lowering.errors import MoEDeviceError, MoEDtypeError, MoEOptionError, MoERangeError, MoEShapeError
from lowering.ops import moe_expert_up
from lowering.ops.moe_expert_up import _cuda
from lowering.reference.moe_expert_up import moe_expert_up_reference
from tests.support.catalogue import assert_refused, named
from tests.support.inputs import (
    DEVICES,
    FORMS,
    LOW_DTYPES,
    WIDE_FORMS,
    BlockForm,
    cast,
    in_strides,
    sort_slots,
    up_args,
    with_grad,
)
from tests.support.oracle import CountOps, assert_near_exact, assert_oracle_ratio, gradients, random_like
from tests.support.strategies import ACTS

TAILED = FORMS["sentinels"]  # the only forms here with rows past offsets[E]


def reference(hidden, w13, b13, order, offsets, top_k, act=IDENTITY, interleaved=False):
    return moe_expert_up_reference(
        hidden, w13, order, offsets, top_k=top_k, b13_EJ=b13, act=act, interleaved=interleaved
    )


def eager(hidden, w13, b13, order, offsets, top_k, act=IDENTITY, interleaved=False):
    """One linear and one activation per expert in the inputs' own dtype."""
    bounds, blocks = offsets.tolist(), []
    for e in range(len(bounds) - 1):
        rows = hidden[order[bounds[e] : bounds[e + 1]].long() // top_k]
        pre = functional.linear(rows, w13[e], None if b13 is None else b13[e])
        blocks.append(pre if act == IDENTITY else evaluate(act, *split_gate(pre, act, interleaved=interleaved)))
    out = torch.cat(blocks)
    return torch.cat((out, out.new_zeros(order.numel() - bounds[-1], out.shape[1])))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_reference(form, device):
    args = up_args(form, device)
    assert_near_exact(moe_expert_up(*args), reference(*args))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("act", [*ACTS, "u", "g", "exp(-square(g)) + u", IDENTITY])
def test_every_activation(act, interleaved):
    args = up_args(TAILED.replace(act="swiglu", interleaved=interleaved))[:6]
    assert_near_exact(moe_expert_up(*args, act, interleaved), reference(*args, act, interleaved))


def test_layouts_differ():
    args = up_args(FORMS["plain"])[:6]
    assert not torch.allclose(moe_expert_up(*args, "swiglu", False), moe_expert_up(*args, "swiglu", True))


def test_identity_is_the_default_and_raw():
    args = up_args(FORMS["biased"])[:6]
    raw = moe_expert_up(*args)
    assert raw.shape[1] == args[1].shape[1]
    assert torch.equal(raw, moe_expert_up(*args, IDENTITY, True))
    gate, up = raw.chunk(2, dim=1)
    assert_near_exact(functional.silu(gate) * up, moe_expert_up(*args, "swiglu"))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_fp64_path_of_cuda_equals_the_reference(form):
    """It is made of torch functions that never read the offsets, so it runs here too."""
    args = up_args(form)
    assert_near_exact(_cuda(*args), reference(*args))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("form", WIDE_FORMS.values(), ids=WIDE_FORMS)
def test_error_ratio(form, dtype, device):
    args = up_args(form.replace(dtype=dtype), device)
    assert_oracle_ratio(moe_expert_up(*args), eager(*args), reference(*cast(args, torch.float64)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_equal_those_of_the_reference(form, device):
    args = with_grad(up_args(form, device))
    grad = random_like(moe_expert_up(*args))
    ours, wanted = gradients(moe_expert_up, args, grad), gradients(reference, args, grad)
    assert set(ours) == set(wanted) == {0, 1} | ({2} if form.bias else set())
    for position, oracle in wanted.items():
        assert_near_exact(ours[position], oracle, what=f"gradient {position}")


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("form", WIDE_FORMS.values(), ids=WIDE_FORMS)
def test_gradient_error_ratio(form, dtype):
    args = with_grad(up_args(form.replace(dtype=dtype)))
    double = with_grad(cast(args, torch.float64))
    grad = random_like(moe_expert_up(*args))
    found = [gradients(moe_expert_up, args, grad), gradients(eager, args, grad), gradients(reference, double, grad)]
    for position in found[0]:
        assert_oracle_ratio(*(grads[position] for grads in found), what=f"gradient {position}")


@pytest.mark.parametrize("name", ["biased", "gpt_oss", "sentinels", "ungated_biased"])
def test_gradcheck(name):
    form = FORMS[name].replace(tokens=3, hidden=3, width=2, experts=3)
    hidden, w13, b13, *rest = with_grad(up_args(form))
    assert torch.autograd.gradcheck(lambda h, w, b: moe_expert_up(h, w, b, *rest), (hidden, w13, b13))
    assert torch.autograd.gradgradcheck(lambda h, w, b: moe_expert_up(h, w, b, *rest), (hidden, w13, b13))


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_only_the_asked_gradient_is_made(asked):
    args = list(up_args(FORMS["biased"]))
    args[asked].requires_grad_()
    moe_expert_up(*args).sum().backward()  # an expanded gradient of stride 0
    assert [a.grad is not None for a in args[:3]] == [i == asked for i in range(3)]
    assert args[asked].grad.shape == args[asked].shape


def test_frozen_experts_cost_no_weight_gradient():
    args = list(up_args(FORMS["biased"]))
    args[0].requires_grad_()
    out = moe_expert_up(*args)
    with CountOps() as counted:
        out.sum().backward()
    assert counted.calls["moe_expert_grad_weight"] == 0
    assert counted.calls["moe_expert_down"] == 1


@pytest.mark.parametrize("act", [*ACTS, "sigmoid(g)", "exp(g + u)", "log(abs(g))", IDENTITY])
def test_rows_of_no_expert_are_zero(act):
    """Also where act(0) is not zero, or infinite."""
    args = up_args(TAILED.replace(act="swiglu"))
    valid = int(args[4][-1])
    assert 0 < valid < args[3].numel(), "the form must have valid and invalid slots"
    tail = moe_expert_up(*args[:6], act)[valid:]
    assert torch.equal(tail, torch.zeros_like(tail))


def test_nan_in_one_token_stays_there():
    args = up_args(FORMS["primes"])
    clean = moe_expert_up(*args)
    args[0][4, 2] = math.nan
    dirty = moe_expert_up(*args)
    hit = args[3] // args[5] == 4
    assert hit.sum() == args[5]
    assert dirty[hit].isnan().all()
    assert torch.equal(dirty[~hit], clean[~hit])


def test_infinite_weights_of_one_expert_stay_there():
    args = up_args(FORMS["primes"])
    clean = moe_expert_up(*args)
    args[1][2] = math.inf
    dirty = moe_expert_up(*args)
    start, end = args[4][2:4].tolist()
    assert start < end
    assert not dirty[start:end].isfinite().any()
    assert torch.equal(torch.cat((dirty[:start], dirty[end:])), torch.cat((clean[:start], clean[end:])))


def test_gradients_of_invalid_rows_are_ignored():
    args = with_grad(up_args(TAILED))
    valid, grad = int(args[4][-1]), random_like(moe_expert_up(*args))
    grads = []
    for filler in (0.0, math.nan):
        grad[valid:] = filler
        grads.append(gradients(moe_expert_up, args, grad))
    for position, wanted in grads[0].items():
        assert torch.equal(grads[1][position], wanted), f"gradient {position}"


@pytest.mark.parametrize("device", DEVICES)
def test_strides_do_not_matter(device):
    """Of no input, the vectors of integers included."""
    same = assert_near_exact if device == "cpu" else functools.partial(torch.testing.assert_close, rtol=0, atol=0)
    args = up_args(FORMS["biased"].replace(dtype=torch.float64 if device == "cpu" else torch.float32), device)
    wanted = moe_expert_up(*args)
    strided = [in_strides(a) for a in args[:5]]
    padded = functional.pad(args[0], (1, 2))[:, 1:-2]
    same(moe_expert_up(*strided, *args[5:]), wanted)
    same(moe_expert_up(padded, *args[1:]), wanted)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_both_integer_types(integer):
    args = up_args(FORMS["sentinels"])
    other = (*args[:3], args[3].to(integer), args[4].to(integer), *args[5:])
    assert torch.equal(moe_expert_up(*other), moe_expert_up(*args))


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_bitwise_repeatable(dtype):
    args = up_args(WIDE_FORMS["gpt_oss"].replace(dtype=dtype))
    first = moe_expert_up(*args)
    assert all(torch.equal(first, moe_expert_up(*args)) for _ in range(3))


FORM = BlockForm(bias=True, dtype=torch.float32)
BAD = {
    "hidden_rank": ({"hidden": lambda a: a["hidden"][None]}, MoEShapeError, "(1, 7, 8)"),
    "w13_rank": ({"w13": lambda a: a["w13"][0]}, MoEShapeError, "(12, 8)"),
    "b13_rank": ({"b13": lambda a: a["b13"][0]}, MoEShapeError, "(12,)"),
    "order_rank": ({"order": lambda a: a["order"].view(7, 2)}, MoEShapeError, "(7, 2)"),
    "offsets_rank": ({"offsets": lambda a: a["offsets"][None]}, MoEShapeError, "(1, 6)"),
    "hidden_width": ({"hidden": lambda a: a["hidden"][:, 1:]}, MoEShapeError, "7"),
    "order_length": ({"order": lambda a: a["order"][1:]}, MoEShapeError, "13"),
    "experts_of_offsets": ({"offsets": lambda a: a["offsets"][1:]}, MoEShapeError, "5"),
    "experts_of_b13": ({"b13": lambda a: a["b13"][1:]}, MoEShapeError, "4"),
    "width_of_b13": ({"b13": lambda a: a["b13"][:, 1:]}, MoEShapeError, "11"),
    "odd_gated_width": ({"w13": lambda a: a["w13"][:, 1:], "b13": lambda a: a["b13"][:, 1:]}, MoEShapeError, "1"),
    "hidden_dtype": ({"hidden": lambda a: a["hidden"].long()}, MoEDtypeError, "torch.int64"),
    "w13_dtype": ({"w13": lambda a: a["w13"].half()}, MoEDtypeError, "torch.float16"),
    "b13_dtype": ({"b13": lambda a: a["b13"].double()}, MoEDtypeError, "torch.float64"),
    "order_dtype": ({"order": lambda a: a["order"].float()}, MoEDtypeError, "torch.float32"),
    "offsets_dtype": ({"offsets": lambda a: a["offsets"].bool()}, MoEDtypeError, "torch.bool"),
    "top_k_zero": ({"top_k": lambda a: 0}, MoERangeError, "0"),
    "top_k_negative": ({"top_k": lambda a: -2}, MoERangeError, "-2"),
    "top_k_of_another_batch": ({"top_k": lambda a: 3}, MoEShapeError, "14"),
    "unknown_act": ({"act": lambda a: "swigloo"}, MoEOptionError, "'swigloo'"),
    "act_with_attribute": ({"act": lambda a: "g.data"}, MoEOptionError, "'g.data'"),
    **{
        f"{name}_device": ({name: lambda a, name=name: a[name].to("meta")}, MoEDeviceError, "meta")
        for name in ("w13", "b13", "order", "offsets")
    },
    "hidden_device": ({"hidden": lambda a: a["hidden"].to("meta")}, MoEDeviceError, "cpu"),
}


@pytest.mark.parametrize(("changes", "kind", "got"), BAD.values(), ids=BAD)
def test_refused(changes, kind, got):
    arguments = named(moe_expert_up, up_args(FORM))
    broken = arguments | {name: change(arguments) for name, change in changes.items()}
    where = "act" if kind is MoEOptionError else None
    assert_refused(moe_expert_up, broken, kind, where=where, got=got)


def test_the_refused_arguments_are_right_before_they_are_broken():
    arguments = named(moe_expert_up, up_args(FORM))
    assert moe_expert_up(**arguments).shape == (14, 6)
    assert moe_expert_up(**{n: v.to("meta") if torch.is_tensor(v) else v for n, v in arguments.items()}).is_meta


def test_the_reference_sorts_nothing_itself():
    """Rows follow `order`, not the ids: the op and its oracle must agree on any permutation within an expert."""
    form = FORMS["one_expert_gets_all"]
    args = list(up_args(form))
    args[3] = args[3].flip(0).contiguous()
    assert_near_exact(moe_expert_up(*args), reference(*args))
    assert not torch.equal(moe_expert_up(*args), moe_expert_up(*up_args(form)))
    assert sort_slots(torch.tensor([[1, 0], [9, 1]]), 2).order_N.tolist() == [1, 0, 3, 2]
