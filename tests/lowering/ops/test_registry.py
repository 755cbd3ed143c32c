"""Every op of the registry through `opcheck`, all four utilities, on every sample; a new op is picked up by itself."""

import inspect
from pathlib import Path

import pytest
import torch
from torch.testing._internal.optests import OpCheckError

import lowering.ops
from lowering.ops import ALL_OPS
from lowering.ops._library import SCHEMAS
from tests.support.inputs import SAMPLES, with_grad

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FEWEST_SAMPLES = 4


def name_of(op):
    return op._schema.name.removeprefix("diffulex::")


def has_kernel(op, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(op._schema.name, key)


def is_composite(op):
    """Whether the op is made of others, which have the kernels and the gradients."""
    return has_kernel(op, "CompositeImplicitAutograd")


def has_autograd(op):
    return has_kernel(op, "Autograd") or is_composite(op)


CASES = [
    pytest.param(op, sample, grad, id=f"{name_of(op)}-{sample}{'-grad' if grad else ''}")
    for op in ALL_OPS
    for sample in SAMPLES.get(name_of(op), ())
    for grad in ((False, True) if has_autograd(op) else (False,))
]


def check(op, sample, grad, device):
    args = SAMPLES[name_of(op)][sample](device)
    outcome = torch.library.opcheck(op, with_grad(args) if grad else args, test_utils=UTILITIES)
    assert outcome == dict.fromkeys(UTILITIES, "SUCCESS")


@pytest.mark.parametrize(("op", "sample", "grad"), CASES)
def test_opcheck(op, sample, grad):
    check(op, sample, grad, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "sample", "grad"), CASES)
def test_opcheck_cuda(op, sample, grad):
    check(op, sample, grad, torch.device("cuda"))


@pytest.mark.parametrize("op", ALL_OPS, ids=name_of)
def test_every_op_has_samples(op):
    assert len(SAMPLES.get(name_of(op), ())) >= FEWEST_SAMPLES, f"add samples of {op} to tests/support/inputs.py"


def test_the_registry_is_whole():
    files = {path.stem for path in Path(inspect.getfile(lowering.ops)).parent.glob("moe_*.py")}
    assert files == set(SCHEMAS) == {name_of(op) for op in ALL_OPS} == set(SAMPLES)


@pytest.mark.parametrize("op", ALL_OPS, ids=name_of)
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_every_op_has_its_kernels(op, key):
    assert has_kernel(op, key) or is_composite(op)


@pytest.mark.parametrize("op", ALL_OPS, ids=name_of)
def test_every_op_is_functional_and_compliant(op):
    assert not op._schema.is_mutable
    assert all(result.alias_info is None for result in op._schema.returns)
    assert {torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout} <= set(op.tags)


def broken_op(library, name, *, fake):
    library.define(f"{name}(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, lambda x: x.t().clone(), "CPU")
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, library.ns), name).default


@pytest.mark.parametrize(
    "fake",
    [torch.empty_like, lambda x: x.new_empty(x.shape[1], x.shape[0], dtype=torch.float64)],
    ids=["wrong_size", "wrong_dtype"],
)
def test_opcheck_sees_a_wrong_fake(fake):
    with torch.library._scoped_library("diffulex_test", "FRAGMENT") as library:
        op = broken_op(library, "wrong", fake=fake)
        with pytest.raises(OpCheckError):
            torch.library.opcheck(op, (torch.randn(2, 3),), test_utils=UTILITIES)
