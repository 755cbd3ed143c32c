"""Frozen descriptions: which routing options have a meaning, and that they fit the schema of the route op."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowering.errors import MoEOptionError, MoERangeError
from lowering.ops._library import SCHEMAS
from lowering.spec import GROUP_FILLS, GROUP_SCORES, OP_OPTIONS, SCORES, ExpertSpec, RoutingSpec
from tests.support.catalogue import raises_catalogue

WHERE = "diffulex::moe_route"
VALID = {
    "mixtral": RoutingSpec(2),
    "all_experts": RoutingSpec(8),
    "deepseek_v3": RoutingSpec(2, "sigmoid", n_group=4, topk_group=2, eps=1e-20, scale=2.5),
    "deepseek_v2": RoutingSpec(2, n_group=2, topk_group=1, group_score="max", group_fill="0", renorm=False),
    "one_expert_a_group": RoutingSpec(1, n_group=8, topk_group=8),
    "sqrtsoftplus": RoutingSpec(1, "sqrtsoftplus"),
}


@pytest.mark.parametrize("spec", VALID.values(), ids=VALID)
def test_meaningful_options_pass(spec):
    assert spec.check(8) is None


@pytest.mark.parametrize(
    ("spec", "got"),
    [
        (RoutingSpec(9), "top_k=9"),
        (RoutingSpec(0), "top_k=0"),
        (RoutingSpec(-1), "top_k=-1"),
        (RoutingSpec(2, n_group=3), "n_group=3"),
        (RoutingSpec(2, n_group=0), "n_group=0"),
        (RoutingSpec(2, n_group=-2), "n_group=-2"),
        (RoutingSpec(2, n_group=16, topk_group=4), "n_group=16"),
        (RoutingSpec(2, n_group=4, topk_group=5), "topk_group=5"),
        (RoutingSpec(2, n_group=4, topk_group=0), "topk_group=0"),
    ],
    ids=str,
)
def test_numbers_outside_their_range(spec, got):
    with raises_catalogue(MoERangeError, where=WHERE, expected="8", got=got):
        spec.check(8)


@pytest.mark.parametrize("name", ["score", "group_score", "group_fill"])
@pytest.mark.parametrize("value", ["", "softmaxx", "SOFTMAX", "max ", None, 0])
def test_unknown_options(name, value):
    spec = dataclasses.replace(RoutingSpec(2), **{name: value})
    with raises_catalogue(MoEOptionError, where=WHERE, expected=f"{name} in", got=repr(value)):
        spec.check(8)


@pytest.mark.parametrize(
    ("name", "known"), [("score", SCORES), ("group_score", GROUP_SCORES), ("group_fill", GROUP_FILLS)]
)
def test_every_known_option_passes(name, known):
    for value in known:
        dataclasses.replace(RoutingSpec(2), **{name: value}).check(8)


@given(st.integers(-2, 10), st.integers(-2, 10), st.integers(-2, 10), st.integers(1, 9))
def test_what_passes_can_be_computed(top_k, n_group, topk_group, num_experts):
    """Accepted exactly when there are K experts, equal groups and that many groups."""
    spec = RoutingSpec(top_k, n_group=n_group, topk_group=topk_group)
    meaningful = (
        top_k in range(1, num_experts + 1)
        and n_group in range(1, num_experts + 1)
        and num_experts % n_group == 0
        and topk_group in range(1, n_group + 1)
    )
    if meaningful:
        spec.check(num_experts)
    else:
        with raises_catalogue(MoERangeError):
            spec.check(num_experts)


def schema_options():
    """(type, name, default text) of the scalar arguments of moe_route, as the schema writes them."""
    return re.findall(r"(int|str|bool|float) (\w+)(?:='?([^,')]+)'?)?", SCHEMAS["moe_route"])


def test_op_args_follow_the_schema():
    fields = {field.name: field for field in dataclasses.fields(RoutingSpec)}
    options = schema_options()
    assert list(OP_OPTIONS) == [name for _, name, _ in options]
    assert list(OP_OPTIONS) == list(fields)[: len(OP_OPTIONS)]
    assert [fields[name].type for name in OP_OPTIONS] == [kind for kind, _, _ in options]
    defaults = RoutingSpec(2).op_args()[1:]
    assert [str(value) for value in defaults] == [default for _, _, default in options][1:]


def test_op_args_keep_every_value():
    args = (3, "sigmoid", 4, 2, "max", "0", 2.0, 1e-20, 2.5, 30.0, "bfloat16", "logits", True, "clamp_min", 2)
    spec = RoutingSpec(*args)
    assert spec.op_args() == args and len(args) == len(OP_OPTIONS)
    assert RoutingSpec(*spec.op_args()) == spec
    assert RoutingSpec.of_op({**dict(zip(OP_OPTIONS, args, strict=True)), "logits": None}) == spec


@pytest.mark.parametrize(("top_k", "renorm"), [(1, 0.0), (2, 1.0)])
def test_one_expert_may_be_exempt_from_the_division(top_k, renorm):
    spec = RoutingSpec(top_k, renorm_if_k1=False)
    assert RoutingSpec(*spec.op_args()).renorm == renorm
    assert RoutingSpec(*RoutingSpec(top_k).op_args()).renorm == 1


@pytest.mark.parametrize("spec", [RoutingSpec(2), ExpertSpec(8, 4, 6, "swiglu")], ids=lambda s: type(s).__name__)
def test_specs_are_frozen_keys(spec):
    assert hash(spec) == hash(dataclasses.replace(spec))
    assert dataclasses.replace(spec) == spec
    name = dataclasses.fields(spec)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(spec, name, 1)
