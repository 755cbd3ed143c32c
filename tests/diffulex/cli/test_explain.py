"""`python -m diffulex explain`: the models it builds."""

import json

import pytest
import torch

from diffulex.cli import explain
from diffulex.cli.main import main
from diffulex.explanation import find_experts

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


@pytest.mark.slow
def test_the_report_is_printed_as_json(capsys):
    assert main(["explain", "qwen3_moe", "--layers", "1", "--tokens", "5", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["graphs"] == 1 and report["breaks"] == 0
    assert [layer["captured"] for layer in report["layers"]] == [True]
