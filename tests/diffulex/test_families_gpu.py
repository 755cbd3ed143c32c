"""The same promise on a GPU: generated Triton in every layer, few kernels, CUDA graphs, no host sync."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import diffulex
from lowering.schedule.plan import MAX_RANGES
from tests.diffulex.test_families import first_output, fp64_copy, logits
from tests.support.models import FAMILIES, WIDE, build_model, token_ids
from tests.support.oracle import assert_oracle_ratio
from tests.support.profile import gpu_kernels
from tests.support.routing import RoutingRecorder, routed_alike

pytestmark = pytest.mark.gpu
ONE_LAYER = dataclasses.replace(WIDE, layers=1)
TWO_LAYERS = dataclasses.replace(WIDE, layers=2)
TOKENS = (1, 2, 7, 64, 129, 512)
MAX_KERNELS = 7  # one for each of the five stages; two are left for the router's product, a library call


def build(family: str, sizes: Any = ONE_LAYER) -> Any:
    return build_model(family, sizes, dtype=torch.bfloat16, device="cuda")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_triton_in_every_layer(family: str) -> None:
    model = build(family, TWO_LAYERS)
    ids = token_ids(model, 1, 64)
    report = diffulex.explain(model, ids, use_cache=False)
    assert report.all_captured, str(report)
    assert all(layer.backend == "generated Triton" for layer in report.layers), str(report)
    assert (report.graphs, report.breaks) == (1, 0)


def moe_block(model: Any) -> Any:
    return model.model.layers[0].mlp


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_per_layer(family: str, tokens: int) -> None:
    """Kernels of one MoE block, from the router's product to the combined output, counted by the profiler."""
    block = moe_block(build(family))

    hidden = torch.randn(1, tokens, WIDE.hidden, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    kernels = gpu_kernels(lambda: first_output(compiled, hidden))
    print(family, tokens, sum(kernels.values()), dict(kernels))
    assert sum(kernels.values()) <= MAX_KERNELS, kernels


@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_rule(family: str) -> None:
    """One layer, so that a token's routing touches its own logits only; tokens of one choice are compared."""
    models = {"ours": build(family), "eager": build(family)}
    models["oracle"] = fp64_copy(models["eager"])
    recorders = {name: RoutingRecorder(model) for name, model in models.items()}
    runs = {**models, "ours": torch.compile(models["ours"])}
    flips, compared = collections.Counter(), 0
    counters.clear()
    for count in TOKENS:
        ids = token_ids(models["eager"], 1, count, seed=count)
        out = {name: logits(run, ids)[0] for name, run in runs.items()}
        alike = routed_alike(*recorders.values())
        for name in ("ours", "eager"):
            flips[name] += int((~routed_alike(recorders[name], recorders["oracle"])).sum())
        compared += int(alike.sum())
        ours, eager, oracle = (out[name][alike] for name in ("ours", "eager", "oracle"))
        assert_oracle_ratio(ours, eager, oracle, what=f"{count} tokens")
    print(family, "routed otherwise than in fp64:", dict(flips), "of", sum(TOKENS))
    assert compared > sum(TOKENS) / 2
    assert flips["ours"] <= 1.5 * flips["eager"] + 4
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 3 + MAX_RANGES - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_block_ratio_rule(family: str) -> None:
    """The MoE block alone sees the same input in all runs; every token counts."""
    model = build(family)
    block, oracle = moe_block(model), moe_block(fp64_copy(model))
    compiled = torch.compile(block)
    for count in (0, *TOKENS):
        generator = torch.Generator().manual_seed(count)
        hidden = torch.randn(1, count, WIDE.hidden, generator=generator).to("cuda", torch.bfloat16)
        outputs = [first_output(run, hidden) for run in (compiled, block)]
        assert_oracle_ratio(*outputs, first_output(oracle, hidden.double()), what=f"{count} tokens")


@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs_capture(family: str) -> None:
    """The whole model is captured; the values are those of one block, where every token counts."""
    model = build(family)
    block, oracle = moe_block(model), moe_block(fp64_copy(model))
    compiled = torch.compile(model, mode="reduce-overhead")
    compiled_block = torch.compile(block, mode="reduce-overhead")
    counters.clear()
    for count in (7, 64):
        ids = token_ids(model, 1, count)
        generator = torch.Generator().manual_seed(count)
        hidden = torch.randn(1, count, WIDE.hidden, generator=generator).to("cuda", torch.bfloat16)
        for _ in range(3):
            out, out_of_block = logits(compiled, ids).clone(), first_output(compiled_block, hidden).clone()
        assert torch.isfinite(out).all()
        expected = first_output(oracle, hidden.double())
        assert_oracle_ratio(out_of_block, first_output(block, hidden), expected, what=f"{count} tokens")
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_no_host_sync(family: str) -> None:
    model = build(family)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    batches = [token_ids(model, 1, count) for count in (64, 65, 1000)]
    for ids in batches:
        logits(compiled, ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for ids in batches:
            logits(compiled, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_same_bits_every_run() -> None:
    model = build("qwen3_moe")
    compiled = torch.compile(model)
    ids = token_ids(model, 1, 129)
    first = logits(compiled, ids)
    assert all(torch.equal(first, logits(compiled, ids)) for _ in range(20))


def test_training_step_matches_eager() -> None:
    model = build("qwen3_moe").train()
    ids = token_ids(model, 1, 129)
    grads = {}
    for name, function in (("eager", model), ("compiled", torch.compile(model))):
        model.zero_grad()
        function(ids, labels=ids, use_cache=False).loss.backward()
        grads[name] = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    oracle = fp64_copy(model)
    oracle.zero_grad()
    oracle(ids, labels=ids, use_cache=False).loss.backward()
    exact = {key: p.grad for key, p in oracle.named_parameters() if p.grad is not None}
    assert grads["compiled"].keys() == grads["eager"].keys() == exact.keys()
    for key, gradient in grads["compiled"].items():
        if "experts" in key:
            assert_oracle_ratio(gradient, grads["eager"][key], exact[key], what=key)
