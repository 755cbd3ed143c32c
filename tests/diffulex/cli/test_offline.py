"""Names of generated kernels. The demo's own test generates and compiles them."""

import pytest
import torch

from diffulex.cli import offline
from lowering.errors import Reason

LONG = "triton_red_fused__to_copy__unsafe_view_add_embedding_mean_moe_combine_mul_pow_rsqrt_view_13"


def test_short_names_keep_their_stage_and_number():
    assert offline.shorten("triton_tem_fused_moe_route_9") == "triton_tem_fused_moe_route_9"
    short = offline.shorten(LONG)
    assert len(short) <= 56 and "..moe_combine.." in short and short.endswith("_13")
    assert len(offline.shorten(LONG.replace("moe_combine", "mul"))) <= 56


def test_kernels_of_moe_layers_are_told_by_their_names():
    assert offline.is_moe_kernel(LONG) and offline.is_moe_kernel("triton_tem_fused_9")
    assert not offline.is_moe_kernel("triton_per_fused__to_copy_add_embedding_mean_mul_pow_rsqrt_0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device to refuse")
def test_a_real_device_is_a_reason_to_skip(tmp_path):
    assert isinstance(offline.compile_offline(None, tmp_path, tokens=1, verbose=False), Reason)
