"""The formula language of activations: values, derivatives, Triton text, and everything it refuses."""

import math
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from lowering.activation import (
    ALIASES,
    FUNCTIONS,
    IDENTITY,
    MAX_FORMULA_DEPTH,
    MAX_FORMULA_LENGTH,
    as_function,
    canonical,
    derivative,
    evaluate,
    intermediate_size,
    is_gated,
    simplify,
    split_gate,
    to_triton,
)
from lowering.errors import MoEOptionError
from tests.support.catalogue import raises_catalogue
from tests.support.oracle import assert_near_exact
from tests.support.strategies import formulas

FORMULAS = [
    *ALIASES,
    "g * sigmoid(u)",
    "exp(min(g, 2.0)) / (1.0 + square(u))",
    "log(1.0 + exp(-abs(g))) - u * u / 3",
    "max(g, u) - min(g, u)",
    "ge(g, u) * g + (1 - ge(g, u)) * erf(u)",
    "sqrt(1.0 + square(g)) * tanh(u)",
    "g / u",
    "g / (1.0 + square(g))",
    "-(-g) - -2.5",
    "u",
    "1 - g",
    "g * 1000000000000000000000 / 1e21",
]


def samples(seed=0, count=64):
    generator = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, count, 3, generator=generator, dtype=torch.float64) * 3
    return gate, up


def swiglu_oai(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


WRITTEN_OUT = {
    "swiglu": lambda g, u: functional.silu(g) * u,
    "geglu": lambda g, u: functional.gelu(g) * u,
    "geglu_tanh": lambda g, u: functional.gelu(g, approximate="tanh") * u,
    "reglu": lambda g, u: functional.relu(g) * u,
    "swiglu_oai": swiglu_oai,
    "silu": lambda g, u: functional.silu(g),
    "gelu": lambda g, u: functional.gelu(g),
    "gelu_tanh": lambda g, u: functional.gelu(g, approximate="tanh"),
    "relu": lambda g, u: functional.relu(g),
    "relu2": lambda g, u: functional.relu(g) ** 2,
}


def test_every_alias_is_written_out():
    assert set(WRITTEN_OUT) == set(ALIASES)


@pytest.mark.parametrize("act", ALIASES)
def test_alias_is_what_its_name_says(act):
    gate, up = samples()
    gate, up = torch.cat((gate, 8 * gate)), torch.cat((up, 8 * up))
    assert_near_exact(evaluate(act, gate, up), WRITTEN_OUT[act](gate, up))


def _sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


SCALAR = {
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "square": lambda x: x * x,
    "exp": math.exp,
    "log": math.log,
    "log1p": math.log1p,
    "erf": math.erf,
    "sqrt": math.sqrt,
    "abs": abs,
    "tanh": math.tanh,
    "min": min,
    "max": max,
    "ge": lambda a, b: float(a >= b),
}


def scalar_value(act, gate, up):
    """The formula of two numbers by Python's own arithmetic; None where that has no answer."""
    try:
        return eval(ALIASES.get(act, act), {"__builtins__": {}, **SCALAR, "g": gate, "u": up})
    except (ArithmeticError, ValueError):
        return None


def assert_scalar_agrees(act, gate, up):
    values = evaluate(act, gate, up)
    assert values.shape == gate.shape
    assert values.dtype == gate.dtype
    compared = 0
    for g, u, value in zip(gate.flatten().tolist(), up.flatten().tolist(), values.flatten().tolist(), strict=True):
        wanted = scalar_value(act, g, u)
        if wanted is None or not math.isfinite(wanted) or abs(wanted) > 1e12:
            continue
        assert math.isclose(value, wanted, rel_tol=1e-9, abs_tol=1e-9), (act, g, u)
        compared += 1
    return compared


def test_every_function_has_a_scalar_form():
    assert set(SCALAR) == set(FUNCTIONS)


@pytest.mark.parametrize("act", FORMULAS)
def test_evaluate_agrees_with_python_arithmetic(act):
    assert assert_scalar_agrees(act, *samples()) > 100


@given(formulas, st.integers(0, 1000))
def test_evaluate_agrees_with_python_arithmetic_for_random_formulas(act, seed):
    assert_scalar_agrees(act, *samples(seed, count=4))


def autograd_derivatives(act, gate, up):
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    value = evaluate(act, gate, up)
    if not value.requires_grad:
        return torch.zeros_like(gate), torch.zeros_like(up)
    grads = torch.autograd.grad(value.sum(), (gate, up), allow_unused=True)
    return tuple(torch.zeros_like(gate) if grad is None else grad for grad in grads)


def assert_derivatives_agree(act, gate, up, relative):
    """Formula and autograd, element by element, relative to both and to the value; where all is finite and not huge."""
    compared, value = 0, evaluate(act, gate, up).abs()
    for name, wanted in zip(("g", "u"), autograd_derivatives(act, gate, up), strict=True):
        found = derivative(act, name, gate, up)
        assert found.shape == gate.shape
        assert found.dtype == gate.dtype
        usable = torch.isfinite(value) & torch.isfinite(found) & torch.isfinite(wanted) & (wanted.abs() < 1e9)
        bound = relative * (1 + torch.maximum(wanted.abs(), found.abs()) + value)
        worst = ((found - wanted).abs() / bound)[usable]
        assert (worst <= 1).all(), f"d {act} / d {name} is off by {worst.max() * relative:.3g}"
        compared += int(usable.sum())
    return compared


@pytest.mark.parametrize("act", FORMULAS)
def test_derivative_is_autograd(act):
    gate, up = samples()
    assert assert_derivatives_agree(act, gate, up, 1e-12) == 2 * gate.numel()


@given(formulas, st.integers(0, 1000))
def test_derivative_is_autograd_for_random_formulas(act, seed):
    assert_derivatives_agree(act, *samples(seed, count=8), 1e-8)


@pytest.mark.parametrize("act", [*ALIASES, "min(7.0, g)", "max(-7.0, u)", "max(0.0, g) * u", "abs(g)", "max(g, u)"])
def test_derivative_at_kinks_is_between_those_around_it(act):
    """At 0 and at the clamps of swiglu_oai, where half precision lands exactly; which value in between is a choice."""
    points, step = torch.tensor([-7.0, 0.0, 7.0, 1.0], dtype=torch.float64), 1e-7
    gate, up = (m.contiguous() for m in torch.meshgrid(points, points, indexing="ij"))
    around = [autograd_derivatives(act, gate + dg, up + du) for dg in (-step, step) for du in (-step, step)]
    for position, name in enumerate(("g", "u")):
        sides = torch.stack([derivatives[position] for derivatives in around])
        found = derivative(act, name, gate, up)
        assert (found >= sides.amin(0) - 1e-4).all(), f"d {act} / d {name} is too small"
        assert (found <= sides.amax(0) + 1e-4).all(), f"d {act} / d {name} is too large"


@pytest.mark.parametrize("act", ["min(g, 7.0)", "min(7.0, g)", "max(g, 7.0)", "max(7.0, g)"])
def test_a_tie_with_a_number_passes_the_gradient(act):
    """As torch.clamp did up to 2.13 (2.14 passes nothing): a value that lands on its clamp can still leave it."""
    tie = torch.full((1, 1), 7.0, dtype=torch.float64)
    assert derivative(act, "g", tie, tie).item() == 1.0


@pytest.mark.parametrize("act", ["swiglu", "geglu", "reglu", "g + u", "u - g", "g / u", "max(g, 1.0) * u"])
def test_derivative_by_up_is_finite_where_only_up_is_infinite(act):
    """A term that does not depend on u must not turn an overflowed u into NaN."""
    gate = torch.tensor([[-2.0, 0.5, 3.0]], dtype=torch.float64)
    up = torch.full_like(gate, math.inf)
    wanted = autograd_derivatives(act, gate, up)[1]
    found = derivative(act, "u", gate, up)
    assert wanted.isfinite().all()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_the_derivative_check_sees_a_wrong_derivative(monkeypatch):
    right = derivative
    monkeypatch.setitem(globals(), "derivative", lambda act, name, gate, up: right(act, "g", gate, up))
    with pytest.raises(AssertionError, match="is off by"):
        assert_derivatives_agree("swiglu", *samples(), 1e-8)


@pytest.mark.parametrize("act", ["silu(g)", "1 - g", "g"])
def test_derivative_by_an_absent_name_is_zero(act):
    gate, up = samples()
    assert torch.equal(derivative(act, "u", gate, up), torch.zeros_like(gate))


def _both(function, a, b):
    return function(*torch.broadcast_tensors(*(torch.as_tensor(x, dtype=torch.float64) for x in (a, b))))


FAKE_TRITON = types.SimpleNamespace(
    float32=torch.float64,
    PropagateNan=types.SimpleNamespace(ALL="all"),
    sigmoid=torch.sigmoid,
    exp=torch.exp,
    log=torch.log,
    erf=torch.erf,
    sqrt=torch.sqrt,
    abs=torch.abs,
    maximum=lambda a, b, propagate_nan: _both(torch.maximum, a, b),
    minimum=lambda a, b, propagate_nan: _both(torch.minimum, a, b),
)


TEMPLATE_FUNCTIONS = {"_tanh": torch.tanh, "_log1p": torch.log1p}  # their own text: test_eager


def assert_triton_agrees(act, gate, up):
    text = to_triton(act, gate="gate_x", up="up_x")
    code = compile(text, act, "eval")
    known = {"tl", "gate_x", "up_x", "to", "float32", "PropagateNan", "ALL", *vars(FAKE_TRITON), *TEMPLATE_FUNCTIONS}
    assert set(code.co_names) <= known
    names = {"tl": FAKE_TRITON, "gate_x": gate, "up_x": up, **TEMPLATE_FUNCTIONS}
    found = eval(code, {"__builtins__": {}, **names})
    wanted = evaluate(act, gate, up)
    # huge values come from dividing by tiny ones, which the two forms of gelu_tanh round differently
    usable = torch.isfinite(found) & torch.isfinite(wanted) & (wanted.abs() < 1e4)
    torch.testing.assert_close(found[usable], wanted[usable], rtol=1e-7, atol=1e-7)
    return int(usable.sum())


@pytest.mark.parametrize("act", FORMULAS)
def test_triton_text_means_the_same(act):
    gate, up = samples()
    assert assert_triton_agrees(act, gate, up) == gate.numel()


@given(formulas, st.integers(0, 1000))
def test_triton_text_means_the_same_for_random_formulas(act, seed):
    assert_triton_agrees(act, *samples(seed, count=8))


@pytest.mark.parametrize("name", [n for n, (_, text, _) in FUNCTIONS.items() if "tl.m" in text])
def test_triton_minimum_and_maximum_keep_nan(name):
    assert "propagate_nan=tl.PropagateNan.ALL" in FUNCTIONS[name][1]


REFUSED = {
    "unknown_name": "swigloo",
    "unknown_variable": "g * h",
    "unknown_call": "softplus(g)",
    "attribute": "g.real",
    "attribute_call": "g.exp()",
    "dunder": "g.__class__",
    "import": "__import__('os').system('true')",
    "builtin": "eval('g')",
    "method_of_call": "silu(g).T",
    "call_of_call": "silu(g)(u)",
    "subscript": "g[0]",
    "list": "[g, u]",
    "tuple": "g, u",
    "dict": "{1: g}",
    "comprehension": "[g for _ in (1, 2)]",
    "comparison": "g > u",
    "conditional": "g if u else u",
    "and": "g and u",
    "not": "not g",
    "lambda": "lambda: g",
    "walrus": "(g := u)",
    "await": "await g",
    "starred": "min(*g)",
    "keyword": "min(g, b=u)",
    "power": "g ** 2",
    "floor_division": "g // u",
    "remainder": "g % u",
    "matrix_product": "g @ u",
    "shift": "g << 2",
    "invert": "~g",
    "plus_sign": "+g",
    "f_string": "f'{g}'",
    "string": "'g'",
    "bytes": "b'g' * 2",
    "none": "None",
    "ellipsis": "...",
    "boolean": "True * g",
    "complex": "1j * g",
    "infinite": "1e999 * g",
    "huge_integer": "g * 1" + "0" * 400,
    "too_few_arguments": "min(g)",
    "too_many_arguments": "silu(g, u)",
    "no_arguments": "silu()",
    "numbers_only": "1.0 + 2.0",
    "call_of_numbers": "sigmoid(1.0) * g",
    "two_argument_call_of_numbers": "max(1.0, 2.0) * g",
    "comparison_of_numbers": "ge(1, 2) * g",
    "number_divided_by_zero": "g * (1 / 0)",
    "division_by_zero": "g / 0.0",
    "division_by_a_zero_sum": "g / (1.5 - 1.5)",
    "overflow_of_numbers": "g * (1e300 * 1e300)",
    "empty": "",
    "space": " ",
    "indented": "  g",
    "two_statements": "g; u",
    "assignment": "g = u",
    "unfinished": "silu(g",
    "null_byte": "g\0",
    "lone_surrogate": "g + \ud800",
    "long_text": "g + " * MAX_FORMULA_LENGTH + "g",
    "deep_minus": "-" * 3000 + "g",
    "deep_parentheses": "(" * 1500 + "g" + ")" * 1500,
    "deep_calls": "abs(" * 700 + "g" + ")" * 700,
    "deep_sum": "g" + "+g" * 1500,
    "identity_inside": "identity * 2",
}


@pytest.mark.parametrize("act", REFUSED.values(), ids=REFUSED)
def test_refused(act):
    with raises_catalogue(MoEOptionError, where="act", expected="a formula of g, u"):
        canonical(act)
    with pytest.raises(MoEOptionError):
        is_gated(act)
    gate, up = samples(count=2)
    for use in (
        lambda: evaluate(act, gate, up),
        lambda: derivative(act, "g", gate, up),
        lambda: to_triton(act, gate="g", up="u"),
    ):
        with pytest.raises(MoEOptionError):
            use()


def nested(name, depth):
    return f"{name}(" * depth + "g" + ")" * depth


def test_the_depth_is_bounded_and_reached_from_a_deep_stack():
    """Not by Python's recursion limit, which depends on who calls."""
    with pytest.raises(MoEOptionError):
        canonical(nested("tanh", MAX_FORMULA_DEPTH + 1))
    gate, up = samples(count=1)

    def use(frames):
        if frames:
            return use(frames - 1)
        act = canonical(nested("tanh", MAX_FORMULA_DEPTH))
        return evaluate(act, gate, up), derivative(act, "g", gate, up), to_triton(act, gate="g", up="u")

    value, slope, text = use(200)
    assert value.shape == slope.shape == gate.shape
    assert text.count("_tanh(") == MAX_FORMULA_DEPTH


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_kernel_text_cannot_explode(name):
    """silu(silu(...)) repeats its argument at every level: 100 levels would be 2^100 terms."""
    act, longest = "g", 0
    for _ in range(MAX_FORMULA_DEPTH):
        act = f"{name}({act})" if FUNCTIONS[name][2] == 1 else f"{name}({act}, u)"
        try:
            longest = max(longest, len(to_triton(act, gate="g", up="u")))
        except MoEOptionError:
            break
    assert 0 < longest < 200_000


def test_refusal_does_not_repeat_a_huge_text():
    with pytest.raises(MoEOptionError) as caught:
        canonical("x" * 100_000)
    assert len(str(caught.value)) < 1000


TEXT = st.text(alphabet="gu0127.e+-*/() ,", max_size=24) | st.text(max_size=24)
WORDS = st.lists(st.sampled_from([*FUNCTIONS, "g", "u", "(", ")", ",", "+", "-", "*", "/", "1.5", "0", ".", "[", "if"]))


@given(TEXT | WORDS.map(" ".join))
def test_any_text_is_refused_or_evaluates(act):
    try:
        text = canonical(act)
    except MoEOptionError:
        return
    assert canonical(text) == text
    if text == IDENTITY:
        return
    gate, up = samples(count=2)
    assert evaluate(text, gate, up).shape == gate.shape
    assert derivative(text, "g", gate, up).shape == gate.shape


@given(formulas)
def test_formulas_are_accepted_and_spelled_one_way(act):
    text = canonical(act)
    assert canonical(text) == text
    gate, up = samples(count=2)
    assert torch.equal(evaluate(text, gate, up).nan_to_num(), evaluate(act, gate, up).nan_to_num())


SPELLED_OUT = {
    "g / (1 + exp(-g))": "silu(g)",
    "g / (exp(-g) + 1.0) * u": "silu(g) * u",
    "u * (g / (1 + exp(-g)))": "u * silu(g)",
    "g * (1 / (1 + exp(-g)))": "g * (1 * sigmoid(g))",
    "g * sigmoid(g * 1.702)": "g * sigmoid(g * 1.702)",
    "g / (1 + exp(-(g * 2)))": "g * sigmoid(g * 2)",
    "g / (1 + exp(g))": "g / (1 + exp(g))",
    "g / (2 + exp(-g))": "g / (2 + exp(-g))",
    "g / (1 - exp(-g))": "g / (1 - exp(-g))",
    "identity": "identity",
}


@pytest.mark.parametrize(("act", "wanted"), SPELLED_OUT.items())
def test_simplify_puts_sigmoid_and_silu_together(act, wanted):
    assert simplify(act) == canonical(wanted)


@given(formulas, st.integers(0, 1000))
def test_simplify_keeps_the_value(act, seed):
    gate, up = samples(seed, count=8)
    for spelled in (act, f"({act}) / (1.0 + exp(-({act})))", f"sigmoid(u) * ({act}) * sigmoid({act})"):
        try:
            wanted = evaluate(spelled, gate, up)
        except MoEOptionError:
            continue  # too deep or too long
        found = evaluate(simplify(spelled), gate, up)
        assert simplify(simplify(spelled)) == simplify(spelled)
        usable = torch.isfinite(wanted) & (wanted.abs() < 1e9)
        torch.testing.assert_close(found[usable], wanted[usable], rtol=1e-9, atol=1e-9)


def test_canonical_spelling():
    assert canonical("swiglu") == canonical("silu(g)*u") == canonical("(silu( g ) * (u))") == "silu(g) * u"
    assert canonical(IDENTITY) == IDENTITY


@pytest.mark.parametrize(
    ("act", "gated"),
    [
        *((act, act.endswith("glu") or "glu_" in act) for act in ALIASES if act not in ("gelu", "gelu_tanh")),
        ("gelu", False),
        ("gelu_tanh", False),
        (IDENTITY, False),
        ("g", False),
        ("u", True),
    ],
)
def test_gated_means_that_up_is_read(act, gated):
    assert is_gated(act) is gated
    assert intermediate_size(act, 12) == (6 if gated else 12)


def test_split_gate_layouts():
    pre = torch.arange(12.0).reshape(2, 6)
    halves, pairs = split_gate(pre, "swiglu", interleaved=False), split_gate(pre, "swiglu", interleaved=True)
    assert [t.tolist() for t in halves] == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]
    assert [t.tolist() for t in pairs] == [[[0, 2, 4], [6, 8, 10]], [[1, 3, 5], [7, 9, 11]]]
    for act, interleaved in (("relu2", False), ("relu2", True), (IDENTITY, True)):
        assert all(t is pre for t in split_gate(pre, act, interleaved=interleaved))


@pytest.mark.parametrize("act", ALIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(act, dtype):
    gate, up = (t.to(dtype) for t in samples(count=2))
    assert evaluate(act, gate, up).dtype == dtype
    assert derivative(act, "g", gate, up).dtype == dtype


@pytest.mark.parametrize("act", ALIASES)
def test_nan_stays_where_it_is(act):
    gate, up = samples(count=4)
    clean = evaluate(act, gate, up)
    gate[1, 2] = math.nan
    dirty = evaluate(act, gate, up)
    assert dirty[1, 2].isnan()
    dirty[1, 2] = clean[1, 2]
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("act", ALIASES)
def test_dynamo_looks_into_the_function(act):
    """Shared experts apply their formula in the open, for Inductor to fuse; `fullgraph` raises where it breaks."""
    function = as_function(act)
    gate_NI, up_NI = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    torch._dynamo.reset()
    compiled = torch.compile(lambda gate, up: function(gate, up), backend="eager", fullgraph=True)
    assert torch.equal(compiled(gate_NI, up_NI), evaluate(act, gate_NI, up_NI))
