"""The catalogue of errors: stable ids, built-in base types, messages of three parts; typed reasons."""

import builtins
import pickle

import pytest

from lowering import errors
from lowering.errors import MoEErrorMixin, Reason, ReasonCode
from tests.support.catalogue import MESSAGE, raises_catalogue

BASES = {
    "MoEShapeError": (ValueError, "MOE001"),
    "MoEDtypeError": (TypeError, "MOE002"),
    "MoEDeviceError": (ValueError, "MOE003"),
    "MoERangeError": (ValueError, "MOE004"),
    "MoEOptionError": (ValueError, "MOE005"),
    "MoEUnsupportedError": (ValueError, "MOE006"),
    "MoEConfigError": (ValueError, "MOE007"),
    "MoECheckpointError": (ValueError, "MOE008"),
    "MoEParallelError": (ValueError, "MOE009"),
    "MoEStageError": (RuntimeError, "MOE010"),
    "MoERankError": (RuntimeError, "MOE011"),
}
CATALOGUE = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, MoEErrorMixin) and kind is not MoEErrorMixin
}
PARTS = {"expected": "hidden [T, H] of rank 2", "got": "shape (2, 3, 4)", "hint": "Flatten it first."}


def test_ids_are_stable_and_unique():
    known = {name: kind.code for name, kind in CATALOGUE.items()}
    assert known.items() >= {name: code for name, (_, code) in BASES.items()}.items()
    assert len(set(known.values())) == len(known)


@pytest.mark.parametrize("kind", CATALOGUE.values(), ids=CATALOGUE)
def test_errors_are_built_in_errors_too(kind):
    assert issubclass(kind, ValueError | TypeError | RuntimeError)
    assert kind.__name__ not in vars(builtins)


@pytest.mark.parametrize(("name", "base"), [(name, base) for name, (base, _) in BASES.items()])
def test_base_types(name, base):
    assert issubclass(CATALOGUE[name], base)


@pytest.mark.parametrize("kind", CATALOGUE.values(), ids=CATALOGUE)
def test_message_has_all_parts(kind):
    error = kind.of("diffulex::moe_x", **PARTS)
    assert type(error) is kind
    found = MESSAGE.fullmatch(str(error))
    assert found
    assert found.groupdict() == {"code": kind.code, "where": "diffulex::moe_x", **PARTS}
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("part", PARTS)
def test_no_part_may_be_left_out(part):
    with pytest.raises(TypeError, match=part):
        errors.MoEShapeError.of("x", **{name: text for name, text in PARTS.items() if name != part})


def test_every_error_says_what_it_is_for():
    assert all(kind.__doc__ for kind in CATALOGUE.values())


@pytest.mark.parametrize(
    ("raised", "asked"),
    [
        (ValueError("wrong shape"), errors.MoEShapeError),
        (errors.MoEShapeError("[MOE001] x: wrong shape"), errors.MoEShapeError),
        (errors.MoERangeError.of("x", **PARTS), errors.MoEShapeError),
        (errors.MoEShapeError.of("x", **PARTS | {"hint": "Flatten"}), errors.MoEShapeError),
    ],
    ids=["built_in", "free_text", "another_error", "hint_is_no_sentence"],
)
def test_the_check_of_messages_sees_bad_ones(raised, asked):
    with pytest.raises((AssertionError, ValueError)):
        with raises_catalogue(asked):
            raise raised


def test_reason_text():
    assert str(Reason(ReasonCode.DTYPE)) == "DTYPE: the dtype has no generated kernel"
    assert str(Reason(ReasonCode.DTYPE, "int8")) == "DTYPE: int8"
    assert bool(Reason(ReasonCode.DTYPE)), "a predicate's reason must be truthy, None means yes"


def test_reasons_are_frozen_values():
    assert Reason(ReasonCode.SHAPE, "a") == Reason(ReasonCode.SHAPE, "a") != Reason(ReasonCode.SHAPE, "b")
    assert len({Reason(ReasonCode.SHAPE, "a"), Reason(ReasonCode.SHAPE, "a")}) == 1
    with pytest.raises(AttributeError):
        Reason(ReasonCode.SHAPE).detail = "b"


def test_every_reason_is_named():
    assert not {"UNKNOWN", "OTHER", "MISC"} & set(ReasonCode.__members__)
    texts = [code.value for code in ReasonCode]
    assert all(len(text) > 10 for text in texts)
    assert len(set(texts)) == len(ReasonCode.__members__)
