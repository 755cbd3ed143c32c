"""`diffulex::moe_combine` against its oracle: dtypes, accumulation in fp32, gradients; what it refuses."""

import math

import pytest
import torch

from lowering.errors import MoEDeviceError, MoEDtypeError, MoEShapeError
from lowering.inductor.passes import register_lowerings
from lowering.ops import moe_combine
from lowering.reference.moe_combine import moe_combine_reference
from lowering.report import collect
from tests.support.catalogue import assert_refused, named
from tests.support.inputs import (
    DEVICES,
    FORMS,
    LOW_DTYPES,
    WIDE,
    BlockForm,
    cast,
    combine_args,
    combine_args_with_ids,
    with_grad,
)
from tests.support.oracle import assert_near_exact, assert_oracle_ratio, gradients, random_like


def reference(slots, weights, ids=None, num_experts=0):
    """The oracle, with the op's arguments."""
    return moe_combine_reference(slots, weights, ids_TK=ids, num_experts=num_experts)


def eager(slots, weights):
    """Weighted in the dtype of the slots, then summed, as stock models do."""
    shape = (*weights.shape, slots.shape[1])
    return (slots.view(shape) * weights.to(slots.dtype)[..., None]).sum(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_reference(form, device):
    args = combine_args(form, device)
    assert_near_exact(moe_combine(*args), reference(*args))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_error_ratio(top_k, dtype, device):
    args = combine_args(WIDE.replace(dtype=dtype, top_k=top_k), device)
    assert_oracle_ratio(moe_combine(*args), eager(*args), reference(*cast(args, torch.float64)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_pair_of_dtypes(slots, weights, device):
    """The output has the dtype of the slots; nothing is rounded before the sum is done."""
    args = combine_args(FORMS["primes"].replace(dtype=torch.float16), device)
    args = args[0].to(slots), args[1].to(weights)
    out = moe_combine(*args)
    exact = reference(*cast(args, torch.float64))
    assert out.dtype == slots
    # the sum in fp32 leaves room for one flip of the last bit
    assert (out.double() - exact).abs().max() <= 0.51 * torch.finfo(slots).eps * exact.abs().max() * 2


def test_the_sum_is_not_rounded_on_the_way():
    """1 + 256 * 2^-8: a sum kept in bf16 would stay at 1."""
    slots = torch.ones(257, 1, dtype=torch.bfloat16)
    weights = torch.full((1, 257), 2.0**-8)
    weights[0, 0] = 1.0
    assert moe_combine(slots, weights).item() == 2.0


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_the_sum_is_taken_in_slot_order(dtype):
    """2^24 + 1 - 2^24 in fp32: 0 in slot order, 1 in the order of the second case."""
    slots = torch.ones(6, 1, dtype=dtype)
    weights = torch.tensor([[2.0**24, 1.0, -(2.0**24)], [2.0**24, -(2.0**24), 1.0]])
    assert moe_combine(slots, weights).flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_slots_of_no_expert_count_as_zeros(form, device):
    args = with_grad(combine_args_with_ids(form, device))
    assert_near_exact(moe_combine(*args), reference(*args))
    grad = random_like(reference(*args))
    ours, wanted = gradients(moe_combine, args, grad), gradients(reference, args, grad)
    for position, value in wanted.items():
        assert_near_exact(ours[position], value)


def test_ids_have_the_shape_of_weights():
    slots, weights, ids, experts = combine_args_with_ids(FORMS["plain"])
    given = {"slots": slots, "weights": weights, "ids": ids, "num_experts": experts}
    for kind, changed in ((MoEShapeError, ids[:-1]), (MoEShapeError, ids[:, 1:]), (MoEDtypeError, ids.double())):
        with pytest.raises(kind):
            moe_combine(**given | {"ids": changed})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_equal_those_of_the_reference(form, device):
    args = with_grad(combine_args(form, device))
    grad = random_like(moe_combine(*args))
    ours, wanted = gradients(moe_combine, args, grad), gradients(reference, args, grad)
    assert set(ours) == set(wanted) == {0, 1}
    for position, oracle in wanted.items():
        assert_near_exact(ours[position], oracle, what=f"gradient {position}")


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_gradient_error_ratio(dtype):
    args = with_grad(combine_args(WIDE.replace(dtype=dtype)))
    double = with_grad(cast(args, torch.float64))
    grad = random_like(moe_combine(*args))
    found = [gradients(moe_combine, args, grad), gradients(eager, args, grad), gradients(reference, double, grad)]
    assert [g.dtype for g in found[0].values()] == [dtype, torch.float32]
    for position in found[0]:
        assert_oracle_ratio(*(grads[position] for grads in found), what=f"gradient {position}")


def test_gradcheck():
    assert torch.autograd.gradcheck(moe_combine, with_grad(combine_args(FORMS["primes"].replace(tokens=3, hidden=2))))


@pytest.mark.parametrize("asked", [0, 1])
def test_only_the_asked_gradient_is_made(asked):
    args = combine_args(FORMS["plain"])
    args[asked].requires_grad_()
    moe_combine(*args).sum().backward()  # an expanded gradient of stride 0
    assert [a.grad is not None for a in args] == [i == asked for i in range(2)]
    assert args[asked].grad.shape == args[asked].shape


def test_nan_in_one_slot_stays_in_its_token():
    slots, weights = combine_args(FORMS["primes"])
    clean = moe_combine(slots, weights)
    slots[3 * weights.shape[1] + 1, 4] = math.nan
    dirty = moe_combine(slots, weights)
    assert dirty[3, 4].isnan()
    dirty[3, 4] = clean[3, 4]
    assert torch.equal(dirty, clean)


def test_zero_slots_with_zero_weights_leave_no_trace():
    slots, weights = combine_args(FORMS["plain"])
    padded_slots = torch.cat((slots.view(7, 2, 8), torch.zeros(7, 1, 8)), 1).view(21, 8)
    padded_weights = torch.cat((weights, torch.zeros(7, 1)), 1)
    assert torch.equal(moe_combine(padded_slots, padded_weights), moe_combine(slots, weights))


def test_strides_do_not_matter():
    slots, weights = combine_args(FORMS["primes"])
    wanted = moe_combine(slots, weights)
    strided = moe_combine(slots.mT.contiguous().mT, weights.mT.contiguous().mT)
    assert torch.equal(strided, wanted)
    assert strided.is_contiguous()


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_bitwise_repeatable(dtype):
    args = combine_args(WIDE.replace(dtype=dtype))
    first = moe_combine(*args)
    assert all(torch.equal(first, moe_combine(*args)) for _ in range(3))


BEHIND = {
    "alone": lambda out, other: out,
    "added": lambda out, other: out + other,
    "added first": lambda out, other: other + out,
    "scaled": lambda out, other: out * 1.5 + other,
    "normed": lambda out, other: (out + other) * (out + other).square().mean(-1, keepdim=True).rsqrt(),
    "halves": lambda out, other: torch.cat((other, out), 1),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_compiled_bits_are_those_of_eager_mode_whatever_is_fused(top_k, with_ids):
    """In fp32, where a product that is rounded now and not then would show in most elements."""
    form = WIDE.replace(dtype=torch.float32, top_k=top_k)
    args = combine_args_with_ids(form, "cuda") if with_ids else combine_args(form, "cuda")
    other = torch.randn_like(moe_combine(*args))
    register_lowerings()
    with torch.no_grad():
        for name, behind in BEHIND.items():

            def both(*args, behind=behind):
                return moe_combine(*args), behind(moe_combine(*args), other)

            torch._dynamo.reset()  # so that none of them is one recompilation too many, and runs as it stands
            with collect() as decisions:
                alone, fused = torch.compile(both, fullgraph=True, dynamic=False)(*args)
            told = {decision.outcome for decision in decisions if decision.subject == "moe_combine"}
            assert told == {"Inductor IR, fused with its neighbours"}, name
            assert torch.equal(alone, moe_combine(*args)), name
            if name in ("added", "added first", "halves"):  # the only operations, and exact ones, behind the sum
                assert torch.equal(fused, behind(moe_combine(*args), other)), name


FORM = BlockForm(dtype=torch.float32)
BAD = {
    "slots_rank": ({"slots": lambda a: a["slots"].view(7, 2, 8)}, MoEShapeError, "(7, 2, 8)"),
    "weights_rank": ({"weights": lambda a: a["weights"].view(-1)}, MoEShapeError, "(14,)"),
    "missing_slots": ({"slots": lambda a: a["slots"][1:]}, MoEShapeError, "13"),
    "other_tokens": ({"weights": lambda a: a["weights"][1:]}, MoEShapeError, "14"),
    "no_slots_a_token": ({"weights": lambda a: a["weights"][:, :0]}, MoEShapeError, "(7, 0)"),
    "slots_dtype": ({"slots": lambda a: a["slots"].int()}, MoEDtypeError, "torch.int32"),
    "weights_dtype": ({"weights": lambda a: a["weights"].bool()}, MoEDtypeError, "torch.bool"),
    "weights_device": ({"weights": lambda a: a["weights"].to("meta")}, MoEDeviceError, "meta"),
    "slots_device": ({"slots": lambda a: a["slots"].to("meta")}, MoEDeviceError, "cpu"),
}


@pytest.mark.parametrize(("changes", "kind", "got"), BAD.values(), ids=BAD)
def test_refused(changes, kind, got):
    arguments = named(moe_combine, combine_args(FORM))
    broken = arguments | {name: change(arguments) for name, change in changes.items()}
    assert_refused(moe_combine, broken, kind, got=got)


def test_the_refused_arguments_are_right_before_they_are_broken():
    arguments = named(moe_combine, combine_args(FORM))
    assert moe_combine(**arguments).shape == (7, 8)
    assert moe_combine(**{name: value.to("meta") for name, value in arguments.items()}).is_meta
