"""Layers under torch.compile and torch.export: one graph, few of them over any token counts, the right values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

import diffulex
from diffulex.moe import metadata
from lowering.settings import Settings
from tests.support.inputs import DEVICES
from tests.support.moe_layers import SPECS, layer_oracle, make_inputs, make_layer, widened
from tests.support.oracle import assert_near_exact, assert_oracle_ratio

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
TOKENS = (0, 1, 2, 7, 64, 129, 512)
STAGES = {"moe_route", "moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine"}


def result_and_gradients(function, layer, inputs):
    hidden_TH = inputs.hidden_TH.clone().requires_grad_()
    out_TH = function(hidden_TH, **inputs.given)[0]
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad} | {"hidden": hidden_TH}
    grads = torch.autograd.grad(out_TH.square().sum(), list(named.values()), allow_unused=True)
    return {"out": out_TH.detach()} | {n: g for n, g in zip(named, grads, strict=True) if g is not None}


@pytest.mark.parametrize("name", SPECS)
def test_at_most_three_graphs_over_token_counts(name):
    """Through AOTAutograd without code generation, every form; `fullgraph` raises at a break."""
    layer = make_layer(SPECS[name])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for tokens in TOKENS:
        inputs = make_inputs(SPECS[name], tokens, seed=tokens)
        with torch.no_grad():
            out_TH = compiled(inputs.hidden_TH, **inputs.given)[0]
            assert_near_exact(out_TH, layer(inputs.hidden_TH, **inputs.given)[0], what=f"{tokens} tokens")
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("name", ["deepseek_v3", "inkling", "weight_on_input", "longcat", "nemotron_h"])
def test_training_in_at_most_three_graphs(name):
    layer = make_layer(SPECS[name]).train()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for tokens in TOKENS:
        inputs = make_inputs(SPECS[name], tokens, seed=tokens)
        found, wanted = (result_and_gradients(f, layer, inputs) for f in (compiled, layer))
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            assert_near_exact(value, wanted[key], what=f"{key}, {tokens} tokens")
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", SPECS)
def test_a_dynamic_graph_is_made_once(name, train):
    """What a spec says is no input of it, whose value an op would ask for when all is compiled, and again then."""
    layer, graphs = make_layer(SPECS[name]).train(train), []

    def counting(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layer, backend=counting, fullgraph=True, dynamic=True)
    for tokens in (5, 9, 2):
        inputs = make_inputs(SPECS[name], tokens, seed=tokens)
        with torch.set_grad_enabled(train):
            compiled(inputs.hidden_TH, **inputs.given)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["qwen2_moe", "inkling"])
def test_inductor_over_token_counts(name, train):
    """Generated code on the CPU, bf16, by the ratio rule."""
    spec = widened(SPECS[name])
    layer = make_layer(spec, dtype=torch.bfloat16).train(train)
    compiled = torch.compile(layer, fullgraph=True)
    for tokens in TOKENS:
        inputs = make_inputs(spec, tokens, seed=tokens).to(torch.bfloat16)
        with torch.set_grad_enabled(train):
            ours, eager = (f(inputs.hidden_TH, **inputs.given)[0].detach() for f in (compiled, layer))
        with torch.no_grad():
            logits = layer(inputs.hidden_TH)[1]
            ids = layer.route(inputs.hidden_TH).ids[:, : layer.top_k].contiguous()
            given = {"router_logits": logits.double(), "topk_ids": ids}
            oracle_inputs = type(inputs)(inputs.hidden_TH.double(), given)
            assert_oracle_ratio(ours, eager, layer_oracle(layer, oracle_inputs)[0], what=f"{tokens} tokens")
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.fixture(scope="module")
def generated():
    """A layer, and what Inductor makes of it for the CPU."""
    layer = make_layer(SPECS["qwen2_moe"])
    return layer, torch.compile(layer, fullgraph=True)


@pytest.mark.slow
@given(st.integers(2, 70), st.integers(0, 999))
def test_compiled_equals_eager(generated, tokens, seed):
    """In one graph, whose number of tokens is a symbol from the first call on."""
    inputs = make_inputs(SPECS["qwen2_moe"], tokens, seed=seed)
    torch._dynamo.mark_dynamic(inputs.hidden_TH, 0)
    with torch.no_grad():
        found, wanted = (function(inputs.hidden_TH, **inputs.given) for function in reversed(generated))
    assert_near_exact(found[0], wanted[0])
    assert_near_exact(found[1], wanted[1], what="logits")


def test_debug_mode_does_not_break_the_graph(monkeypatch):
    monkeypatch.setattr(metadata, "SETTINGS", Settings(debug=True))
    compiled = torch.compile(make_layer(SPECS["mixtral"]), backend="aot_eager", fullgraph=True)
    for tokens in TOKENS:
        compiled(make_inputs(SPECS["mixtral"], tokens).hidden_TH)
    assert counters["stats"]["unique_graphs"] <= 3


def test_jitter_is_captured_in_training():
    layer = make_layer(SPECS["dbrx"]).train()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    hidden = make_inputs(SPECS["dbrx"], 5).hidden_TH
    assert not torch.equal(compiled(hidden)[1], compiled(hidden)[1])


def test_the_naive_loop_stays_out_of_the_graph():
    layer, inputs = make_layer(SPECS["mixtral"], "naive"), make_inputs(SPECS["mixtral"], 5)
    with torch.no_grad():
        out_TH = torch.compile(layer, backend="aot_eager")(inputs.hidden_TH)[0]
        assert_near_exact(out_TH, layer(inputs.hidden_TH)[0])
    assert counters["graph_break"]


@pytest.mark.parametrize("name", ["deepseek_v3", "inkling", "llama4", "gemma4"])
def test_exports_with_symbolic_tokens(name):
    layer, inputs = make_layer(SPECS[name]), make_inputs(SPECS[name], 5)
    tokens = torch.export.Dim("tokens", min=0, max=4096)
    program = torch.export.export(layer, (inputs.hidden_TH,), dynamic_shapes={"hidden_states": {0: tokens}})
    called = {str(n.target).split(".")[1] for n in program.graph.nodes if str(n.target).startswith("diffulex.")}
    assert called == STAGES
    for count in (0, 1, 33):
        hidden = make_inputs(SPECS[name], count).hidden_TH
        with torch.no_grad():
            assert_near_exact(program.module()(hidden)[0], layer(hidden)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["deepseek_v3", "longcat", "weight_on_input"])
def test_explain_sees_the_layer(name, device):
    spec = widened(SPECS[name])
    layer, inputs = make_layer(spec, dtype=torch.bfloat16).to(device), make_inputs(spec, 9).to(torch.bfloat16)
    report = diffulex.explain(torch.nn.Sequential(layer), inputs.hidden_TH.to(device))
    assert report.all_captured, str(report)
    assert (report.graphs, report.breaks, len(report.layers)) == (1, 0, 1)
    assert report.layers[0].backend == ("generated Triton" if device == "cuda" else "the ops' own kernels")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_generated_kernels(name):
    """Every form on the GPU, bf16, compiled; ids are given, so that a near tie sends no token elsewhere."""
    spec = widened(SPECS[name])
    layer = make_layer(spec, dtype=torch.bfloat16).cuda()
    compiled = torch.compile(layer, fullgraph=True)
    for tokens, draws in ((0, 1), (1, 32), (33, 1), (129, 1)):  # a ratio of mean errors needs more than one token
        results = []
        for seed in range(draws):
            inputs = make_inputs(spec, tokens, seed=seed, given=("router_logits", "topk_ids")).to(torch.bfloat16)
            inputs = inputs.to("cuda")
            with torch.no_grad():
                ours, eager = (f(inputs.hidden_TH, **inputs.given)[0].cpu() for f in (compiled, layer))
                results.append((ours, eager, layer_oracle(layer, inputs.to(torch.float64))[0]))
        ours, eager, wanted = (torch.cat(one) for one in zip(*results, strict=True))
        assert_oracle_ratio(ours, eager, wanted, what=f"{tokens} tokens")
