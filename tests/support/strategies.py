"""Hypothesis strategies: forms of a block, activation formulas."""

from __future__ import annotations

from hypothesis import strategies as st

from lowering.activation import ALIASES, FUNCTIONS

from .inputs import BlockForm

ACTS = (*ALIASES, "silu(g) * (u + 1.0)", "square(relu(g)) * u", "tanh(g)", "sigmoid(u) * g")
IDS = ("distinct", "sentinels", "duplicates", "one", "sparse", "none")


@st.composite
def block_forms(draw: st.DrawFn, **fixed: object) -> BlockForm:
    """Small forms of every kind, in fp64: T 0..6, K <= E <= 6, H, I <= 5; `fixed` fields are not drawn."""
    top_k = draw(st.integers(1, 4))
    form = BlockForm(
        tokens=draw(st.integers(0, 6)),
        top_k=top_k,
        experts=draw(st.integers(top_k, 6)),
        hidden=draw(st.integers(1, 5)),
        width=draw(st.integers(1, 5)),
        act=draw(st.sampled_from(ACTS)),
        bias=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        transposed=draw(st.booleans()),
        ids=draw(st.sampled_from(IDS)),
        seed=draw(st.integers(0, 2**16)),
    ).replace(**fixed)
    # every second expert must still leave K different ones
    return form.replace(experts=2 * form.top_k) if form.ids == "sparse" and "experts" not in fixed else form


_UNARY = [name for name, (_, _, count) in FUNCTIONS.items() if count == 1]
_BINARY = [name for name, (_, _, count) in FUNCTIONS.items() if count == 2]
_NUMBERS = st.sampled_from(["0.0", "1.0", "2", "0.5", "7.0", "1.702", "1e-3"])


def _grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    operand = inner | inner | _NUMBERS
    divisor = inner | _NUMBERS.filter(lambda number: float(number) != 0)  # a division by zero is refused
    return st.one_of(
        st.builds("{}({})".format, st.sampled_from(_UNARY), inner),
        st.builds("{}({}, {})".format, st.sampled_from(_BINARY), inner, operand),
        st.builds("{}({}, {})".format, st.sampled_from(_BINARY), _NUMBERS, inner),
        st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), operand),
        st.builds("({} / {})".format, inner, divisor),
        st.builds("({} {} {})".format, _NUMBERS, st.sampled_from("+-*/"), inner),
        st.builds("(-{})".format, inner),
    )


# Every formula reads g or u in each call: a call of numbers alone is refused.
formulas = st.recursive(st.sampled_from(["g", "u"]), _grow, max_leaves=6)
