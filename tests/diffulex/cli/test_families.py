"""`python -m diffulex families`: its options, and what it prints and writes."""

import json

import pytest

from diffulex.cli.main import main
from diffulex.families.table import rows_of_markdown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "no_such"], "--only: expected families of the catalogue, got 'no_such'. Known are afmoe"),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
    ],
)
def test_values_without_a_meaning_are_refused(argv, message, capsys):
    assert main(["families", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_table_is_printed_and_written(tmp_path, capsys):
    kept, data = tmp_path / "families.md", tmp_path / "families.json"
    argv = ["families", "--quick", "--only", "vitpose_backbone", "--markdown", str(kept), "--json", str(data)]
    assert main(argv) == 1  # its experts are none that the ops know
    shown = capsys.readouterr().out
    assert "vitpose_backbone" in shown and "0 of 1 families whole, 0 of 2 MoE layers fused, 0 without" in shown
    assert rows_of_markdown(kept.read_text())["vitpose_backbone"][6] == "0/2"
    assert json.loads(data.read_text())["verdict"]["layers"] == 2
