"""What rows come to, without a model."""

import dataclasses
import json

import pytest

from diffulex.cli.accuracy import ErrorRatio
from diffulex.cli.measure import DynamoCounts
from diffulex.families import Family
from diffulex.families.measure import Layer, Row
from diffulex.families.table import (
    HEADER,
    as_document,
    as_json,
    cells,
    is_whole,
    notes,
    rows_of_markdown,
    unknown,
    verdict,
)

OPS = ("moe_combine", "moe_dispatch", "moe_expert_down", "moe_expert_up", "moe_route")
WHOLE = Row(
    Family("one", "OneForCausalLM"),
    (1, 33),
    error=ErrorRatio(1.0, 1.1),
    dynamo=DynamoCounts(2, (), 1),
    layers=(Layer("a", OPS), Layer("b", OPS)),
)
LEFT_OUT = dataclasses.replace(WHOLE, layers=(Layer("a", OPS), Layer("b", (), "SHAPE: odd")))


def named(row: Row, name: str, **fields: str) -> Row:
    return dataclasses.replace(row, family=Family(name, "Model", **fields))


def test_a_whole_row():
    assert is_whole(WHOLE) and not unknown(WHOLE) and not notes(WHOLE)
    assert cells(WHOLE) == ["one", "OneForCausalLM", "import", "1.00 / 1.10", "2", "0", "2/2", "5", ""]
    assert cells(WHOLE, figures=False)[3] == "holds"


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"error": ErrorRatio(20.0, 1.0, "mean error over 10")}, "mean error over 10"),
        ({"dynamo": DynamoCounts(5, (), 4), "stock": DynamoCounts(4, (), 3)}, "0 breaks in 4 graphs without diffulex"),
        ({"dynamo": DynamoCounts(2, (("why\n so", 1),), 0), "stock": DynamoCounts(2, (("why", 1),), 0)}, "why so"),
        ({"layers": (Layer("a", OPS),)}, "2 layers expected, 1 found"),
        ({"layers": LEFT_OUT.layers}, "SHAPE: odd"),
        ({"problem": "ValueError: no", "dynamo": None}, "ValueError: no"),
    ],
)
def test_a_row_that_is_not_whole_says_why(change, note):
    row = dataclasses.replace(WHOLE, **change)
    assert not is_whole(row)
    assert note in notes(row)


def test_a_model_that_needs_many_graphs_by_itself_is_whole():
    row = dataclasses.replace(WHOLE, dynamo=DynamoCounts(5, (), 4), stock=DynamoCounts(5, (), 4))
    assert is_whole(row) and notes(row) == ["0 breaks in 5 graphs without diffulex"]


def test_layers_without_a_reason_are_unknown():
    assert unknown(LEFT_OUT) == 0
    assert unknown(dataclasses.replace(WHOLE, layers=(Layer("a", OPS),))) == 1
    assert unknown(dataclasses.replace(WHOLE, layers=(Layer("a", OPS), Layer("b", ())))) == 1
    assert unknown(dataclasses.replace(WHOLE, layers=(), problem="ours", dynamo=None)) == 2
    assert unknown(dataclasses.replace(WHOLE, layers=(), problem="stock", stock_fails=True)) == 0


def test_the_router_that_stays_is_told():
    row = dataclasses.replace(WHOLE, layers=(Layer("a", OPS[:4], router="stays aten (why)"),) * 2)
    assert is_whole(row) and notes(row) == ["router stays aten (why)"] and cells(row)[7] == "4"


def test_the_verdict():
    many = [named(WHOLE, str(number)) for number in range(19)]
    assert verdict(many).met and str(verdict(many)).startswith("19 of 19 families whole, 38 of 38 MoE layers")
    # 19 of 20 families and 39 of 40 layers are enough; 18 of 20 families are not, nor is a layer without a reason
    assert verdict([*many, named(LEFT_OUT, "x")]).met
    assert not verdict([*many[:18], named(LEFT_OUT, "x"), named(LEFT_OUT, "y")]).met
    assert not verdict([*many, dataclasses.replace(named(WHOLE, "x"), layers=WHOLE.layers[:1])]).met
    # a family is whole if all its parts are; one that is not installed does not count
    parts = [named(WHOLE, "x", part="a"), named(LEFT_OUT, "x", part="b")]
    absent = Row(Family("gone", "Model"), (1,), installed=False)
    assert (verdict([*parts, absent]).families, verdict([*parts, absent]).whole) == (1, 0)


def test_the_document_is_read_back():
    rows = [WHOLE, named(LEFT_OUT, "two", part="text")]
    text = as_document(rows, codegen=False)
    assert "python -m diffulex families --markdown FILE" in text and "1, 33" in text
    found = rows_of_markdown(text)
    assert found == {str(row.family): cells(row, figures=False) for row in rows}
    assert all(len(row) == len(HEADER) for row in found.values())


def test_json_has_everything():
    found = json.loads(as_json([WHOLE, LEFT_OUT]))
    assert found["verdict"]["fused"] == 3
    assert [row["whole"] for row in found["families"]] == [True, False]
    assert found["families"][1]["layers"][1]["reason"] == "SHAPE: odd"
