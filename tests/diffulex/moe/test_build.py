"""Layers from model configs: transformers' classes, plain objects and dicts; dense layers go to the dense factory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import diffulex.moe
from diffulex.moe import FusedMoE, NaiveFusedMoE, build_mlp_or_moe, build_moe_block, get_moe_spec
from lowering.activation import canonical
from lowering.errors import MoEConfigError, MoEOptionError
from tests.support.families import DEPTH, build_config, installed_cases
from tests.support.models import FAMILIES, TINY, family_config

ROOT = Path(__file__).resolve().parents[3]
SWIGLU = "silu(g) * u"
# family -> MoE layers of six, E, K, H, I, activation, router, width and gate of the shared experts
BUILT = {
    "afmoe": ([1, 2, 3, 4, 5], 64, 6, 2048, 1408, SWIGLU, "sigmoid", 2816, "none"),
    "axk2": ([1, 2, 3, 4, 5], 128, 8, 2048, 512, SWIGLU, "sigmoid", 512, "none"),
    "deepseek_v3": ([3, 4, 5], 256, 8, 7168, 2048, SWIGLU, "sigmoid", 2048, "none"),
    "diffusion_gemma_text": ([0, 1, 2, 3, 4, 5], 8, 2, 2304, 64, "gelu_tanh(g) * u", "softmax", 0, "none"),
    "ernie4_5_moe": ([1, 2, 3, 4, 5], 64, 6, 2560, 1536, SWIGLU, "softmax", 3072, "none"),
    "glm4_moe": ([1, 2, 3, 4, 5], 128, 8, 4096, 1408, SWIGLU, "sigmoid", 1408, "none"),
    "gpt_oss": ([0, 1, 2, 3, 4, 5], 128, 4, 2880, 2880, "swiglu_oai", "softmax", 0, "none"),
    "granitemoehybrid": ([0, 1, 2, 3, 4, 5], 8, 2, 4096, 11008, SWIGLU, "softmax", 1024, "none"),
    "inkling_text": ([0, 1, 2, 3, 4, 5], 256, 6, 6144, 3072, SWIGLU, "sigmoid", 6144, "router"),
    "jamba": ([1, 3, 5], 16, 2, 4096, 14336, SWIGLU, "softmax", 0, "none"),
    "llama4_text": ([0, 1, 2, 3, 4, 5], 16, 1, 5120, 8192, SWIGLU, "sigmoid", 8192, "none"),
    "longcat_flash": ([0, 1, 2], 512, 12, 6144, 2048, SWIGLU, "softmax", 0, "none"),
    "mixtral": ([0, 1, 2, 3, 4, 5], 8, 2, 4096, 14336, SWIGLU, "softmax", 0, "none"),
    "nemotron_h": ([1, 4, 5], 8, 2, 4096, 7688, "square(relu(g))", "sigmoid", 7688, "none"),
    "qwen2_moe": ([0, 1, 2, 3, 4, 5], 60, 4, 2048, 1408, SWIGLU, "softmax", 5632, "sigmoid"),
    "step3p5": ([3, 4, 5], 288, 8, 4096, 1280, SWIGLU, "sigmoid", 1280, "none"),
}


def built_layers(config, depth=DEPTH):
    """Layer index -> MoE layer on the meta device; the dense factory makes the others."""
    layers = [build_mlp_or_moe(config, index, torch.nn.Identity, device="meta") for index in range(depth)]
    return {index: layer for index, layer in enumerate(layers) if not isinstance(layer, torch.nn.Identity)}


@pytest.mark.parametrize("family", BUILT)
def test_families_of_transformers(family):
    case = next((case for case in installed_cases() if case.model_type == family), None)
    if case is None:
        pytest.skip("not in the installed transformers")
    moe, experts, top_k, hidden, width, act, score, shared, gate = BUILT[family]
    config = build_config(case)
    layers = built_layers(config, 3 if family == "longcat_flash" else DEPTH)
    assert list(layers) == moe
    for layer in layers.values():
        spec = layer.spec
        assert isinstance(layer, NaiveFusedMoE)
        assert (layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size) == (
            experts,
            top_k,
            hidden,
            width,
        )
        assert canonical(spec.experts.act) == canonical(act) and spec.routing.score == score
        assert tuple(layer.w2.shape) == (experts, hidden, width)
        assert layer.w13.shape[1] == (2 * width if spec.experts.gated else width)
        found = None if layer.shared_experts is None else layer.shared_experts.down_proj.in_features
        assert (found or 0, spec.shared.gate if spec.shared else "none") == (shared, gate)


def test_a_latent_layer():
    case = next(case for case in installed_cases() if case.model_type == "nemotron_h")
    layer = built_layers(build_config(case, moe_latent_size=256))[1]
    assert (layer.hidden_size, layer.spec.experts.hidden_size) == (4096, 256)
    assert (layer.latent_in.weight.shape, layer.latent_out.weight.shape) == ((256, 4096), (4096, 256))
    assert layer.w13.shape == (8, 7688, 256) and layer.gate.weight.shape == (8, 4096)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_layers_run(family):
    config, _ = family_config(family)
    layer = build_moe_block("naive", config, 1)
    hidden = torch.randn(2, 3, TINY.hidden)
    out, logits = layer(hidden)
    assert out.shape == hidden.shape and out.isfinite().all()
    assert logits.shape == (6, TINY.experts)


PLAIN = {
    "model_type": "sdar_moe",
    "hidden_size": 16,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3],
    "hidden_act": "silu",
}


@pytest.mark.parametrize("kind", [dict, SimpleNamespace], ids=["dict", "object"])
def test_plain_configs(kind):
    config = kind(**PLAIN)
    assert list(built_layers(config, 4)) == [1]
    assert build_moe_block("naive", config, 1)(torch.zeros(3, 16))[0].shape == (3, 16)


def test_layers_of_different_sizes():
    config = {
        **PLAIN,
        "decoder_sparse_step": 1,
        "per_layer_config": {2: {"num_experts": 6, "moe_intermediate_size": 3}},
    }
    sizes = {index: tuple(layer.w2.shape) for index, layer in built_layers(config, 4).items()}
    assert sizes == {0: (4, 16, 8), 1: (4, 16, 8), 2: (6, 16, 3)}


def test_the_dense_factory_is_called_for_dense_layers_alone():
    calls = []
    made = [build_mlp_or_moe(PLAIN, index, lambda: calls.append("dense") or torch.nn.Identity()) for index in range(4)]
    assert len(calls) == 3 and [isinstance(m, FusedMoE) for m in made] == [False, True, False, False]
    assert build_mlp_or_moe({"hidden_size": 16}, 0, dense_factory=lambda: "dense") == "dense"


def test_options():
    layer = build_moe_block("naive", PLAIN, 1, moe_gemm_impl="naive", dtype=torch.bfloat16, device="meta")
    assert (layer.moe_gemm_impl, layer.w13.dtype, layer.w13.device.type) == ("naive", torch.bfloat16, "meta")
    assert build_moe_block("naive", {**PLAIN, "moe_gemm_impl": "naive"}, 1).moe_gemm_impl == "naive"
    wrapped = {"model_type": "wrapper", "moe_gemm_impl": "naive", "text_config": PLAIN}
    assert get_moe_spec(wrapped, 1).moe_gemm_impl == "naive"
    wrapped = {"model_type": "wrapper", "text_config": {**PLAIN, "moe_gemm_impl": "naive"}}
    assert get_moe_spec(wrapped, 1).moe_gemm_impl == "naive"
    assert get_moe_spec({**PLAIN, "moe_gemm_impl": None}, 1).moe_gemm_impl == "triton"
    assert get_moe_spec({**PLAIN, "moe_gemm_impl": "naive"}, 1, moe_gemm_impl="triton").moe_gemm_impl == "triton"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: build_moe_block("ring", PLAIN, 1), MoEOptionError, r"impl in \('naive', 'tp', 'ep'\), got 'ring'"),
        (lambda: build_moe_block("naive", {**PLAIN, "moe_gemm_impl": "x"}, 1), MoEOptionError, "moe_gemm_impl in"),
        (lambda: build_moe_block("naive", {"hidden_size": 16}), MoEConfigError, "num_experts"),
        (lambda: build_moe_block("naive", {**PLAIN, "hidden_act": "mish"}, 1), MoEConfigError, "'mish'"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_every_name_is_there_and_comes_from_its_home():
    for name in diffulex.moe.__all__:
        assert getattr(diffulex.moe, name).__name__ == name
        assert name in dir(diffulex.moe)
    with pytest.raises(AttributeError, match=r"'diffulex\.moe' has no attribute 'nothing'"):
        _ = diffulex.moe.nothing


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import diffulex.moe", ("diffulex.moe.layer", "diffulex.moe.config", "triton")),
        ("from diffulex.moe import build_topk_router", ("diffulex.moe.layer", "triton", "vllm")),
        ("from diffulex.moe import *", ("triton", "vllm", "transformers.modeling_utils")),
    ],
)
def test_names_are_loaded_when_they_are_used(code, absent):
    code += f"\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
