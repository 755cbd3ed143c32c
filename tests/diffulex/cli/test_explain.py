"""`python -m diffulex explain`: the models it builds."""

import contextlib
import json

import pytest
import torch

from diffulex.cli import explain
from diffulex.cli.main import main
from diffulex.explanation import find_experts
from lowering.errors import MoEConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_a_family_is_built_small_by_its_name(family):
    model = explain.build_model(explain.load_config(family), CPU)
    assert sum(p.numel() for p in model.parameters()) < 2e6
    assert len(find_experts(model)) == 2
    with torch.no_grad():
        logits = model(input_ids=torch.ones(1, 5, dtype=torch.int64), use_cache=False).logits
    assert logits.shape == (1, 5, 264) and logits.isfinite().all()


def test_a_directory_is_read_and_cut(tmp_path):
    written = explain.load_config("gpt_oss")
    written.save_pretrained(tmp_path)
    read = explain.load_config(str(tmp_path))
    assert read.to_dict() == written.to_dict() | {"_name_or_path": str(tmp_path)}
    cut = explain.load_config(str(tmp_path), layers=1)
    assert cut.num_hidden_layers == 1 and len(cut.layer_types) == 1
    assert cut.hidden_size == written.hidden_size


def test_a_model_without_a_language_head_is_refused(capsys):
    assert main(["explain", "vit"]) == 2
    assert "expected a causal language model, got model type 'vit'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "a config.json that transformers reads"), ('{"model_type": "no_such"}', "no_such"), ("[]", "config.json")],
)
def test_a_config_that_cannot_be_read(content, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    assert main(["explain", str(tmp_path), "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert "error: [MOE007] explain: expected" in shown and message in shown


@pytest.mark.parametrize("family", ["dots1", "dbrx", "lfm2_moe", "gemma4_text", "zaya"])
def test_a_family_that_cannot_be_made_small(family):
    """Either it can, or the error is the catalogue's."""
    pytest.importorskip(f"transformers.models.{family.removesuffix('_text')}")
    with contextlib.suppress(MoEConfigError):
        explain.build_model(explain.load_config(family), CPU)


def test_weights_that_do_not_fit_into_memory(monkeypatch, tmp_path, capsys):
    """Refused before a byte of them is asked for."""
    config = explain.load_config("qwen3_moe")
    config.vocab_size = 10**9
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(explain, "memory", lambda device: 64 * 10**9)
    assert main(["explain", str(tmp_path), "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert "expected weights that fit into 64.0 GB of memory on cpu, got 256." in shown and "--layers" in shown


def test_memory_is_measured():
    assert 10**8 < explain.memory(CPU) < 10**15


@pytest.mark.slow
def test_the_report_is_printed_as_json(capsys):
    assert main(["explain", "qwen3_moe", "--layers", "1", "--tokens", "5", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["graphs"] == 1 and report["breaks"] == 0
    assert [layer["captured"] for layer in report["layers"]] == [True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")
def test_a_page_for_an_h100_that_is_not_there(tmp_path, capsys):
    file = tmp_path / "report.html"
    assert main(["explain", "qwen3_moe", "--layers", "1", "--device", "h100", "--html", str(file)]) == 0
    shown, page = capsys.readouterr().out, file.read_text(encoding="utf-8")
    assert "captured, generated Triton" in shown and "us at 128 rows, floor " in shown
    assert page.startswith("<!DOCTYPE html>") and page.count("<svg") == 1
    assert "us at 128 rows, floor " in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--html", "/dev/null/report.html"], "--html: expected a file that can be written, got /dev/null/report.html"),
        (["--device", "h100", "--measure"], "--measure: expected a device that is there, got --device h100"),
    ],
)
def test_what_cannot_be_had_is_said_before_anything_is_compiled(options, message, monkeypatch, capsys):
    monkeypatch.setattr(explain, "build_model", None)
    assert main(["explain", "qwen3_moe", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_an_h100_would_not_take_in_one_graph(capsys):
    assert main(["explain", "longcat_flash", "--device", "h100"]) == 2
    told = capsys.readouterr().err
    assert "without a graph break" in told and "longcat_flash" in told and "adapt(model)" in told
