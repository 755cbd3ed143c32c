"""Beside what else people do to a model: passes, regions, checkpointing, FSDP, adapters, dynamic shapes, threads."""

from __future__ import annotations

import collections
import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.nn.utils import parametrize

import diffulex
from lowering.report import collect
from tests.diffulex.test_families import first_output, fp64_copy, logits
from tests.support.fsdp_case import loss_gradients, sharded_gradients
from tests.support.graphs import Captured
from tests.support.models import FAMILIES, TINY, build_model, token_ids
from tests.support.oracle import assert_oracle_ratio
from tests.support.ranks import running

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("moe_route", "moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine")
LAYERS = 3
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def layers(count):
    return TINY.__class__(layers=count)


def stages(count):
    """The ops of an inference or forward graph with `count` MoE layers."""
    return dict.fromkeys(STAGES, count)


def one_block(family):
    """The MoE block of a model, without gradients, and its fp64 copy that runs transformers' own loop."""
    model = build_model(family, layers(1)).requires_grad_(False)
    return model.model.layers[0].mlp, fp64_copy(model).model.layers[0].mlp


def check_gradients(ours, eager, exact):
    assert ours.keys() == eager.keys() == exact.keys()
    for name, value in ours.items():
        assert_oracle_ratio(value, eager[name], exact[name], what=name)


# Passes


def routers(decisions):
    return [decision.outcome for decision in decisions if decision.subject == "route_pass"]


@pytest.mark.parametrize("where", ["config", "options"])
def test_passes_that_come_later_have_ours_behind_them(where):
    """Inductor was loaded long ago, so the slot was ours: they do not replace us, neither for good nor once."""
    importlib.import_module("torch._inductor.compile_fx")
    seen = collections.Counter()
    slots = {
        name: lambda graph, name=name: seen.update([name])
        for name in ("joint_custom_pre_pass", "post_grad_custom_pre_pass")
    }
    block, exact = one_block("qwen3_moe")
    hidden = torch.randn(1, 9, TINY.hidden)
    patched = torch._inductor.config.patch(force_disable_caches=True, **(slots if where == "config" else {}))
    with patched, collect() as decisions:
        out = first_output(torch.compile(block, options=slots if where == "options" else None), hidden)
    assert set(seen.values()) == {1} and len(seen) == 2
    assert [outcome.split()[0] for outcome in routers(decisions)] == ["moe_route"]
    assert_oracle_ratio(out, first_output(block, hidden), first_output(exact, hidden.double()))


BEFORE = """
import json, sys, torch
import torch._inductor.config as config
from tests.support.models import ModelSizes, build_model
seen = []
config.joint_custom_pre_pass = lambda graph: seen.append("joint")
config.post_grad_custom_pre_pass = lambda graph: seen.append("post")
model = build_model("qwen3_moe", ModelSizes(layers=1)).requires_grad_(False)
block = model.model.layers[0].mlp
compiled = torch.compile(block)
import diffulex
from lowering.report import collect
from tests.diffulex.test_families import fp64_copy
from tests.support.oracle import assert_oracle_ratio
with torch.no_grad(), config.patch(force_disable_caches=True), collect() as decisions:
    torch.compile(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()))(torch.ones(2, 8))
    dense = [len(decisions), *(name for name in sys.modules if name.startswith("lowering.inductor."))]
    hidden = torch.randn(1, 9, 64)
    ours = compiled(hidden)
exact = fp64_copy(model).model.layers[0].mlp
with torch.no_grad():
    assert_oracle_ratio(ours, block(hidden), exact(hidden.double()))
route = [decision.outcome.split()[0] for decision in decisions if decision.subject == "route_pass"]
print(json.dumps([dense, seen, route]))
"""


@pytest.mark.slow
def test_passes_and_models_that_were_there_before_the_import():
    """And a model without experts: no decision is made, and no lowering is loaded for it."""
    code = [sys.executable, "-W", "ignore", "-c", BEFORE]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (decided, *modules), seen, route = json.loads(done.stdout.splitlines()[-1])
    assert decided == 0 and not [name for name in modules if "lowerings" in name]
    assert seen == ["joint", "post"] * 2
    assert route == ["moe_route"]


# Regions


def test_equal_layers_compiled_one_by_one_are_one_graph():
    model = build_model("qwen3_moe", layers(LAYERS))
    ids = token_ids(model, 1, 9)
    eager, exact = logits(model, ids), logits(fp64_copy(model), ids)
    captured = Captured()
    for layer in model.model.layers:
        layer.compile(backend=captured.backend)
    assert_oracle_ratio(logits(model, ids), eager, exact)
    assert captured.graphs == [stages(1)]


@pytest.mark.slow
def test_nested_regions(monkeypatch):
    """Through Inductor, which runs the passes on a region's own graph."""
    model = build_model("qwen3_moe", layers(LAYERS)).requires_grad_(False)
    ids = token_ids(model, 1, 9)
    eager, exact = logits(model, ids), logits(fp64_copy(model), ids)
    kind = type(model.model.layers[0])
    monkeypatch.setattr(kind, "forward", torch.compiler.nested_compile_region(kind.forward))
    with torch._inductor.config.patch(force_disable_caches=True), collect() as decisions:
        ours = logits(torch.compile(model, fullgraph=True), ids)
    assert_oracle_ratio(ours, eager, exact)
    assert routers(decisions) and all(outcome.startswith("moe_route") for outcome in routers(decisions))
    assert {found.subject for found in decisions if found.stage == "lower"} == set(STAGES)


# Training


def test_checkpointed_layers_route_alike_again():
    model = build_model("qwen3_moe", layers(2)).train()
    ids = token_ids(model, 1, 9)
    eager, exact = loss_gradients(model, ids), loss_gradients(fp64_copy(model), ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    captured = Captured()
    ours = loss_gradients(model, ids, call=torch.compile(model, backend=captured.backend))
    check_gradients(ours, eager, exact)
    forward, backward = captured.graphs
    assert forward == stages(2)
    # the layers' forward is run again, the last one's sum of slots excepted, which no gradient needs
    assert {name: backward[name] for name in STAGES[:2]} == {"moe_route": 2, "moe_dispatch": 2}
    assert not counters["graph_break"]


@pytest.mark.slow
def test_sharded_layers_compiled_one_by_one():
    """FSDP2 over two processes: gradients are those of all rows on one, and every layer runs the ops."""
    with running(2) as ranks:
        results = ranks.run(sharded_gradients, 2, 4)
    model = build_model("qwen3_moe", layers(2)).train()
    ids = token_ids(model, 4, 9)
    eager, exact = loss_gradients(model, ids), loss_gradients(fp64_copy(model), ids)
    for ours, (forward, backward) in results:
        check_gradients(ours, eager, exact)
        assert forward == stages(1)
        assert backward["moe_expert_grad_weight"] == 2


class LowRank(nn.Module):
    """A weight [O, I] and what is learned beside it, of rank 4."""

    def __init__(self, weight, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        out, width = weight.shape
        self.up = nn.Parameter(torch.randn(out, 4, generator=generator) / 8)
        self.down = nn.Parameter(torch.randn(4, width, generator=generator) / 8)

    def forward(self, weight):
        return weight + self.up @ self.down


class LowRankLinear(nn.Module):
    """A linear layer and beside it one of rank 4."""

    def __init__(self, linear, seed):
        super().__init__()
        self.linear, self.beside = linear, LowRank(linear.weight, seed)

    def forward(self, x):
        return self.linear(x) + x @ self.beside.down.t() @ self.beside.up.t()


def adapted(model):
    model.requires_grad_(False)
    for index, layer in enumerate(model.model.layers):
        parametrize.register_parametrization(layer.mlp.gate, "weight", LowRank(layer.mlp.gate.weight, index))
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, LowRankLinear(getattr(layer.self_attn, name), index))
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_adapters_on_routers_and_attention(family):
    model = adapted(build_model(family, layers(2)))
    exact, ids, captured = fp64_copy(model), token_ids(model, 1, 9), Captured()
    compiled = torch.compile(model, backend=captured.backend, fullgraph=True)
    assert_oracle_ratio(logits(compiled, ids), logits(model, ids), logits(exact, ids))
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learned) == 2 * 3 * 2 and any("gate" in name for name in learned)
    ours = loss_gradients(model, ids, call=compiled)
    assert ours.keys() == learned
    check_gradients(ours, loss_gradients(model, ids), loss_gradients(exact, ids))
    inference, forward, backward = captured.graphs
    assert inference == forward == stages(2)
    assert "moe_expert_grad_weight" not in backward  # experts are frozen


# Shapes, models, threads


@pytest.mark.parametrize(("dynamic", "most"), [(True, 3), (False, 4)])
def test_what_dynamic_is_set_to(dynamic, most):
    """`None`, the default, is what tests/diffulex/test_families.py has."""
    (block, exact), captured = one_block("deepseek_v3"), Captured()
    compiled = torch.compile(block, backend=captured.backend, dynamic=dynamic, fullgraph=True)
    for tokens in (0, 1, 2, 33):
        hidden = torch.randn(1, tokens, TINY.hidden, generator=torch.Generator().manual_seed(tokens))
        outputs = [first_output(run, hidden) for run in (compiled, block)]
        assert_oracle_ratio(*outputs, first_output(exact, hidden.double()), what=f"{tokens} tokens")
    assert len(captured.graphs) <= most
    assert all(graph["moe_expert_up"] == 1 for graph in captured.graphs)


def test_batch_and_length_are_dynamic_at_once():
    model, captured = build_model("qwen3_moe", layers(1)), Captured()
    exact, compiled = fp64_copy(model), torch.compile(model, backend=captured.backend, fullgraph=True)
    for batch, length in ((2, 5), (3, 7), (4, 33), (8, 2)):
        ids = token_ids(model, batch, length)
        torch._dynamo.mark_dynamic(ids, 0)
        torch._dynamo.mark_dynamic(ids, 1)
        assert_oracle_ratio(logits(compiled, ids), logits(model, ids), logits(exact, ids), what=f"{batch} x {length}")
    assert captured.graphs == [stages(1)]


def test_two_models_in_turn_and_switched_off_in_between():
    models = [build_model(family, layers(1)) for family in ("olmoe", "gpt_oss")]
    captured = Captured()
    runs = [torch.compile(model, backend=captured.backend, fullgraph=True) for model in models]
    ids = token_ids(models[0], 1, 9)
    first = [logits(run, ids) for run in runs]
    for _ in range(2):
        assert all(torch.equal(logits(run, ids), out) for run, out in zip(runs, first, strict=True))
        with diffulex.disabled():
            stock = [logits(run, ids) for run in runs]
        for ours, other in zip(first, stock, strict=True):
            torch.testing.assert_close(ours, other)
    assert captured.graphs == [stages(1)] * 2 + [{}] * 2


@pytest.mark.slow
def test_threads_that_compile_and_run_at_once():
    """Through Inductor, a block of another family in each of four threads, three token counts, twice."""
    blocks, exact = zip(*map(one_block, FAMILIES[:4]), strict=True)
    inputs = [torch.randn(1, tokens, TINY.hidden) for tokens in (3, 9, 3)]
    wanted = [[first_output(block, hidden) for hidden in inputs] for block in blocks]
    start, outputs = threading.Barrier(len(blocks)), {}

    def work(index):
        compiled = torch.compile(blocks[index], dynamic=True)
        start.wait()
        outputs[index] = [first_output(compiled, hidden) for hidden in inputs * 2]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(blocks))]
    with fresh_cache(), collect() as decisions:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(outputs) == list(range(len(blocks)))
    for index, block in enumerate(exact):
        for ours, eager, hidden in zip(outputs[index], wanted[index] * 2, inputs * 2, strict=True):
            assert_oracle_ratio(ours, eager, first_output(block, hidden.double()), what=FAMILIES[index])
    assert {found.subject for found in decisions if found.stage == "lower"} == set(STAGES)
    assert all(outcome.startswith("moe_route") for outcome in routers(decisions))
