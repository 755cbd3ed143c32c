"""The whole demo, small."""

import pytest

from diffulex.cli.main import main
from lowering.inductor.fake_device import fake_refusal

TITLES = ("== Model ==", "error against fp64", "== Compilation ==", "== diffulex.explain ==", "== Checks ==")


@pytest.mark.slow
def test_the_demo_runs_and_holds_its_checks(tmp_path, capsys):
    argv = ["demo", "--layers", "1", "--train-seconds", "2", "--tokens", "0", "2", "9", "--device", "cpu"]
    code = main([*argv, "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert "FAILED" not in shown and all(title in shown for title in TITLES)
    assert "stock eager cannot run the model on 0 tokens" in shown
    assert (tmp_path / "model" / "model.safetensors").is_file()
    if fake_refusal() is None:
        for stage in ("moe_route", "moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine"):
            assert stage in shown.partition("== Triton source")[2]
        assert len(list((tmp_path / "sm_90").glob("triton_*.py"))) >= 5
        assert "async_compile.triton" in (tmp_path / "sm_90" / "wrapper.py").read_text()
