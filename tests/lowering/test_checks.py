"""The checks that ops and records share: each takes what fits, symbols included, and refuses the rest."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lowering import _checks as checks
from lowering.errors import MoEDeviceError, MoEDtypeError, MoEShapeError
from tests.support.catalogue import raises_catalogue

FLOAT, INT = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int32)
FIVE, META = torch.zeros(5, 2), torch.zeros(3, 2, device="meta")


def test_what_fits():
    for dtype in checks.FLOATS:
        checks.check_float("op", "a", FLOAT.to(dtype))
    for dtype in checks.INTS:
        checks.check_int("op", "a", INT.to(dtype))
    checks.check_rank("op", "a", FLOAT, 2)
    checks.check_shape("op", "a", FLOAT, (3, None))
    checks.check_same("op", ("a", FLOAT), ("b", FLOAT))
    checks.check_same("op", ("a", FLOAT), ("b", None))
    checks.check_size("op", "H", 3, 3)


REFUSED = [
    (checks.check_rank, ("a", FLOAT, 3), MoEShapeError, "a of rank 3", "(3, 2)"),
    (checks.check_shape, ("a", FLOAT, (2, None)), MoEShapeError, "a of shape [2, any]", "(3, 2)"),
    (checks.check_shape, ("a", FLOAT, (3,)), MoEShapeError, "a of shape [3]", "(3, 2)"),
    (checks.check_shape, ("a", FLOAT, (3, 2, None)), MoEShapeError, "a of shape [3, 2, any]", "(3, 2)"),
    (checks.check_float, ("a", INT), MoEDtypeError, "a in fp32", "torch.int32"),
    (checks.check_float, ("a", FLOAT.to(torch.float8_e4m3fn)), MoEDtypeError, "a in fp32", "torch.float8_e4m3fn"),
    (checks.check_int, ("a", FLOAT), MoEDtypeError, "a in int32", "torch.float32"),
    (checks.check_int, ("a", INT.to(torch.int16)), MoEDtypeError, "a in int32", "torch.int16"),
    (checks.check_same, (("a", FLOAT), ("b", FLOAT.double())), MoEDtypeError, "b in the dtype of a", "torch.float64"),
    (checks.check_same, (("a", FLOAT), ("b", META)), MoEDeviceError, "b on cpu like a", "meta"),
    (checks.check_device, (("a", FLOAT), ("b", META)), MoEDeviceError, "b on cpu like a", "meta"),
    (checks.check_size, ("H", 3, 4), MoEShapeError, "H = 4", "3"),
]


@pytest.mark.parametrize(("check", "arguments", "kind", "expected", "got"), REFUSED)
def test_what_is_refused(check, arguments, kind, expected, got):
    with raises_catalogue(kind, where="op", expected=expected, got=got):
        check("op", *arguments)


def test_sizes_that_are_symbols_pass_without_a_guard():
    env, dynamic = ShapeEnv(), StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    with FakeTensorMode(shape_env=env) as mode:
        tensor = mode.from_tensor(FIVE, symbolic_context=dynamic)
        assert isinstance(tensor.shape[0], torch.SymInt)
        checks.check_size("op", "T", tensor.shape[0], 7)
        checks.check_shape("op", "a", tensor, (None, None))
    assert not env.guards
