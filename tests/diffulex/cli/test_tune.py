"""`python -m diffulex tune`: what it lists, refuses, prints and keeps, with made-up times."""

import contextlib
import csv
import json
import logging

import pytest
import torch
from torch._inductor.utils import fresh_cache

from diffulex.cli import tune
from diffulex.cli.main import build_parser, main
from diffulex.tuning import measure
from diffulex.tuning.cells import cells_of
from lowering.report import collect
from lowering.schedule import storage
from lowering.schedule.device import H100, device_spec
from lowering.schedule.plan import exact_schedule
from tests.support.blocks import Block
from tests.support.inputs import BlockForm
from tests.support.tuned import FakeMeasure, tuned_folder

CONFIG = {"model_type": "qwen3_moe", "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8,
          "num_experts_per_tok": 2, "hidden_act": "silu"}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "Tiny-Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    with tuned_folder(tmp_path) as folder:
        yield folder


def test_a_dry_run_lists_cells_and_counts(model, capsys):
    assert main(["tune", model, "mixtral", "--shapes", "olmoe", "--tokens", "1", "64", "--dry-run", "--best", "5"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "nothing is timed" in shown[0] and len(shown) == 3 + 3 * 2 * 2
    names = {line.split(" up,")[0] for line in shown if " up," in line}
    assert names == {"olmoe", "Tiny-Model", "mixtral"}
    assert all(5 <= int(line.split()[5]) <= 8 for line in shown[3:])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "tune: expected a model, or --shapes out of qwen3"),
        (["no_such"], "or a model type of transformers, got 'no_such'"),
        (["qwen3"], "or a model type of transformers, got 'qwen3'. For example"),
        (["--shapes", "qwen3", "--tokens", "0"], "--tokens: expected at least 1, got 0"),
        (["--shapes", "qwen3", "--best", "-1"], "--best: expected at least 0, got -1"),
        (["--shapes", "qwen3", "--seconds", "nan"], "--seconds: expected at least 0, got nan"),
        (["/"], "a config.json or the folder that holds one"),
    ],
)
def test_what_is_refused(argv, message, capsys):
    code = main(["tune", *argv])
    shown = capsys.readouterr()
    if argv == ["qwen3"]:  # a dense model type that transformers knows
        assert code == 2 and "MOE007" in shown.err
        return
    assert code == 2 and message in shown.err and not shown.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(model, capsys):
    assert main(["tune", model]) == 2
    assert (
        "error: [MOE003] tune: expected a CUDA device with generated kernels, got NOT_CUDA" in capsys.readouterr().err
    )


def run(model, *argv, measure=None):
    """`run_cells` as `run` calls it; returns the exit code and the cells."""
    args = build_parser().parse_args(["tune", model, "--tokens", "1", "64", "--best", "4", *argv])
    cells = cells_of(tune._cases(args), args.tokens, dtype=torch.bfloat16)
    return tune.run_cells(args, cells, device=H100, measure=measure or FakeMeasure(H100)), cells


def test_times_are_told_written_and_kept(model, folder, tmp_path, capsys):
    table = tmp_path / "times.csv"
    code, cells = run(model, "--csv", str(table))
    shown = capsys.readouterr()
    assert code == 0 and len(cells) == 4
    for part in ("down, 64 tokens (128 rows): ", "planned from now on: +", "saved for H100: the times of 4 cells"):
        assert part in shown.out
    assert "tuning: " in shown.err
    rows = list(csv.DictReader(table.open()))
    saved = storage.load(storage.key_of(H100))
    assert len(rows) == sum(len(times) for gemm in saved.values() for times in gemm.values()) >= 16
    for cell in cells:
        times = saved[cell.gemm][cell.rows]
        assert exact_schedule(cell.rows, cell.gemm, device=H100) == min(times, key=times.get)


@pytest.mark.parametrize("law", ["uniform", "zipf"])
def test_the_routing_asked_for_is_timed_and_told(law, model, folder, capsys, monkeypatch):
    @contextlib.contextmanager
    def on_gpu(most_shared, *, routing):
        asked.append((most_shared, routing))
        yield FakeMeasure(H100)

    asked = []
    monkeypatch.setattr(measure, "on_gpu", on_gpu)
    monkeypatch.setattr(tune, "device_spec", lambda: H100)
    monkeypatch.setattr(tune.env, "generation_refusal", lambda: None)
    monkeypatch.setattr(tune.env, "summary", lambda device: "a GPU")
    assert main(["tune", model, "--tokens", "8", "--best", "1", *(["--routing", law] if law == "zipf" else [])]) == 0
    assert asked == [(H100.shared_memory, law)]
    assert f"a GPU, bf16, routing {law}" in capsys.readouterr().out


def test_nothing_is_kept_unasked(model, folder, capsys):
    assert run(model, "--no-save")[0] == 0
    assert "saved" not in capsys.readouterr().out and not folder.exists()


def test_what_cannot_be_kept_is_said_and_is_a_failure(model, folder, capsys, caplog):
    folder.write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="diffulex"):
        assert run(model)[0] == 1
    assert "not saved, STORAGE: " in capsys.readouterr().out


class Ending(FakeMeasure):
    """Ends in the second cell."""

    def __init__(self, error):
        super().__init__(H100)
        self.error = error

    def time(self, cell, schedules):
        if len(self.timed) == 1:
            raise self.error
        return super().time(cell, schedules)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("device lost")], ids=["interrupted", "broken"])
def test_what_was_timed_before_an_end_is_told_and_kept(error, model, folder, capsys):
    with pytest.raises(type(error)):
        run(model, measure=Ending(error))
    shown = capsys.readouterr().out
    assert "not timed: Tiny-Model down, 1 tokens, " in shown and "the times of 1 cells" in shown
    assert len(storage.load(storage.key_of(H100))) == 1


def test_a_cell_without_times_is_a_failure(model, folder, capsys):
    class Full(FakeMeasure):
        def time(self, cell, schedules):
            raise torch.OutOfMemoryError("CUDA out of memory. 1")

    assert run(model, measure=Full(H100))[0] == 1
    assert "no schedule has a time" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu(model, folder, tmp_path, capsys):
    """Kernels compiled by other processes, checked, timed and kept, and a compiled graph that goes by the times."""
    table = tmp_path / "times.csv"
    assert main(["tune", model, "--tokens", "1", "64", "--best", "4", "--csv", str(table)]) == 0, capsys.readouterr()
    device = device_spec()
    cells = cells_of(tune._cases(build_parser().parse_args(["tune", model])), [1, 64], dtype=torch.bfloat16)
    saved = storage.load(storage.key_of(device))
    for cell in cells:
        times = saved[cell.gemm][cell.rows]
        assert exact_schedule(cell.rows, cell.gemm, device=device) == min(times, key=times.get)
        assert len(times) >= 4 and all(1e-7 < seconds < 1e-2 for seconds in times.values())
    assert len(list(csv.DictReader(table.open()))) == sum(len(saved[cell.gemm][cell.rows]) for cell in cells)
    block = Block(BlockForm(tokens=64, experts=8, top_k=2, hidden=64, width=32, dtype=torch.bfloat16))
    with torch.no_grad(), collect() as decisions, fresh_cache(dir=str(tmp_path / "fresh")):
        torch.compile(block, fullgraph=True)(*[t.cuda() for t in block.inputs()])
    told = {decision.outcome for decision in decisions if decision.subject == "schedules"}
    assert told == {"from times measured on this device at 2, 128 rows"}
