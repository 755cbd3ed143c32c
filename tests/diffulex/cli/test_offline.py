"""Names of generated kernels, and the MoE layer compiled for sm_90 without a GPU."""

import pytest

from diffulex.cli import offline
from diffulex.cli.demo import PRESETS, build_config
from lowering.errors import Reason
from lowering.inductor.fake_device import fake_refusal

LONG = "triton_red_fused__to_copy__unsafe_view_add_embedding_mean_moe_combine_mul_pow_rsqrt_view_13"


def test_short_names_keep_their_stage_and_number():
    assert offline.shorten("triton_tem_fused_moe_route_9") == "triton_tem_fused_moe_route_9"
    short = offline.shorten(LONG)
    assert len(short) <= 56 and "..moe_combine.." in short and short.endswith("_13")
    assert len(offline.shorten(LONG.replace("moe_combine", "mul"))) <= 56


def test_kernels_of_moe_layers_are_told_by_their_names():
    assert offline.is_moe_kernel(LONG) and offline.is_moe_kernel("triton_tem_fused_9")
    assert not offline.is_moe_kernel("triton_per_fused__to_copy_add_embedding_mean_mul_pow_rsqrt_0")


@pytest.mark.slow
@pytest.mark.skipif(fake_refusal() is not None, reason="a GPU cannot be faked here")
def test_one_layer_is_written_and_compiled_for_sm_90(tmp_path):
    old = tmp_path / "old.py"
    old.touch()
    facts = offline.compile_offline(build_config(PRESETS["tiny"], 2), tmp_path, tokens=512, verbose=False)
    assert not isinstance(facts, Reason) and facts.refusals == ()
    table = str(facts)
    for stage in ("moe_route", "moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine"):
        assert stage in table
    assert len(list(tmp_path.glob("triton_*.py"))) == len(facts.kernels) >= 5
    assert "async_compile.triton" in (tmp_path / "wrapper.py").read_text() and not old.exists()
