"""`python -m diffulex bench` end to end on a CPU, and what it refuses."""

import argparse
import csv
import dataclasses
import json
import re
import sys
from xml.etree import ElementTree as ET

import pytest
import torch

from diffulex.benching import ceilings, cells, peers
from diffulex.benching.peers import PEERS
from diffulex.cli import bench
from diffulex.cli.main import main

NAMES = ["diffulex", "eager", "grouped_mm", "batched_mm"]
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The arguments of a run that takes a moment, with ceilings that are measured in one."""
    monkeypatch.setattr(ceilings, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(ceilings, "_READ_BYTES", {"cpu": 1 << 16})
    folder = tmp_path / "Tiny-Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return ["bench", "--device", "cpu", "--config", str(folder)]


def rows_of(file):
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def add_peer(monkeypatch, **fields):
    """One more peer on the CPU: grouped_mm but for the fields."""
    (grouped,) = [peer for peer in PEERS if peer.name == "grouped_mm"]
    monkeypatch.setattr(peers, "PEERS", (*PEERS, dataclasses.replace(grouped, **fields)))
    return grouped


@pytest.mark.parametrize("source", ["topk", "logits"])
def test_a_run_with_all_it_writes(source, tiny, tmp_path, capsys):
    table, picture = tmp_path / "out.csv", tmp_path / "out.svg"
    argv = [*tiny, "--tokens", "1", "70", "--from", source, "--out", str(table), "--picture", str(picture)]
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert f"fp32, from {source}, routing uniform; ceilings: " in shown.out and "cells: " in shown.err
    assert re.search(r"^ceilings after the cells: \d+.* [TGM]?FLOP/s, .*B/s$", shown.out, re.MULTILINE)
    header, _, first, second = [line.split() for line in shown.out.splitlines()][2:6]
    assert header[:8] == ["layer", "tokens", "floor", "dense", *NAMES] and header[-1] == "floor/diffulex"
    assert (first[:2], second[:2]) == (["Tiny-Model", "1"], ["Tiny-Model", "70"]) and len(first) == 4 + 4 + 3 + 1
    rows = rows_of(table)
    assert [(row["tokens"], row["peer"]) for row in rows] == [
        (tokens, name) for tokens in ("1", "70") for name in NAMES
    ]
    for row in rows:
        assert (row["E"], row["K"], row["H"], row["I"]) == ("8", "2", "64", "32")
        assert (row["layer"], row["dtype"], row["from"], row["routing"]) == ("Tiny-Model", "fp32", source, "uniform")
        assert row["outcome"] == "timed" and row["detail"] == "" and 0 < float(row["relative_error"]) < 1e-5
        flop, moved = float(row["flop"]), float(row["bytes"])
        assert flop == pytest.approx(6 * int(row["tokens"]) * 2 * 64 * 32, rel=1e-5)
        floor = 1e6 * max(flop / float(row["matrix_rate"]), moved / float(row["read_rate"]))
        assert float(row["floor_us"]) == pytest.approx(floor, rel=1e-2)
        assert float(row["us"]) > 0 and float(row["mean_ratio"]) <= 10
    ratio = float(rows[1]["us"]) / float(rows[0]["us"])
    assert float(first[8]) == pytest.approx(ratio, abs=0.01 + 0.01 * ratio)
    tree = ET.parse(picture).getroot()
    marks = [one for one in tree.iter() if one.get("class", "").startswith("mark")]
    assert len(marks) == len(rows)


def test_a_wrong_peer_fails_the_run_and_has_no_time(tiny, tmp_path, capsys, monkeypatch):
    def slightly_off(layer, source):
        runner = grouped.build(layer, source)
        return dataclasses.replace(runner, run=lambda *arguments: runner.run(*arguments) * 1.0001)

    grouped = add_peer(monkeypatch, name="off", build=slightly_off)
    table, picture = tmp_path / "out.csv", tmp_path / "out.svg"
    argv = [*tiny, "--tokens", "64", "--peers", "diffulex", "off", "--out", str(table), "--picture", str(picture)]
    assert main(argv) == 1
    shown = capsys.readouterr().out
    assert "Tiny-Model, 64 tokens, off: wrong, mean error over 10.0 x eager's" in shown
    right, wrong = rows_of(table)
    assert (right["outcome"], wrong["outcome"], wrong["us"]) == ("timed", "wrong", "") and float(right["us"]) > 0
    assert "mean error" in wrong["detail"] and float(wrong["mean_ratio"]) > 10
    assert picture.read_text().count('class="mark ') == 1


def test_what_does_not_run_is_told_and_is_no_failure(tiny, capsys, monkeypatch):
    monkeypatch.setattr(peers, "MOST_GATHERED_BYTES", 0)
    assert main([*tiny, "--tokens", "3", "--peers", "eager", "batched_mm", "--routing", "zipf"]) == 0
    shown = capsys.readouterr().out
    assert "Tiny-Model, 3 tokens, batched_mm: skipped, MEMORY: gathers" in shown and "routing zipf" in shown


def test_an_optional_peer_is_left_out_aloud_and_refused_when_asked_for(tiny, capsys, monkeypatch):
    (vllm,) = [peer for peer in PEERS if peer.name == "vllm"]
    monkeypatch.setitem(sys.modules, "vllm", None)
    add_peer(monkeypatch, name="vllm", absent=vllm.absent)
    assert main([*tiny, "--tokens", "1"]) == 0
    assert "left out: vllm, ABSENT: [MOE006]" in capsys.readouterr().out
    assert main([*tiny, "--tokens", "1", "--peers", "vllm"]) == 2
    shown = capsys.readouterr()
    assert "error: [MOE006] --peers vllm: expected a peer that runs here, got ABSENT" in shown.err
    assert "layer" not in shown.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--peers", "no_such"],
            "[MOE005] --peers: expected peers on cpu: diffulex, eager, grouped_mm, batched_mm, got",
        ),
        (["--tokens", "8", "0"], "[MOE004] --tokens: expected at least 1, got 0"),
        (["--alone", "-1"], "[MOE004] --alone: expected 0 or more seconds, got -1.0"),
        (["--out", "/no/such/folder/out.csv"], "[MOE005] --out: expected a file that can be written"),
        (["--picture", "/no/such/folder/out.svg"], "[MOE005] --picture: expected a file that can be written"),
        (["--config", "/no/such/folder"], "[MOE005] --config: expected a config.json or the folder that holds one"),
    ],
)
def test_values_without_a_meaning_are_refused(argv, message, tiny, capsys):
    assert main([*tiny, *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asking_for_a_device_that_is_not_there(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "--device: expected a CUDA device" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(bench, "memory", lambda device: 10**9)
    assert main(["bench", "--device", "cpu", "--shapes", "mixtral", "--dtype", "bf16"]) == 2
    shown = capsys.readouterr()
    assert "[MOE006] bench mixtral: expected weights that fit into 1.0 GB of memory on cpu, got 2.8 GB" in shown.err
    assert shown.out == ""


def test_an_interruption_shows_what_was_measured(tiny, tmp_path, capsys, monkeypatch):
    kept, table = cells.measure_cell, tmp_path / "out.csv"

    def measure_cell(layer, tokens, **given):
        if tokens == 2:
            raise KeyboardInterrupt
        return kept(layer, tokens, **given)

    monkeypatch.setattr(cells, "measure_cell", measure_cell)
    assert main([*tiny, "--tokens", "1", "2", "--peers", "eager", "--out", str(table)]) == 130
    assert "Tiny-Model       1" in capsys.readouterr().out and len(rows_of(table)) == 1


def test_what_is_measured_by_default():
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    args = parser.parse_args(["bench"])
    assert (args.source, args.routing, args.peers, args.dtype, args.tokens) == ("topk", "uniform", None, None, None)
    names = [[case.name for case in bench._cases(args, torch.device(kind))] for kind in ("cuda", "cpu")]
    assert names == [["qwen3", "mixtral", "dsv3", "llada2"], ["cpu-small", "cpu-wide"]]
