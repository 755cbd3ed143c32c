"""`diffulex::moe_expert_grad_weight` against its oracle: indexing, dtypes, empty experts; what it refuses."""

import functools
import math

import pytest
import torch

from lowering.errors import MoEDeviceError, MoEDtypeError, MoEShapeError
from lowering.ops import moe_expert_grad_weight
from lowering.ops.moe_expert_grad_weight import _cuda
from lowering.reference.moe_expert_grad_weight import moe_expert_grad_weight_reference
from tests.support.catalogue import assert_refused, named
from tests.support.inputs import DEVICES, FORMS, LOW_DTYPES, WIDE_FORMS, BlockForm, cast, grad_weight_args, in_strides
from tests.support.oracle import assert_near_exact, assert_oracle_ratio

KINDS = [("row", "row"), ("row", "token"), ("slot", "row"), ("slot", "token"), ("token", "slot")]


def reference(left, right, left_index, right_index, offsets):
    return moe_expert_grad_weight_reference(left, right, offsets, left_index_N=left_index, right_index_N=right_index)


def eager(left, right, left_index, right_index, offsets):
    """One mm per expert in the inputs' own dtype."""
    left = left if left_index is None else left[left_index.long()]
    right = right if right_index is None else right[right_index.long()]
    bounds = offsets.tolist()
    spans = [slice(bounds[e], bounds[e + 1]) for e in range(len(bounds) - 1)]
    return torch.stack([left[span].T @ right[span] for span in spans])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("left", "right"), KINDS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_reference(form, left, right, device):
    args = grad_weight_args(form, device, left=left, right=right)
    assert_near_exact(moe_expert_grad_weight(*args), reference(*args))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_fp64_path_of_cuda_equals_the_reference(form):
    """It is made of torch functions that never read the offsets, so it runs here too."""
    args = grad_weight_args(form, left="slot", right="token")
    assert_near_exact(_cuda(*args), reference(*args))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize(("left", "right"), KINDS[1:3])
@pytest.mark.parametrize("form", WIDE_FORMS.values(), ids=WIDE_FORMS)
def test_error_ratio(form, left, right, dtype, device):
    args = grad_weight_args(form.replace(dtype=dtype), device, left=left, right=right)
    assert_oracle_ratio(moe_expert_grad_weight(*args), eager(*args), reference(*cast(args, torch.float64)))


@pytest.mark.parametrize("dtype", [*LOW_DTYPES, torch.float64], ids=str)
def test_empty_experts_are_zero(dtype):
    form = FORMS["empty_experts"].replace(dtype=dtype)
    args = grad_weight_args(form, left="row", right="token")
    grad = moe_expert_grad_weight(*args)
    empty = args[4].diff() == 0
    assert empty[1::2].all(), "every second expert must be empty"
    assert torch.equal(grad[empty], torch.zeros_like(grad[empty]))
    assert (grad[~empty] != 0).any((1, 2)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_no_expert_are_not_read(device):
    args = grad_weight_args(FORMS["sentinels"], device, left="row", right="slot")
    valid = int(args[4][-1])
    assert 0 < valid < args[0].shape[0], "the form must have valid and invalid slots"
    clean = moe_expert_grad_weight(*args)
    args[0][valid:] = math.nan
    args[1][args[3][valid:].long()] = math.inf
    assert torch.equal(moe_expert_grad_weight(*args), clean)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_in_one_row_stays_in_its_expert(device):
    args = grad_weight_args(FORMS["primes"], device, left="row", right="slot")
    clean = moe_expert_grad_weight(*args)
    start, end = args[4][3:5].tolist()
    assert start < end
    args[0][start, 2] = math.nan
    dirty = moe_expert_grad_weight(*args)
    assert dirty[3, 2].isnan().all()
    dirty[3, 2] = clean[3, 2]
    assert torch.equal(dirty, clean)


@pytest.mark.parametrize(("left", "right"), KINDS)
@pytest.mark.parametrize("name", ["primes", "sentinels"])
def test_gradcheck(name, left, right):
    first, second, *rest = grad_weight_args(FORMS[name], left=left, right=right)
    sides = (first.requires_grad_(), second.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: moe_expert_grad_weight(a, b, *rest), sides)
    assert torch.autograd.gradgradcheck(lambda a, b: moe_expert_grad_weight(a, b, *rest), sides)


def test_is_the_sum_of_outer_products():
    left, right = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([[1.0], [10.0]])
    offsets = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    grad = moe_expert_grad_weight(left, right, None, torch.tensor([0, 1, 1]), offsets)
    assert grad.squeeze(2).tolist() == [[31.0, 42.0], [0.0, 0.0], [50.0, 60.0]]


@pytest.mark.parametrize("device", DEVICES)
def test_strides_do_not_matter(device):
    """Of no input, the vectors of integers included."""
    same = assert_near_exact if device == "cpu" else functools.partial(torch.testing.assert_close, rtol=0, atol=0)
    args = grad_weight_args(
        FORMS["primes"].replace(dtype=torch.float64 if device == "cpu" else torch.float32),
        device,
        left="slot",
        right="token",
    )
    strided = [in_strides(a) for a in args]
    same(moe_expert_grad_weight(*strided), moe_expert_grad_weight(*args))
    expanded = args[0][:, :1].expand_as(args[0])  # the stride 0 of a gradient of sum()
    copied = moe_expert_grad_weight(expanded.contiguous(), *args[1:])
    same(moe_expert_grad_weight(expanded, *args[1:]), copied)


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_bitwise_repeatable(dtype):
    args = grad_weight_args(WIDE_FORMS["plain"].replace(dtype=dtype), left="row", right="token")
    first = moe_expert_grad_weight(*args)
    assert all(torch.equal(first, moe_expert_grad_weight(*args)) for _ in range(3))


FORM = BlockForm(dtype=torch.float32)
BAD = {
    "left_rank": ({"left": lambda a: a["left"][None]}, MoEShapeError, "(1, 14, 6)"),
    "right_rank": ({"right": lambda a: a["right"][0]}, MoEShapeError, "(8,)"),
    "left_index_rank": ({"left_index": lambda a: a["left_index"][None]}, MoEShapeError, "(1, 14)"),
    "right_index_rank": ({"right_index": lambda a: a["right_index"][None]}, MoEShapeError, "(1, 14)"),
    "offsets_rank": ({"offsets": lambda a: a["offsets"][None]}, MoEShapeError, "(1, 6)"),
    "left_dtype": ({"left": lambda a: a["left"].int()}, MoEDtypeError, "torch.int32"),
    "right_dtype": ({"right": lambda a: a["right"].half()}, MoEDtypeError, "torch.float16"),
    "left_index_dtype": ({"left_index": lambda a: a["left_index"].float()}, MoEDtypeError, "torch.float32"),
    "right_index_dtype": ({"right_index": lambda a: a["right_index"].bool()}, MoEDtypeError, "torch.bool"),
    "offsets_dtype": ({"offsets": lambda a: a["offsets"].float()}, MoEDtypeError, "torch.float32"),
    "index_lengths_differ": ({"left_index": lambda a: a["left_index"][1:]}, MoEShapeError, "14"),
    "index_and_rows_differ": (
        {"left_index": lambda a: None, "left": lambda a: a["left"][1:]},
        MoEShapeError,
        "14",
    ),
    **{
        f"{name}_device": ({name: lambda a, name=name: a[name].to("meta")}, MoEDeviceError, "meta")
        for name in ("right", "left_index", "right_index", "offsets")
    },
    "left_device": ({"left": lambda a: a["left"].to("meta")}, MoEDeviceError, "cpu"),
}


@pytest.mark.parametrize(("changes", "kind", "got"), BAD.values(), ids=BAD)
def test_refused(changes, kind, got):
    arguments = named(moe_expert_grad_weight, grad_weight_args(FORM, left="slot", right="token"))
    broken = arguments | {name: change(arguments) for name, change in changes.items()}
    assert_refused(moe_expert_grad_weight, broken, kind, got=got)


def test_the_refused_arguments_are_right_before_they_are_broken():
    arguments = named(moe_expert_grad_weight, grad_weight_args(FORM, left="slot", right="token"))
    assert moe_expert_grad_weight(**arguments).shape == (5, 6, 8)
    assert moe_expert_grad_weight(**{name: value.to("meta") for name, value in arguments.items()}).is_meta
