"""AOTInductor on a GPU: a package of generated Triton kernels, also for counts its kernels were not scheduled for."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.support.exporting import Logits, Routed, called_ops, export, package, program_ops, source
from tests.support.models import WIDE, build_model, token_ids
from tests.support.oracle import assert_oracle_ratio

ONE_REGEX = """
#include <regex>
extern "C" bool matches() { return std::regex_match("cuda:0", std::regex("(cpu|cuda)(:([0-9]+))?")); }
"""


@pytest.fixture(scope="module")
def loadable(tmp_path_factory):
    """Skips where what g++ builds dies beside torch at the regular expression that every package begins with."""
    if not (gxx := shutil.which(os.environ.get("CXX", "g++"))):
        pytest.skip("AOTInductor needs a C++ compiler")
    source_path = tmp_path_factory.mktemp("regex") / "regex.cpp"
    source_path.write_text(ONE_REGEX)
    built = source_path.with_suffix(".so")
    subprocess.run([gxx, "-std=c++17", "-shared", "-fPIC", str(source_path), "-o", str(built)], check=True)
    call = f"import ctypes, torch; assert ctypes.CDLL({str(built)!r}).matches()"
    died = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    if died.returncode < 0:
        pytest.skip(
            "no package loads with this libstdc++: set LD_PRELOAD to what `g++ -print-file-name=libstdc++.so.6` says"
        )
    assert died.returncode == 0, died.stderr


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo", "loadable")]
ONE_LAYER = dataclasses.replace(WIDE, layers=1)
TOKENS = (1, 2, 7, 64, 513, 2048)
STAGES = ("moe_route", "moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine")


class Residual(torch.nn.Module):
    """The MoE half of a decoder layer: norm, block, residual."""

    def __init__(self, layer):
        super().__init__()
        self.norm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, hidden_1TH):
        return hidden_1TH + self.mlp(self.norm(hidden_1TH))


def build(family, whole=False):
    """The half of a layer, or the model, in bf16, and in fp64 with transformers' own loop over experts."""
    model = build_model(family, ONE_LAYER, dtype=torch.bfloat16, device="cuda")
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    return [Routed(Logits(one) if whole else Residual(one.model.layers[0])) for one in (model, exact)]


def hidden(tokens):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(1, tokens, WIDE.hidden, generator=generator).to("cuda", torch.bfloat16)


def packaged(module, example, path):
    program = export(module, example, dim=1)
    assert program_ops(program)["moe_expert_up"] == 1
    packed = package(program, path)
    text = source(packed)
    assert called_ops(packed) == {}  # none runs its own kernel: all are generated
    assert all(stage in text for stage in STAGES)
    return torch._inductor.aoti_load_package(str(packed))


def check(run, model, exact, given):
    """By the ratio rule, on the tokens that all three sent to the same experts; the same bits every time."""
    wide = given.double() if given.is_floating_point() else given
    with torch.no_grad():
        (ours, *ids), (eager, *eager_ids), (oracle, *oracle_ids) = run(given), model(given), exact(wide)
        assert torch.equal(run(given)[0], ours), "not the same bits"
    alike = torch.stack([(other == oracle_ids[0]).all(-1) for other in (ids[0], eager_ids[0])]).all(0)
    assert alike.sum() > 0.5 * alike.numel() - 1, f"{alike.sum()} of {alike.numel()} tokens routed alike"
    if alike.any():
        assert_oracle_ratio(ours[0, alike], eager[0, alike], oracle[0, alike], what=f"{given.shape[1]} tokens")


@pytest.mark.slow
@pytest.mark.parametrize("example", [8, 2048])  # kernels for few rows and for many, descriptors where there are any
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_blocks(family, example, tmp_path):
    model, exact = build(family)
    run = packaged(model, hidden(example), tmp_path / "block.pt2")
    for tokens in TOKENS:
        check(run, model, exact, hidden(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_models(family, tmp_path):
    model, exact = build(family, whole=True)
    run = packaged(model, token_ids(model.module.model, 1, 64), tmp_path / "model.pt2")
    for tokens in TOKENS:
        check(run, model, exact, token_ids(model.module.model, 1, tokens, seed=tokens))


@pytest.mark.slow
def test_kernels_that_wait_for_the_one_before(tmp_path):
    """`enable_pdl` with a launcher that launches nothing early: the waits in the kernels are over at once."""
    model, exact = build("qwen3_moe")
    with torch._inductor.config.patch({"triton.enable_pdl": True}):
        run = packaged(model, hidden(64), tmp_path / "early.pt2")
    for tokens in TOKENS:
        check(run, model, exact, hidden(tokens))
