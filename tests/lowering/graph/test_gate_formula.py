"""Pointwise subgraphs read as formulas: through views and halves, and what is said of values that others read."""

import pytest
import torch
from torch.nn.functional import gelu, silu

from lowering.errors import ReasonCode
from lowering.graph.dataflow import MatchError
from lowering.graph.gate_formula import FormulaReader, formula_names, half_of, simplified_formula
from tests.support.graphs import trace

T, WIDTH = 6, 4


def reader_of(function, *, views=False):
    """A reader whose leaves are the graph's inputs, and the node that the graph returns first."""
    graph = trace(function, torch.randn(T, WIDTH), torch.randn(T, WIDTH)).graph
    names = dict(zip((node for node in graph.nodes if node.op == "placeholder"), "gu", strict=True))
    (result, *_) = next(iter(reversed(graph.nodes))).all_input_nodes
    return FormulaReader(names.get, views=views), result, list(names)


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        (lambda g, u: silu(g) * u, "silu(g) * u"),
        (lambda g, u: u * (gelu(g, approximate="tanh") + 1), None),
        (lambda g, u: g.clamp(max=7.0) * (u.clamp(-7.0, 7.0) + 1), "min(g, 7.0) * (min(max(u, -7.0), 7.0) + 1.0)"),
        (lambda g, u: g.relu().square() - u / 2, "square(relu(g)) - u / 2.0"),
    ],
)
def test_formulas(function, formula):
    reader, result, leaves = reader_of(function)
    found = simplified_formula(reader.text(result))
    assert formula in (None, found)
    assert formula_names(found) >= {"g", "u"}
    reader.require_private(result, *leaves)


def test_views_between():
    def function(g, u):
        return (silu(g.view(2, 3, WIDTH)) * u.view(2, 3, WIDTH)).view(T, WIDTH)

    reader, result, leaves = reader_of(function, views=True)
    assert simplified_formula(reader.text(result)) == "silu(g) * u"
    reader.require_private(result, *leaves)
    reader, result, _ = reader_of(function)
    with pytest.raises(MatchError, match="not a pointwise operation"):
        reader.text(result)


def test_columns_must_stay_columns():
    reader, result, _ = reader_of(lambda g, u: g.view(T * WIDTH // 2, 2) * u.view(T * WIDTH // 2, 2), views=True)
    with pytest.raises(MatchError, match="split or joined"):
        reader.text(result)


def test_values_that_others_read():
    def function(g, u):
        gate = silu(g)
        return gate * u, gate + 1

    reader, result, leaves = reader_of(function)
    reader.text(result)
    with pytest.raises(MatchError) as caught:
        reader.require_private(result, *leaves)
    assert caught.value.reason.code is ReasonCode.SHARED_USE


def test_no_formula():
    reader, result, _ = reader_of(lambda g, u: g.cumsum(0) * u)
    with pytest.raises(MatchError) as caught:
        reader.text(result)
    assert caught.value.reason.code is ReasonCode.NOT_POINTWISE


def halves(function, *shape):
    graph = trace(function, torch.randn(shape)).graph
    found = [half_of(node) for node in graph.nodes if node.op == "call_function"]
    return [(half[1], half[2]) for half in found if half is not None]


def test_halves():
    assert halves(lambda x: torch.mul(*x.chunk(2, -1)), T, 8) == [("halves", "g"), ("halves", "u")]
    assert halves(lambda x: torch.mul(*x.chunk(2, -1)), 2, 3, 8) == [("halves", "g"), ("halves", "u")]
    assert halves(lambda x: x[:, ::2] * x[:, 1::2], T, 8) == [("interleaved", "g"), ("interleaved", "u")]
    assert halves(lambda x: torch.mul(*x.chunk(2, 0)), T, 8) == []
    assert halves(lambda x: x[:, :3] * x[:, 3:6], T, 8) == []
