"""Rows of representative families, against the kept table, and rows of models that fail."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

from diffulex.families import FAMILIES, Family
from diffulex.families import measure as measuring
from diffulex.families.measure import QUICK_COUNTS, measure, splits
from diffulex.families.table import cells, is_whole, rows_of_markdown, unknown

KEPT = Path(__file__).resolve().parents[3] / "docs" / "FAMILIES.md"
# through the interface with a router of its own kind, outside it, with two kinds of experts, and one that stays out
REPRESENTATIVE = ("deepseek_v3", "gpt_oss", "ernie4_5_vl_moe", "vitpose_backbone")


def family_of(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_row_is_the_one_that_is_kept(name):
    text = KEPT.read_text(encoding="utf-8")
    row = measure(family_of(name), QUICK_COUNTS)
    assert not unknown(row)
    if f"transformers {transformers.__version__}," in text and f"torch {torch.__version__.partition('+')[0]}," in text:
        assert cells(row, figures=False) == rows_of_markdown(text)[name]
    assert is_whole(row) == (name != "vitpose_backbone"), row


def test_the_kept_table_has_every_family():
    assert set(rows_of_markdown(KEPT.read_text(encoding="utf-8"))) == {str(family) for family in FAMILIES}


def test_a_family_that_is_not_there():
    row = measure(Family("no_such_family", "NoModel"))
    assert not row.installed and cells(row)[-1] == "not in this release"


def test_a_stock_model_that_fails_is_a_reason():
    row = measure(dataclasses.replace(family_of("mixtral"), options={"num_experts_per_tok": 99}))
    assert row.stock_fails and row.problem.startswith("stock eager fails: ")
    assert not unknown(row) and not is_whole(row)


def test_a_model_that_cannot_be_built_is_no_reason():
    row = measure(dataclasses.replace(family_of("mixtral"), options={"num_hidden_layers": -1, "layer_types": 5}))
    assert row.problem.startswith("the model cannot be built: ") and not row.stock_fails
    assert unknown(row) == 2


def test_a_failure_of_ours_is_no_reason(monkeypatch):
    def failing(*args, **kwargs):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(measuring, "_compile", failing)
    row = measure(family_of("mixtral"), (1,))
    assert row.problem == "ZeroDivisionError: ours" and not row.stock_fails
    assert unknown(row) == 2


def test_a_frame_that_is_given_up_is_a_split():
    from diffulex.cli.measure import DynamoCounts

    assert splits(DynamoCounts(12, (), 3, pieces=6)) == 5
    assert splits(DynamoCounts(3, (("why", 2),), 0, pieces=3)) == 2
    assert splits(DynamoCounts(2, (), 1)) == 0
