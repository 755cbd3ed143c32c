"""`diffulex::moe_route_linear` against its oracle: values, dtypes, gradients; what it refuses; its schedule."""

import pytest
import torch

from lowering.errors import MoEDeviceError, MoEDtypeError, MoERangeError, MoEShapeError
from lowering.ops import moe_route, moe_route_linear
from lowering.ops.moe_route_linear import route_linear_schedule
from lowering.reference.moe_route_linear import moe_route_linear_reference
from lowering.spec import RoutingSpec
from tests.support.catalogue import assert_refused, named
from tests.support.inputs import DEVICES, LOW_DTYPES, cast, route_linear_args, with_grad
from tests.support.oracle import assert_near_exact, assert_oracle_ratio, gradients

CASES = {
    "softmax": {},
    "linear_bias": {"linear_bias": True},
    "groups": {"bias": True, "score": "sigmoid", "n_group": 4, "topk_group": 2, "eps": 1e-20, "scale": 2.5},
    "no_tokens": {"tokens": 0},
    "one_token": {"tokens": 1, "linear_bias": True, "bias": True},
}


def reference(hidden, weight, linear_bias, bias, product, logits, *options):
    given = {"linear_bias_E": linear_bias, "bias_E": bias, "product_dtype": product}
    return moe_route_linear_reference(hidden, weight, spec=RoutingSpec(*options), **given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, device):
    args = route_linear_args(device, dtype=torch.float64, **CASES[name])
    on_cpu = [arg.cpu() if isinstance(arg, torch.Tensor) else arg for arg in args]
    weights, ids, logits = (value.cpu() for value in moe_route_linear(*args))
    wanted = reference(*on_cpu)
    assert torch.equal(ids, wanted[1])
    assert_near_exact(weights, wanted[0])
    assert_near_exact(logits, wanted[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_is_the_product_and_its_routing(dtype, device):
    hidden, weight, _, bias, *rest = args = route_linear_args(device, dtype=dtype, bias=True, tokens=33)
    weights, ids, logits = moe_route_linear(*args)
    assert logits.dtype == dtype and torch.equal(logits, hidden @ weight.T)
    for ours, theirs in zip((weights, ids), moe_route(logits.float(), bias, None, *rest[2:]), strict=True):
        assert torch.equal(ours, theirs)
    exact = hidden.double() @ weight.double().T
    assert_oracle_ratio(logits, hidden @ weight.T, exact)


@pytest.mark.parametrize("device", DEVICES)
def test_a_wide_product_is_not_rounded(device):
    args = route_linear_args(device, dtype=torch.bfloat16, product=torch.float32, linear_bias=True)
    logits = moe_route_linear(*args)[2]
    hidden, weight, linear_bias = (value.double() for value in args[:3])
    assert logits.dtype == torch.float32
    assert_oracle_ratio(
        logits, (hidden.float() @ weight.float().T + linear_bias.float()), hidden @ weight.T + linear_bias
    )


@pytest.mark.parametrize("name", ["linear_bias", "groups"])
def test_gradients_equal_those_of_the_reference(name):
    """Of weights and logits; the ids have none."""
    args = with_grad(cast(route_linear_args(dtype=torch.float64, **CASES[name]), torch.float64))

    def parts(*given):
        hidden, weight, linear_bias, bias, _, _, *options = given
        logits = hidden @ weight.T + (0 if linear_bias is None else linear_bias)
        return moe_route(logits, bias, None, *options)[0], logits

    def joined(function):
        return lambda *given: torch.cat([function(*given)[0].flatten(), function(*given)[-1].flatten()])

    grad = torch.randn(joined(moe_route_linear)(*args).shape, dtype=torch.float64)
    ours, wanted = (gradients(joined(function), args, grad) for function in (moe_route_linear, parts))
    assert set(ours) == set(wanted) >= {0, 1}
    for position, exact in wanted.items():
        assert_near_exact(ours[position], exact, what=f"gradient {position}")


BAD = {
    "rank": ("hidden", lambda x: x[None], MoEShapeError, "(1, 5, 12)"),
    "weight_rank": ("weight", lambda x: x[0], MoEShapeError, "(12,)"),
    "depth": ("weight", lambda x: x[:, 1:], MoEShapeError, "11"),
    "ints": ("hidden", lambda x: x.long(), MoEDtypeError, "torch.int64"),
    "weight_dtype": ("weight", lambda x: x.half(), MoEDtypeError, "torch.float16"),
    "weight_device": ("weight", lambda x: x.to("meta"), MoEDeviceError, "meta"),
    "narrow_product": ("product_dtype", lambda x: torch.bfloat16, MoEDtypeError, "torch.bfloat16"),
    "linear_bias_rank": ("linear_bias", lambda x: x[None], MoEShapeError, "(1, 8)"),
    "linear_bias_length": ("linear_bias", lambda x: x[1:], MoEShapeError, "7"),
    "linear_bias_device": ("linear_bias", lambda x: x.to("meta"), MoEDeviceError, "meta"),
}


@pytest.mark.parametrize(("name", "change", "kind", "got"), BAD.values(), ids=BAD)
def test_refused(name, change, kind, got):
    arguments = named(moe_route_linear, route_linear_args(linear_bias=True))
    assert_refused(moe_route_linear, arguments | {name: change(arguments[name])}, kind, got=got)


def test_what_moe_route_refuses():
    arguments = named(moe_route_linear, route_linear_args()) | {"top_k": 9}
    assert_refused(moe_route_linear, arguments, MoERangeError, got="9", where="diffulex::moe_route")


# The schedule

SIZES = [(1, 64), (2, 16), (8, 32), (8, 4096), (32, 2880), (64, 2048), (64, 100), (128, 2048), (256, 7168), (256, 96)]


@pytest.mark.parametrize(("columns", "hidden"), SIZES)
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 9, 16, 17, 64, 65, 181, 362, 512])
def test_a_schedule_covers_everything_once(columns, hidden, tokens):
    schedule = route_linear_schedule(tokens, columns, hidden=hidden)
    part, total = schedule.part, schedule.total
    blocks = [part[name] for name in ("BLOCK_T", "BLOCK_C", "BLOCK_K")] + [total["BLOCK_T"]]
    assert all(block & (block - 1) == 0 for block in blocks)
    stretch = -(-hidden // (part["SPLIT"] * part["BLOCK_K"])) * part["BLOCK_K"]
    assert (part["SPLIT"] - 1) * stretch < hidden <= part["SPLIT"] * stretch, "a stretch is empty, or H does not fit"
    assert part["SPLIT"] == total["SPLIT"] and 1 <= total["UNROLL"] <= part["SPLIT"]
    assert part["SPLIT"] * columns <= 2048
    if part["DOT"]:
        assert part["BLOCK_T"] >= 16 and part["BLOCK_C"] >= 8 and part["BLOCK_K"] >= 16


def test_for_how_many_rows_there_are_no_matrix_units():
    def most(columns):
        parts = {tokens: route_linear_schedule(tokens, columns, hidden=2048).part for tokens in range(1, 65)}
        return max(tokens for tokens, part in parts.items() if not part["DOT"])

    assert [most(columns) for columns in (8, 16, 32, 64, 128, 256)] == [8, 8, 4, 2, 1, 1]
