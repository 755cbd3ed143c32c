"""The activation between the two expert GEMMs as a small formula language: `"silu(g) * u"`, `"square(relu(g))"`.

`g` is the gate half of the pre-activation, `u` the up half; a formula without `u` belongs to ungated experts. A
formula is parsed with Python's own grammar and every node is checked against a whitelist, so the text that reaches
generated kernels is always ours, never the caller's. One formula serves the eager kernels (torch), the backward
(`derivative`) and the generated Triton (`to_triton`).
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import MoEOptionError

IDENTITY = "identity"
MAX_FORMULA_LENGTH = 4000
MAX_FORMULA_DEPTH = 100
MAX_KERNEL_TERMS = 2000

ALIASES = {
    "swiglu": "silu(g) * u",
    "geglu": "gelu(g) * u",
    "geglu_tanh": "gelu_tanh(g) * u",
    "reglu": "relu(g) * u",
    "swiglu_oai": "(max(min(u, 7.0), -7.0) + 1.0) * (min(g, 7.0) * sigmoid(min(g, 7.0) * 1.702))",
    "silu": "silu(g)",
    "gelu": "gelu(g)",
    "gelu_tanh": "gelu_tanh(g)",
    "relu": "relu(g)",
    "relu2": "square(relu(g))",
}

_SQRT_HALF = math.sqrt(0.5)
_GELU_TANH_A = math.sqrt(2.0 / math.pi)
_GELU_TANH_B = 0.044715


def _fmin(a: Any, b: Any) -> Tensor:
    return torch.clamp(a, max=b) if isinstance(a, Tensor) else torch.clamp(b, max=a)


def _fmax(a: Any, b: Any) -> Tensor:
    return torch.clamp(a, min=b) if isinstance(a, Tensor) else torch.clamp(b, min=a)


def _ge(a: Any, b: Any) -> Tensor:
    if isinstance(a, Tensor):
        return torch.ge(a, b).to(a.dtype)
    return torch.le(b, a).to(b.dtype)  # a number stays on the host


# name -> (torch, Triton text with {0} {1}, number of arguments); names with an underscore are functions of the template
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], str, int]] = {
    "sigmoid": (torch.sigmoid, "tl.sigmoid({0})", 1),
    "silu": (torch.nn.functional.silu, "({0} * tl.sigmoid({0}))", 1),
    "gelu": (torch.nn.functional.gelu, f"(0.5 * {{0}} * (1.0 + tl.erf({{0}} * {_SQRT_HALF!r})))", 1),
    "gelu_tanh": (
        functools.partial(torch.nn.functional.gelu, approximate="tanh"),
        f"({{0}} * tl.sigmoid({2 * _GELU_TANH_A!r} * ({{0}} + {_GELU_TANH_B!r} * {{0}} * {{0}} * {{0}})))",
        1,
    ),
    "relu": (torch.relu, "tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)", 1),
    "square": (torch.square, "({0} * {0})", 1),
    "exp": (torch.exp, "tl.exp({0})", 1),
    "log": (torch.log, "tl.log({0})", 1),
    "log1p": (torch.log1p, "_log1p({0})", 1),
    "erf": (torch.erf, "tl.erf({0})", 1),
    "sqrt": (torch.sqrt, "tl.sqrt({0})", 1),
    "abs": (torch.abs, "tl.abs({0})", 1),
    "tanh": (torch.tanh, "_tanh({0})", 1),
    "min": (_fmin, "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)", 2),
    "max": (_fmax, "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)", 2),
    "ge": (_ge, "({0} >= {1}).to(tl.float32)", 2),
}

_OPERATORS: dict[type, str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}

# d f(x) / dx as formulas of x; `min`, `max` are handled in `_derive`
_DERIVATIVES = {
    "sigmoid": "sigmoid(x) * (1.0 - sigmoid(x))",
    "silu": "sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x)))",
    "gelu": f"0.5 * (1.0 + erf(x * {_SQRT_HALF!r})) + x * exp(-0.5 * x * x) * {1 / math.sqrt(2 * math.pi)!r}",
    "gelu_tanh": (
        f"0.5 * (1.0 + tanh({_GELU_TANH_A!r} * (x + {_GELU_TANH_B!r} * x * x * x)))"
        f" + 0.5 * x * (1.0 - square(tanh({_GELU_TANH_A!r} * (x + {_GELU_TANH_B!r} * x * x * x))))"
        f" * {_GELU_TANH_A!r} * (1.0 + {3 * _GELU_TANH_B!r} * x * x)"
    ),
    "relu": "1.0 - ge(0.0, x)",
    "square": "2.0 * x",
    "exp": "exp(x)",
    "log": "1.0 / x",
    "log1p": "1.0 / (1.0 + x)",
    "erf": f"{2 / math.sqrt(math.pi)!r} * exp(-x * x)",
    "sqrt": "0.5 / sqrt(x)",
    "abs": "ge(x, 0.0) - ge(0.0, x)",
    "tanh": "1.0 - square(tanh(x))",
    "ge": "0.0",
}


def _unknown(act: str) -> BaseException:
    return MoEOptionError.of(
        "act",
        expected=f"one of {sorted([IDENTITY, *ALIASES])} or "
        f"a formula of g, u, numbers, + - * / and {sorted(FUNCTIONS)}",
        got=repr(act[:200]),
        hint='Example: act="silu(g) * u".',
    )


def _check(node: ast.expr, act: str, depth: int = 0) -> float | None:
    """Raise unless every node is whitelisted. The value of a tree of numbers alone, None where g or u is read."""
    if depth > MAX_FORMULA_DEPTH:
        raise _unknown(act)
    match node:
        case ast.Constant(value=bool()):
            raise _unknown(act)
        case ast.Constant(value=int() | float() as number):
            value = float(number)
        case ast.Name(id="g" | "u"):
            return None
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            first, second = _check(left, act, depth + 1), _check(right, act, depth + 1)
            if isinstance(op, ast.Div) and second == 0:
                raise _unknown(act)
            if first is None or second is None:
                return None
            value = _ARITHMETIC[type(op)](first, second)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _check(operand, act, depth + 1)
            return None if inner is None else -inner
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if (
            name in FUNCTIONS and len(args) == FUNCTIONS[name][2]
        ):
            if None not in [_check(arg, act, depth + 1) for arg in args]:
                raise _unknown(act)  # the functions take tensors
            return None
        case _:
            raise _unknown(act)
    if not math.isfinite(value):
        raise _unknown(act)
    return value


def _kernel_terms(node: ast.expr) -> int:
    """Names and numbers in the Triton text of a checked tree; templates repeat arguments, so nesting multiplies."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=args):
            return sum(FUNCTIONS[name][1].count(f"{{{i}}}") * _kernel_terms(arg) for i, arg in enumerate(args))
        case ast.BinOp(left=left, right=right):
            return _kernel_terms(left) + _kernel_terms(right)
        case ast.UnaryOp(operand=operand):
            return _kernel_terms(operand)
    return 1


@functools.lru_cache(maxsize=512)
def _parse(act: str) -> ast.expr:
    text = ALIASES.get(act, act)
    if len(text) > MAX_FORMULA_LENGTH:
        raise _unknown(act)
    try:
        node = ast.parse(text, mode="eval").body
        value = _check(node, act)
    except MoEOptionError:
        raise
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise _unknown(act) from error
    if value is not None or _kernel_terms(node) > MAX_KERNEL_TERMS:
        raise _unknown(act)
    return node


@functools.lru_cache(maxsize=512)
def canonical(act: str) -> str:
    """The formula behind a name or formula, in one spelling; `MoEOptionError` when it is neither."""
    return IDENTITY if act == IDENTITY else ast.unparse(_parse(act))


class _Simplify(ast.NodeTransformer):
    """x / (1 + exp(-y)) -> x * sigmoid(y), and x * sigmoid(x) -> silu(x): what decompositions took apart."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.BinOp(left=x, op=ast.Div(), right=ast.BinOp(left=a, op=ast.Add(), right=b)):
                exponential, one = (a, b) if isinstance(b, ast.Constant) else (b, a)
                match exponential, one:
                    case (
                        ast.Call(func=ast.Name(id="exp"), args=[ast.UnaryOp(op=ast.USub(), operand=y)]),
                        ast.Constant(value=1),
                    ):
                        return self.visit_BinOp(ast.BinOp(x, ast.Mult(), _call("sigmoid", y)))
            case ast.BinOp(left=x, op=ast.Mult(), right=ast.Call(func=ast.Name(id="sigmoid"), args=[y])):
                if ast.dump(x) == ast.dump(y):
                    return _call("silu", x)
        return node


def _call(name: str, argument: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(name, ast.Load()), [argument], [])


@functools.lru_cache(maxsize=512)
def simplify(act: str) -> str:
    """The formula in one spelling, with sigmoid and silu put together again where a graph spells them out."""
    if act == IDENTITY:
        return act
    tree = _Simplify().visit(ast.parse(ast.unparse(_parse(act)), mode="eval").body)
    return canonical(ast.unparse(tree))


@functools.lru_cache(maxsize=512)
def is_gated(act: str) -> bool:
    """Whether the formula reads `u`, so that w13 holds two halves of width I each."""
    return act != IDENTITY and _reads(_parse(act), "u")


def intermediate_size(act: str, width_J: int) -> int:
    """Columns of the up stage's output for a weight of `width_J` rows: J for identity and ungated, J // 2 for gated."""
    return width_J // 2 if is_gated(act) else width_J


def split_gate(pre_NJ: Tensor, act: str, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views (gate_NI, up_NI) of a pre-activation [N, J] of any dtype; both are the input for ungated formulas."""
    if not is_gated(act):
        return pre_NJ, pre_NJ
    if interleaved:
        return pre_NJ[:, 0::2], pre_NJ[:, 1::2]
    half = pre_NJ.shape[1] // 2
    return pre_NJ[:, :half], pre_NJ[:, half:]


def _build(node: ast.expr) -> Callable[[Tensor, Tensor], Any]:
    """A checked tree as a function of gate and up [N, I]: a tensor, or a number where no operand is a tensor."""
    match node:
        case ast.Constant(value=int() | float() as value):
            text = float(value).hex()  # Dynamo takes a float of a closure for an input, with `dynamic=True`
            return lambda gate, up: float.fromhex(text)
        case ast.Name(id="g"):
            return lambda gate, up: gate
        case ast.Name():
            return lambda gate, up: up
        case ast.UnaryOp(operand=operand):
            inner = _build(operand)
            return lambda gate, up: -inner(gate, up)
        case ast.BinOp(left=left, op=op, right=right):
            apply, first, second = _ARITHMETIC[type(op)], _build(left), _build(right)
            return lambda gate, up: apply(first(gate, up), second(gate, up))
        case ast.Call(func=ast.Name(id=name), args=args):
            call, inputs = FUNCTIONS[name][0], tuple(map(_build, args))
            return lambda gate, up: call(*(argument(gate, up) for argument in inputs))
    raise AssertionError(f"unreachable: {ast.dump(node)}")


@functools.lru_cache(maxsize=512)
def as_function(act: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The activation as a function of gate and up [N, I] in one floating dtype, which Dynamo can look into."""
    return _build(_parse(act))


def evaluate(act: str, gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """The activation [N, I] of gate and up [N, I] in their own floating dtype."""
    return as_function(act)(gate_NI, up_NI)


def _text(template: str, **parts: ast.expr) -> ast.expr:
    """Parse one of our own formula texts, replacing names by trees."""

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return parts.get(node.id, node)

    return Fill().visit(ast.parse(template, mode="eval").body)


def _reads(node: ast.expr, *names: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))


def _is_zero(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == 0


# the derivative where only `a` depends on the name, where only `b` does, where both do
_RULES: dict[type, tuple[str, str, str]] = {
    ast.Add: ("da", "db", "da + db"),
    ast.Sub: ("da", "-db", "da - db"),
    ast.Mult: ("da * b", "a * db", "da * b + a * db"),
    ast.Div: ("da / b", "-a * db / (b * b)", "da / b - a * db / (b * b)"),
}


def _sum_rule(da: ast.expr, db: ast.expr, *rules: str) -> str:
    """The rule without the terms that are zero: 0 * inf would be NaN."""
    return rules[1] if _is_zero(da) else rules[0] if _is_zero(db) else rules[2]


def _derive(node: ast.expr, name: str) -> ast.expr:
    """d node / d name; zero is `Constant(0.0)`, and products with it are dropped."""
    zero = ast.Constant(0.0)
    match node:
        case ast.Constant():
            return zero
        case ast.Name(id=found):
            return ast.Constant(1.0 if found == name else 0.0)
        case ast.UnaryOp(operand=operand):
            inner = _derive(operand, name)
            return zero if _is_zero(inner) else _text("-a", a=inner)
        case ast.BinOp(left=a, op=op, right=b):
            da, db = _derive(a, name), _derive(b, name)
            if _is_zero(da) and _is_zero(db):
                return zero
            return _text(_sum_rule(da, db, *_RULES[type(op)]), a=a, b=b, da=da, db=db)
        case ast.Call(func=ast.Name(id="min" | "max" as kind), args=[a, b]):
            da, db = _derive(a, name), _derive(b, name)
            if _is_zero(da) and _is_zero(db):
                return zero
            if not _reads(a, "g", "u"):
                a, b, da, db = b, a, db, da
            # at equality the first tensor passes the gradient, as torch.clamp does for its input
            chosen = "ge(b, a)" if kind == "min" else "ge(a, b)"
            left, right = f"{chosen} * da", f"(1.0 - {chosen}) * db"
            return _text(_sum_rule(da, db, left, right, f"{left} + {right}"), a=a, b=b, da=da, db=db)
        case ast.Call(func=ast.Name(id=function), args=[a]):
            da = _derive(a, name)
            return zero if _is_zero(da) else _text(f"({_DERIVATIVES[function]}) * da", x=a, da=da)
        case ast.Call():
            return zero
    raise AssertionError(f"unreachable: {ast.dump(node)}")


@functools.lru_cache(maxsize=512)
def _derivative_function(act: str, name: str) -> Callable[[Tensor, Tensor], Any]:
    return _build(_derive(_parse(act), name))


def derivative(act: str, name: str, gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """d act / d g (`name="g"`) or d act / d u (`name="u"`), [N, I] in the dtype of the inputs."""
    value = _derivative_function(act, name)(gate_NI, up_NI)
    return value if isinstance(value, Tensor) else torch.full_like(gate_NI, value)


def to_triton(act: str, *, gate: str, up: str) -> str:
    """The formula as a Triton expression over fp32 blocks called `gate` and `up` (trusted names of our templates)."""

    def emit(node: ast.expr) -> str:
        match node:
            case ast.Constant(value=int() | float() as value):
                return repr(float(value))
            case ast.Name(id=name):
                return gate if name == "g" else up
            case ast.UnaryOp(operand=operand):
                return f"(-{emit(operand)})"
            case ast.BinOp(left=left, op=op, right=right):
                return f"({emit(left)} {_OPERATORS[type(op)]} {emit(right)})"
            case ast.Call(func=ast.Name(id=name), args=args):
                return FUNCTIONS[name][1].format(*map(emit, args))
        raise AssertionError(f"unreachable: {ast.dump(node)}")

    return emit(_parse(act))
