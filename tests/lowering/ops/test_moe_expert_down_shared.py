"""`diffulex::moe_expert_down_shared` against its oracle: values, dtypes, gradients; what it refuses."""

import pytest
import torch

from lowering.errors import MoEDeviceError, MoEDtypeError, MoEShapeError
from lowering.ops import moe_expert_down, moe_expert_down_shared
from lowering.reference.moe_expert_down_shared import moe_expert_down_shared_reference
from tests.support.catalogue import assert_refused, named
from tests.support.inputs import DEVICES, FORMS, LOW_DTYPES, WIDE, cast, down_shared_args, with_grad
from tests.support.oracle import assert_near_exact, assert_oracle_ratio, gradients, joined

SHARED = ("plain", "biased", "transposed", "sentinels", "no_tokens", "one_token", "top1")


def reference(act, w2, b2, order, offsets, shared, shared_w2, top_k):
    return moe_expert_down_shared_reference(act, w2, order, offsets, shared, shared_w2, b2_EH=b2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SHARED)
def test_equals_reference(name, device):
    args = down_shared_args(FORMS[name], device)
    for ours, wanted in zip(moe_expert_down_shared(*args), reference(*args), strict=True):
        assert_near_exact(ours, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_error_ratio(dtype, device):
    args = down_shared_args(WIDE.replace(dtype=dtype), device)
    slots, out = moe_expert_down_shared(*args)
    assert torch.equal(slots, moe_expert_down(*args[:5]))
    assert_oracle_ratio(out, torch.nn.functional.linear(args[5], args[6]), reference(*cast(args, torch.float64))[1])


@pytest.mark.parametrize("name", ["plain", "biased"])
def test_gradients_equal_those_of_the_reference(name):
    args = with_grad(down_shared_args(FORMS[name]))
    grad = torch.randn(joined(moe_expert_down_shared)(*args).shape, dtype=torch.float64)
    ours, wanted = (gradients(joined(function), args, grad) for function in (moe_expert_down_shared, reference))
    assert set(ours) == set(wanted) >= {0, 1, 5, 6}
    for position, oracle in wanted.items():
        assert_near_exact(ours[position], oracle, what=f"gradient {position}")


BAD = {
    "rank": ("shared", lambda x: x[None], MoEShapeError, "(1, 7, 9)"),
    "rows": ("shared", lambda x: x[1:], MoEShapeError, "14"),
    "width": ("shared_w2", lambda x: x[:, 1:], MoEShapeError, "9"),
    "dtype": ("shared_w2", lambda x: x.float(), MoEDtypeError, "torch.float32"),
    "device": ("shared", lambda x: x.to("meta"), MoEDeviceError, "meta"),
}


@pytest.mark.parametrize(("name", "change", "kind", "got"), BAD.values(), ids=BAD)
def test_refused(name, change, kind, got):
    arguments = named(moe_expert_down_shared, down_shared_args(FORMS["plain"]))
    broken = arguments | {name: change(arguments[name])}
    assert_refused(moe_expert_down_shared, broken, kind, got=got)
