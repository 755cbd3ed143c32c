"""Our own template pass: one text per variant, the host's hooks left in it, names that follow the text."""

import ast
import itertools

import jinja2
import pytest

from lowering.activation import ALIASES
from lowering.schedule.schedule import Loop, Schedule
from lowering.templates import render
from lowering.templates.render import ExpertGemmVariant, GradWeightVariant, template_text

BASE = ExpertGemmVariant(gather=True, scatter=False, bias=False, act="silu(g) * u")
VARIANTS = [
    ExpertGemmVariant(gather, not gather, bias, act, interleaved, even_k, precision)
    for gather, bias, interleaved, even_k in itertools.product([False, True], repeat=4)
    for act in ("identity", "silu(g) * u", "square(relu(g))")
    for precision in ("ieee", "tf32")
]
LOOPS = [
    Loop(grouped=True),
    *(Loop(tma=True, flatten=flatten, subtiles=parts) for flatten in (False, True) for parts in (1, 2)),
]
VARIANTS += [
    ExpertGemmVariant(gather, not gather, bias, act, interleaved, even_k).scheduled(
        Schedule(128, 128, 64, 8, 4, loop), depth=64 if even_k else 48, strides=strides
    )
    for gather, bias, interleaved, even_k in itertools.product([False, True], repeat=4)
    for strides in ((4096, 64, 1), (4096, 1, 64))
    for act in ("identity", "silu(g) * u")
    for loop in LOOPS
]


def fill(text):
    """The text with the host's hooks replaced, so that it is a Python function."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    return environment.from_string(text).render(
        def_kernel=lambda *names: f"def kernel({', '.join(names)}, OUT):",
        size=lambda name, dim: f"size_{name}_{dim}",
        stride=lambda name, dim: f"stride_{name}_{dim}",
        store_output=lambda indices, value, mask, **options: f"store({', '.join(indices)}, {value}, {mask})",
    )


@pytest.mark.parametrize(
    "name",
    [
        "moe_dispatch",
        "moe_dispatch_count",
        "moe_dispatch_place",
        "moe_expert_gemm",
        "moe_expert_gemm_tma",
        "moe_expert_grad_weight",
        "moe_route",
        "moe_route_linear_part",
        "moe_route_linear_sum",
    ],
)
def test_templates_are_part_of_the_package(name):
    assert "{{def_kernel(" in template_text(name)


def test_a_template_that_does_not_exist():
    with pytest.raises(FileNotFoundError):
        template_text("moe_nothing")


@pytest.mark.parametrize("act", [*ALIASES, "identity", "max(g, 0.0)"])
def test_every_activation_renders_to_python(act):
    variant = ExpertGemmVariant(gather=True, scatter=False, bias=True, act=act)
    ast.parse(fill(variant.source()))


def test_every_variant_renders_to_python():
    for variant in VARIANTS:
        ast.parse(fill(variant.source()))


def test_nothing_of_our_own_pass_is_left():
    for variant in VARIANTS:
        assert not any(mark in variant.source() for mark in ("<<", ">>", "<%", "%>", "{#"))


def test_names_follow_the_text():
    """Inductor keeps templates by name: one text must have one name, another text another."""
    texts = {}
    for variant in [*VARIANTS, *(GradWeightVariant(a, b, p) for a in (0, 1) for b in (0, 1) for p in ("ieee", "tf32"))]:
        assert texts.setdefault(variant.name, variant.source()) == variant.source()
    distinct = {(variant.source(), variant.gather) for variant in VARIANTS}
    names = {variant.name for variant in VARIANTS}
    assert len(names) >= len(distinct)


def test_spellings_of_one_activation_share_a_name():
    other = ExpertGemmVariant(gather=True, scatter=False, bias=False, act="silu( g )*u")
    alias = ExpertGemmVariant(gather=True, scatter=False, bias=False, act="swiglu")
    assert BASE.name == other.name == alias.name
    assert BASE.name.startswith("moe_expert_up_")


@pytest.mark.parametrize(
    ("change", "present", "absent"),
    [
        ({}, ["slot // TOP_K", "acc_up = tl.dot", '"A", "W", "ORDER", "OFFSETS"'], ["BIAS", "mask=(k0"]),
        ({"bias": True}, ['"A", "W", "BIAS", "ORDER", "OFFSETS"', "BIAS +"], []),
        ({"even_k": False}, ["mask=(k0 + k < WIDTH_K)"], []),
        ({"interleaved": True}, ["(stride_wn * 2)", "up_shift = stride_wn * 1\n"], ["up_shift = stride_wn * WIDTH_N"]),
        ({"act": "identity"}, ["result = acc\n"], ["acc_up"]),
        (
            {"transposed": True},
            ["w_inside = (column < WIDTH_N)", "w = tl.load(w_ptr, mask=w_inside, other"],
            ["w_column"],
        ),
        ({"transposed": True, "interleaved": True}, ["w_inside = (w_column < 2 * WIDTH_N)"], ["acc_up = tl.dot"]),
        ({"sorts": True}, ["tl.histogram", '"ORDER", "OFFSETS", "IDS"'], ["tl.load(ORDER"]),
        ({"act": "square(relu(g))"}, ["tl.maximum(acc"], ["acc_up"]),
        ({"gather": False, "scatter": True}, ["row_in.to(tl.int64)", "idx_m = slot"], ["slot // TOP_K"]),
        ({"precision": "tf32"}, ['input_precision="tf32"'], ["ieee"]),
    ],
)
def test_what_a_field_changes(change, present, absent):
    text = ExpertGemmVariant(
        **({"gather": True, "scatter": False, "bias": False, "act": "silu(g) * u"} | change)
    ).source()
    assert [part for part in present if part not in text] == []
    assert [part for part in absent if part in text] == []


def test_interleaving_without_a_gate_means_nothing():
    """An ungated formula has no halves that could alternate."""
    plain, interleaved = (ExpertGemmVariant(True, False, False, "relu(g)", flag) for flag in (False, True))
    assert "stride_wn * 1)" in interleaved.source()
    assert plain.source() == interleaved.source()


def test_a_missing_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        render.fill("moe_expert_grad_weight", arguments='"LEFT"')


@pytest.mark.parametrize(
    "variant", [found for found in VARIANTS if found.gather or not found.loop.tma], ids=lambda variant: variant.name
)
def test_rows_past_the_end_of_an_expert_are_not_read(variant):
    """Where they repeat its last row, all wait for one line of memory: up to a sixth of an expert GEMM's time.

    A descriptor, which rows that stand in order are read by, reads the next expert's: those are others.
    """
    assigned = {
        node.targets[0].id: node.value
        for node in ast.walk(ast.parse(fill(variant.source())))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    load = ast.unparse(assigned["a"])
    for name in ("a_mask", "a_inside"):
        if name in assigned:
            load = load.replace(name, ast.unparse(assigned[name]))
    mask = load.partition("mask=")[2]
    assert "row < end" in mask, load
