"""The benchmark of layers over several ranks, on two gloo processes: it runs, checks what it times, and adds up."""

import csv
import dataclasses

import pytest
import torch

from benchmarks.bench_parallel import COLUMNS, table, verdict
from benchmarks.parallel_cells import WAYS, Options, cells, shape_of
from diffulex.moe import NaiveFusedMoE
from tests.support import rank_cases
from tests.support.moe_layers import SPECS, widened
from tests.support.ranks import running

OPTIONS = Options(("tiny",), (5,), ("static", "parts", "naive", "tp-width"), device="cpu")


@pytest.fixture(scope="module")
def pair():
    with running(2) as group:
        yield group


def test_every_way_is_checked_and_timed(pair, tmp_path):
    options = dataclasses.replace(OPTIONS, out=str(tmp_path / "parallel.csv"))
    rows, others = pair.run(rank_cases.run_bench, options)
    ways = ["parts", "static", "naive", "tp-width"]
    assert [row["way"] for row in rows] == ways and len(others) == 4
    with open(options.out, newline="") as file:
        assert [row["way"] for row in csv.DictReader(file)] == ways
    for row in rows:
        assert set(row) <= {*COLUMNS}
        times = {part: float(row.get(f"{part}_us", 0)) for part in ("one", "time", "dispatch", "experts", "combine")}
        whole = sum(times[part] for part in ("dispatch", "experts", "combine"))
        share = 1 if row["way"] == "tp-width" else 2
        assert float(row["gain"]) == pytest.approx(share * times["one"] / times["time"], abs=2e-3)
        assert float(row["overlap"]) == pytest.approx(whole / times["time"], abs=2e-3)
        assert float(row["share"]) == pytest.approx(1 - times["experts"] / whole, abs=2e-3)
        assert ("pair_us" in row) == (row["way"] in ("static", "parts"))
        assert "bitwise" in row["check"] or row["way"] in ("parts", "tp-width")
    assert len({row["one_us"] for row in rows}) == 1
    assert rows[0]["dispatch_us"] == rows[1]["dispatch_us"] and rows[0]["combine_us"] != rows[1]["combine_us"]
    assert "pair_us" not in table(rows) and len(table(rows).splitlines()) == 4


def test_no_cell_begins_that_would_take_too_long(pair, tmp_path):
    options = dataclasses.replace(OPTIONS, out=str(tmp_path / "parallel.csv"), seconds=-1)
    assert pair.run(rank_cases.run_bench, options) == [[], []]


def test_wrong_results_stop_the_run():
    layer = NaiveFusedMoE(widened(SPECS["qwen3"], hidden=32, width=16), dtype=torch.bfloat16).requires_grad_(False)
    inputs = (torch.randn(9, 32).bfloat16(), torch.rand(9, 2), torch.randint(0, 8, (9, 2)))
    found = layer.run_experts(*inputs)
    assert verdict(found, found, whole=layer, inputs=inputs) == "bitwise"
    assert verdict(found, -found, whole=layer, inputs=inputs).endswith("x eager")
    with pytest.raises(RuntimeError, match="wrong result"):
        verdict(found * 1.1, found, whole=layer, inputs=inputs)


def test_what_is_asked_for_comes_first():
    options = dataclasses.replace(OPTIONS, shapes=("qwen3", "dsv3"), tokens=(16384, 64, 1024), ways=tuple(WAYS))
    order = cells(options)
    assert len(order) == len({*order}) == 36
    assert [way for _, tokens, way in order[:6] if tokens == 16384] == ["parts", "sums", "static"] * 2
    assert order[6:8] == [("qwen3", 64, "static"), ("dsv3", 64, "static")]
    assert order[8] == ("qwen3", 16384, "naive") and order[-1][1] == 1024


def test_shapes_and_ways():
    assert shape_of("dsv3", dataclasses.replace(OPTIONS, experts=256)).num_experts == 256
    assert shape_of("qwen3", dataclasses.replace(OPTIONS, experts=256)).num_experts == 128
    assert set(WAYS) == {"naive", "static", "sums", "parts", "tp-experts", "tp-width"}
