"""Names of generated kernels. The demo's own test generates and compiles them."""

import argparse

import pytest
import torch

from diffulex.cli import demo, offline
from lowering.errors import Reason
from lowering.inductor.offline import OfflineCode, OfflineKernel

LONG = "triton_red_fused__to_copy__unsafe_view_add_embedding_mean_moe_combine_mul_pow_rsqrt_view_13"


def test_short_names_keep_their_stage_and_number():
    assert offline.shorten("triton_tem_fused_moe_route_9") == "triton_tem_fused_moe_route_9"
    short = offline.shorten(LONG)
    assert len(short) <= 56 and "..moe_combine.." in short and short.endswith("_13")
    assert len(offline.shorten(LONG.replace("moe_combine", "mul"))) <= 56


def test_kernels_of_moe_layers_are_told_by_their_names():
    assert offline.is_moe_kernel(LONG) and offline.is_moe_kernel("triton_tem_fused_9")
    assert not offline.is_moe_kernel("triton_per_fused__to_copy_add_embedding_mean_mul_pow_rsqrt_0")


def made_up(monkeypatch, *, source=None):
    """Code of two kernels, of which Triton compiles the first alone; or an error instead of code."""
    names = ("triton_tem_fused_moe_route_1", "triton_tem_fused_moe_dispatch_2")
    code = OfflineCode("wrapper", tuple(OfflineKernel(name, name) for name in names), names, (), ())

    def offline_source(*_args, **_options):
        if source is not None:
            raise source
        return code

    def compile_kernels(code):
        if "dispatch" in code.kernels[0].name:
            raise RuntimeError("at 3:5: tl.store\nmore")
        return ()

    monkeypatch.setattr(offline, "fake_refusal", lambda: None)
    monkeypatch.setattr(offline, "_one_layer", lambda config: torch.nn.Linear(1, 1))
    monkeypatch.setattr(offline, "offline_source", offline_source)
    monkeypatch.setattr(offline, "compile_kernels", compile_kernels)


def checks_of_the_demo(tmp_path):
    return demo._offline(argparse.Namespace(output=tmp_path, tokens=[8], verbose=False), None)


def test_a_kernel_that_does_not_compile_is_a_failed_check(monkeypatch, tmp_path):
    made_up(monkeypatch)
    (check,) = checks_of_the_demo(tmp_path)
    assert check.problem == "triton_tem_fused_moe_dispatch_2 does not compile: RuntimeError: at 3:5: tl.store"


def test_code_that_is_not_generated_is_a_failed_check(monkeypatch, tmp_path, capsys):
    made_up(monkeypatch, source=ValueError("no choices"))
    (check,) = checks_of_the_demo(tmp_path)
    assert check.problem == "no source: ValueError: no choices"
    assert "Traceback" in capsys.readouterr().err


def test_only_what_was_written_is_removed(monkeypatch, tmp_path):
    made_up(monkeypatch)
    folder = tmp_path / "sm_90"
    folder.mkdir()
    for name in ("triton_tem_fused_moe_route_0.py", "mine.py"):
        (folder / name).write_text("")
    checks_of_the_demo(tmp_path)
    kernels = {"triton_tem_fused_moe_route_1.py", "triton_tem_fused_moe_dispatch_2.py"}
    assert {path.name for path in folder.iterdir()} == {"mine.py", "wrapper.py", *kernels}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device to refuse")
def test_a_real_device_is_a_reason_to_skip(tmp_path):
    assert isinstance(offline.compile_offline(None, tmp_path, tokens=1, verbose=False), Reason)
