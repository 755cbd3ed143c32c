"""Frozen descriptions: which routing options have a meaning, and that they fit the schema of the route op."""

import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowering.errors import MoEOptionError, MoERangeError
from lowering.ops._library import SCHEMAS
from lowering.spec import (
    DTYPES,
    EPS_MODES,
    GROUP_FILLS,
    GROUP_SCORES,
    NULLS,
    OP_OPTIONS,
    SCORE_DTYPES,
    SCORES,
    SELECTS,
    WEIGHT_PLACES,
    ExpertSpec,
    RoutingSpec,
)
from tests.support.catalogue import raises_catalogue

WHERE = "diffulex::moe_route"
NUMBERS = ("renorm", "eps", "softcap", "n_shared", "num_null", "input_norm_eps", "jitter")
NAMES = {
    "score": SCORES,
    "group_score": GROUP_SCORES,
    "group_fill": GROUP_FILLS,
    "score_dtype": SCORE_DTYPES,
    "select_on": SELECTS,
    "eps_mode": EPS_MODES,
    "null": NULLS,
    "logits_dtype": DTYPES,
    "weight_dtype": DTYPES,
    "apply_weight_on": WEIGHT_PLACES,
}
VALID = {
    "mixtral": RoutingSpec(2),
    "all_experts": RoutingSpec(8),
    "deepseek_v3": RoutingSpec(2, "sigmoid", n_group=4, topk_group=2, eps=1e-20, scale=2.5),
    "deepseek_v2": RoutingSpec(2, n_group=2, topk_group=1, group_score="max", group_fill="0", renorm=False),
    "one_expert_a_group": RoutingSpec(1, n_group=8, topk_group=8),
    "sqrtsoftplus": RoutingSpec(1, "sqrtsoftplus"),
    "inkling": RoutingSpec(2, "sigmoid", n_shared=2, global_scale=True),
    "longcat": RoutingSpec(10, renorm=0.0, num_null=2, select_bias=True),
    "groups_over_null_experts": RoutingSpec(2, n_group=5, topk_group=2, num_null=2),
    "gemma4": RoutingSpec(2, per_expert_scale=True, input_norm_eps=1e-6),
    "no_input_norm": RoutingSpec(2, input_norm_eps=None),
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
        (RoutingSpec(11, num_null=2), "top_k=11"),
        (RoutingSpec(2, n_group=4, num_null=3), "n_group=4"),
        *((RoutingSpec(2, **{name: value}), f"{name}={value}") for name in NUMBERS for value in (-1, math.inf)),
        (RoutingSpec(2, softcap=math.nan), "softcap=nan"),
    ],
    ids=str,
)
def test_numbers_outside_their_range(spec, got):
    expected = "top_k" if got.startswith("top_k") else got.split("=")[0]
    with raises_catalogue(MoERangeError, where=WHERE, expected=expected, got=got):
        spec.check(8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["", "softmaxx", "SOFTMAX", "max ", 1, 0])
def test_unknown_options(name, value):
    spec = dataclasses.replace(RoutingSpec(2), **{name: value})
    with raises_catalogue(MoEOptionError, where=WHERE, expected=f"{name} in", got=repr(value)):
        spec.check(8)


@pytest.mark.parametrize(("name", "known"), NAMES.items(), ids=NAMES)
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


def test_what_the_layer_does_is_no_argument_of_the_op():
    layer = {"num_null": 3, "select_bias": True, "jitter": 0.1, "apply_weight_on": "input", "logits_dtype": "float32"}
    spec = RoutingSpec(2, n_shared=2, **layer)
    assert spec.op_args() == RoutingSpec(2, n_shared=2).op_args()
    assert spec.num_logits(8) == 13 and spec.num_weights == 4


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (RoutingSpec(8), "top 8 of softmax, renorm"),
        (RoutingSpec(8, "sigmoid", eps=1e-20, scale=2.5), "top 8 of sigmoid, renorm + 1e-20, x 2.5"),
        (RoutingSpec(2, "sigmoid", select_on="logits", renorm=0.0), "top 2 of sigmoid by logits"),
        (RoutingSpec(1, renorm_if_k1=False), "top 1 of softmax, renorm_if_k1 False"),
        (RoutingSpec(4, renorm=2.0), "top 4 of softmax, renorm by 2-norm"),
        (RoutingSpec(6, eps=1e-12, eps_mode="clamp_min"), "top 6 of softmax, renorm >= 1e-12"),
        (RoutingSpec(3, n_group=4, topk_group=2), "top 3 of softmax, 2 of 4 groups by top2_sum, others -inf, renorm"),
        (RoutingSpec(6, n_shared=2, softcap=30.0), "top 6 of softmax, renorm, softcap 30.0, n_shared 2"),
        (RoutingSpec(1, num_null=1, null="skip"), "top 1 of softmax, renorm, num_null 1, null skip"),
        (RoutingSpec(8, select_bias=True, jitter=0.01), "top 8 of softmax, renorm, select_bias, jitter 0.01"),
    ],
    ids=str,
)  # fmt: skip
def test_told_are_the_options_that_differ(spec, told):
    assert str(spec) == told


@pytest.mark.parametrize("spec", [RoutingSpec(2), ExpertSpec(8, 4, 6, "swiglu")], ids=lambda s: type(s).__name__)
def test_specs_are_frozen_keys(spec):
    assert hash(spec) == hash(dataclasses.replace(spec))
    assert dataclasses.replace(spec) == spec
    name = dataclasses.fields(spec)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(spec, name, 1)
