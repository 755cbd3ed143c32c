"""The tables of docs/parallel.md: up to date with the kept measurements, and rewritten with cells measured again."""

import csv
import re
from pathlib import Path

import pytest

from benchmarks.bench_parallel import COLUMNS
from benchmarks.parallel_tables import as_csv, main, merged, read, replaced, tables
from diffulex.distributed.links import REFERENCE_PROBE, Host

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "parallel.md"
MEASURED = Path(__file__).with_name("measured_on_two_h200.csv")
COMMAND = f"python -m benchmarks.parallel_tables {MEASURED.relative_to(DOCUMENT.parents[1])} --write docs/parallel.md"


@pytest.fixture(scope="module")
def found():
    return tables(MEASURED)


def row_of(tokens, way, **more):
    """A row as it is read from a CSV."""
    row = {"device": "NVIDIA H200", "ranks": "2", "shape": "qwen3", "experts_in_all": "128"}
    parts = dict.fromkeys(("dispatch_us", "experts_us", "combine_us"), "")
    return row | {"tokens": str(tokens), "way": way, "time_us": "1000"} | parts | more


@pytest.fixture
def files(tmp_path, found):
    """A CSV, another one by `bench_parallel`, and a document with places for what is made of them."""
    measured, again, document = (tmp_path / name for name in ("measured.csv", "again.csv", "parallel.md"))
    measured.write_text(as_csv([row_of(64, "naive"), row_of(64, "tp-width")]))
    places = [f"<!-- {name} -->\nold\n<!-- end of {name} -->" for name in found if name != "furthest"]
    document.write_text("\n\n".join(["in <!-- furthest -->old<!-- end of furthest -->.", *places]))
    return measured, again, document


def write(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def test_the_document_is_up_to_date(found):
    document = DOCUMENT.read_text(encoding="utf-8")
    assert replaced(document, found) == document, COMMAND
    assert {*re.findall("<!-- end of (.*?) -->", document)} == {*found}


def test_every_number_of_the_tables_is_looked_at(found):
    """One more in any of them is put right."""
    document = DOCUMENT.read_text(encoding="utf-8")
    for name, text in found.items():
        begin = document.index(text, document.index(f"<!-- {name} -->"))
        for number in re.finditer(r"\d+", text):
            start, end = begin + number.start(), begin + number.end()
            wrong = f"{document[:start]}{int(number[0]) + 1}{document[end:]}"
            assert wrong != document and replaced(wrong, {name: text}) == document


def test_a_row_takes_the_place_of_its_cell():
    kept = [row_of(64, "naive"), row_of(64, "tp-width"), row_of(1024, "naive"), row_of(64, "sums", shape="dsv3")]
    again, new = row_of(64, "naive", time_us="5", host_us="7"), row_of(128, "static", time_us="6")
    assert merged(kept, [new, again]) == [again, kept[1], new, *kept[2:]]
    lines = as_csv(merged(kept, [new, again])).splitlines()
    assert lines[0].split(",") == [*kept[0], "host_us"]
    assert lines[1].endswith(",5,,,,7") and lines[2].endswith(",1000,,,,")


def test_what_is_not_measured_again_stays_as_it_was():
    kept = read(MEASURED)
    assert as_csv(merged(kept, kept[5:9])) == MEASURED.read_text(encoding="utf-8")


def test_tables_and_rows_are_written(files, found, capsys):
    measured, again, document = files
    before = [path.read_text() for path in (measured, document)]
    took = 1e6 * Host().call / 2 / 1.25  # on a host twice as fast
    more = {"time_us": f"{took:.0f}", "host_us": f"{1e6 * REFERENCE_PROBE / 2}", "graph": "False"}
    write(again, row_of(64, "naive", **more), row_of(64, "static"))
    main([str(measured), "--again", str(again)])
    told, line = capsys.readouterr().out, rf"\| qwen3 \| 64 \| naive \| {took:.0f} \| \d+ \| 1.25 \|"
    assert "replaced: NVIDIA H200 2 qwen3 128 64 naive\nnew: NVIDIA H200 2 qwen3 128 64 static\n" in told
    assert re.search(line, told) and before == [path.read_text() for path in (measured, document)]
    main([str(measured), "--again", str(again), "--write", str(document)])
    text = document.read_text()
    assert (
        "old" not in text
        and re.search(line, text)
        and "| qwen3 | 64 | static | 1000 |" in text
        and "tp-width" not in text
    )
    assert all(found[name] in text for name in found if name not in ("calls", "furthest"))
    assert [(row["way"], row["host_us"] != "") for row in read(measured)] == [
        ("naive", True),
        ("static", False),
        ("tp-width", False),
    ]


def test_without_rows_the_csv_stays(files):
    measured, _, document = files
    before = as_csv([row_of(1024, "naive"), row_of(64, "naive")])
    measured.write_text(before)
    main([str(measured), "--write", str(document)])
    assert measured.read_text() == before and "old" not in document.read_text()


@pytest.mark.parametrize("other", [{"device": "NVIDIA H100"}, {"ranks": "4"}, {"experts_in_all": "64"}])
def test_rows_that_the_table_does_not_tell_apart_are_refused(files, other):
    measured, again, document = files
    before = [path.read_text() for path in (measured, document)]
    write(again, row_of(64, "naive", **other))
    with pytest.raises(ValueError, match="does not tell apart"):
        main([str(measured), "--again", str(again), "--write", str(document)])
    assert before == [path.read_text() for path in (measured, document)]


@pytest.mark.parametrize(
    "text", ["nothing", "<!-- a -->1", "<!-- a -->1<!-- end of a --> <!-- a -->1<!-- end of a -->"]
)
def test_a_table_has_one_place(text):
    with pytest.raises(ValueError, match="not one place for a"):
        replaced(text, {"a": "2"})
