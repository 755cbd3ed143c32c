"""`diffulex::moe_expert_up_shared` against its oracle: values, dtypes, gradients; what it refuses."""

import pytest
import torch

from lowering.activation import evaluate
from lowering.errors import MoEDeviceError, MoEDtypeError, MoEOptionError, MoEShapeError
from lowering.ops import moe_expert_up, moe_expert_up_shared
from lowering.reference.moe_expert_up_shared import moe_expert_up_shared_reference
from tests.support.catalogue import assert_refused, named
from tests.support.inputs import DEVICES, FORMS, LOW_DTYPES, WIDE_FORMS, cast, up_shared_args, with_grad
from tests.support.oracle import assert_near_exact, assert_oracle_ratio, gradients, joined

SHARED = ("plain", "ungated", "biased", "interleaved", "transposed", "sentinels", "no_tokens", "one_token", "top1")


def reference(hidden, w13, b13, order, offsets, rows, w1, w3, top_k, act, interleaved):
    options = {"top_k": top_k, "act": act, "b13_EJ": b13, "interleaved": interleaved}
    return moe_expert_up_shared_reference(hidden, w13, order, offsets, rows, w1, w3, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SHARED)
def test_equals_reference(name, device):
    args = up_shared_args(FORMS[name], device)
    for ours, wanted in zip(moe_expert_up_shared(*args), reference(*args), strict=True):
        assert_near_exact(ours, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "ungated"])
def test_error_ratio(name, dtype, device):
    args = up_shared_args(WIDE_FORMS[name].replace(dtype=dtype), device)
    rows, w1, w3, _, act, _ = args[5:]
    eager = evaluate(act, rows @ w1.T, rows @ (w1 if w3 is None else w3).T)
    routed, shared = moe_expert_up_shared(*args)
    assert torch.equal(routed, moe_expert_up(*args[:5], *args[8:]))
    assert_oracle_ratio(shared, eager, reference(*cast(args, torch.float64))[1])


@pytest.mark.parametrize("name", ["plain", "ungated", "biased"])
def test_gradients_equal_those_of_the_reference(name):
    args = with_grad(up_shared_args(FORMS[name]))
    grad = torch.randn(joined(moe_expert_up_shared)(*args).shape, dtype=torch.float64)
    ours, wanted = (gradients(joined(function), args, grad) for function in (moe_expert_up_shared, reference))
    assert set(ours) == set(wanted) >= {0, 1, 5, 6}
    for position, oracle in wanted.items():
        assert_near_exact(ours[position], oracle, what=f"gradient {position}")


BAD = {
    "rows_rank": ("shared_hidden", lambda x: x[None], MoEShapeError, "(1, 7, 9)"),
    "rows": ("shared_hidden", lambda x: x[1:], MoEShapeError, "6"),
    "depth": ("shared_w1", lambda x: x[:, 1:], MoEShapeError, "9"),
    "width_of_w3": ("shared_w3", lambda x: x[1:], MoEShapeError, "8"),
    "w3_rank": ("shared_w3", lambda x: x[0], MoEShapeError, "(9,)"),
    "w1_dtype": ("shared_w1", lambda x: x.float(), MoEDtypeError, "torch.float32"),
    "w3_device": ("shared_w3", lambda x: x.to("meta"), MoEDeviceError, "meta"),
    "no_w3": ("shared_w3", lambda x: None, MoEOptionError, "no shared_w3"),
    "ungated": ("act", lambda x: "relu2", MoEOptionError, "act='relu2' and shared_w3"),
}


@pytest.mark.parametrize(("name", "change", "kind", "got"), BAD.values(), ids=BAD)
def test_refused(name, change, kind, got):
    arguments = named(moe_expert_up_shared, up_shared_args(FORMS["plain"]))
    broken = arguments | {name: change(arguments[name])}
    assert_refused(moe_expert_up_shared, broken, kind, got=got)
