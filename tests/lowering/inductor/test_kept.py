"""Decisions are kept with the compiled graphs of Inductor's caches, told again on a warm start, logged and traced."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor.utils import fresh_cache

import diffulex  # noqa: F401  installs what is tested
from lowering.errors import Reason, ReasonCode
from lowering.inductor import kept
from lowering.report import Cost, Decision, collect, decisions_from_json, decisions_to_json, record, take_decisions
from tests.support.two_layers import Model

ROOT = Path(__file__).resolve().parents[3]
STAGES = ["moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine"]

# Every operation of this graph is a call of one of our ops or of an ATen kernel: no C++ has to be compiled.
SCRIPT = """
import diffulex, json, torch
from torch._dynamo.utils import counters
from lowering.report import collect
from tests.support.two_layers import Model

model = Model().eval()
with torch.no_grad(), collect() as decisions:
    torch.compile(model)(*model.inputs)
told = [[d.stage, d.subject, d.layer, d.outcome, str(d.reason), d.replayed] for d in decisions]
found = {name: counters["inductor"].get(f"fxgraph_cache_{name}", 0) for name in ("hit", "miss")}
print(json.dumps({"told": told, "aot_hit": counters["aot_autograd"].get("autograd_cache_hit", 0), **found}))
"""


def start(folder, name, **environment):
    """What one process that compiles the model says, what it logs, and where it leaves its trace."""
    trace = folder / f"trace-{name}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCH_LOGS": "+diffulex",
        "TORCH_TRACE": str(trace),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr, trace


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """A cold and a warm start."""
    folder = tmp_path_factory.mktemp("starts")
    return start(folder, "cold"), start(folder, "warm")


@pytest.mark.slow
def test_a_warm_start_has_the_decisions_of_the_cold_one(starts):
    (cold, _, _), (warm, _, _) = starts
    assert (cold["hit"], cold["miss"]) == (0, 1)
    assert (warm["hit"], warm["miss"], warm["aot_hit"]) == (1, 0, 1)
    assert [told[:-1] for told in warm["told"]] == [told[:-1] for told in cold["told"]]
    assert {told[-1] for told in cold["told"]} == {False}
    assert {told[-1] for told in warm["told"]} == {True}
    lowered = {(told[1], told[2]) for told in warm["told"] if told[0] == "lower"}
    assert lowered == {(stage, f"layers.{layer}.experts") for layer in (0, 1) for stage in STAGES}


@pytest.mark.slow
def test_torch_logs_shows_decisions_once(starts):
    """`import torch` imports what TORCH_LOGS names, which here is in the middle of importing torch."""
    for (said, log, _), mark in zip(starts, ("", ", from the cache"), strict=True):
        line = f"] [0/0] lower moe_combine layers.1.experts: the op's own kernel (NOT_CUDA: device cpu){mark}\n"
        assert log.count(line) == 1, log
        assert log.count("layers.1.experts: ") == sum(told[2] == "layers.1.experts" for told in said["told"])


def artifacts(folder):
    """The reports in a structured trace, as tlparse finds them: a line of metadata, then the indented payload."""
    (file,) = folder.iterdir()
    lines = file.read_text().splitlines()
    found = []
    for number, line in enumerate(lines):
        _, _, head = line.partition("] {")
        if not line.startswith("V") or json.loads("{" + head).get("artifact", {}).get("name") != kept.ARTIFACT:
            continue
        payload = []
        for following in lines[number + 1 :]:
            if not following.startswith("\t"):
                break
            payload.append(following[1:])
        found.append((json.loads("{" + head), json.loads("\n".join(payload))))
    return found


@pytest.mark.slow
def test_the_structured_trace_has_a_report_for_each_graph(starts):
    for (said, _, trace), replayed in zip(starts, (False, True), strict=True):
        ((head, payload),) = artifacts(trace)
        assert head["artifact"] == {"name": "diffulex_report", "encoding": "json"}
        assert (head["frame_id"], head["frame_compile_id"]) == (0, 0)  # where tlparse files it
        assert payload["replayed"] is replayed
        assert [d["subject"] for d in payload["decisions"]] == [told[1] for told in said["told"]]


# In this process


def compiled(model, *, train=False):
    """The decisions of one compilation, with what the caches hold."""
    torch._dynamo.reset()
    model.train(train)
    with collect() as decisions, torch.set_grad_enabled(train):
        out = torch.compile(model)(*model.inputs)
        if train:
            out.sum().backward()
    return decisions


@pytest.fixture(autouse=True)
def _empty_caches():
    with fresh_cache():
        counters.clear()
        yield
    torch._dynamo.reset()


def test_forward_and_backward_keep_their_own():
    model = Model()
    cold, warm = compiled(model, train=True), compiled(model, train=True)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert sum(decision.subject == "moe_expert_grad_weight" for decision in cold) == 4

    def sorted_texts(decisions):
        return sorted(map(str, (decisions_to_json([decision]) for decision in decisions)))

    assert sorted_texts(warm) == sorted_texts(cold)
    assert {decision.replayed for decision in warm} == {True}


@pytest.mark.parametrize(("bundled", "replayed_passes"), [(True, True), (None, False)], ids=["bundled", "no_autograd"])
def test_other_caches_of_graphs(bundled, replayed_passes):
    """Where AOTAutograd's cache holds the code itself, and where it is off, so that the passes run again."""
    options = {"enable_autograd_cache": False} if bundled is None else {"bundled_autograd_cache": bundled}
    model = Model()
    with functorch_config.patch(options):
        cold, warm = compiled(model), compiled(model)
    assert warm == cold
    assert [d.replayed for d in warm] == [d.stage != "recognise" or replayed_passes for d in cold]


def test_caches_that_are_carried_elsewhere():
    model = Model()
    cold = compiled(model)
    artifacts, _ = torch.compiler.save_cache_artifacts()
    with fresh_cache():
        torch.compiler.load_cache_artifacts(artifacts)
        warm = compiled(model)
    assert warm == cold and {decision.replayed for decision in warm} == {True}


def test_an_entry_of_another_layer_takes_the_names_that_the_passes_saw():
    """Two graphs that differ in the names of their modules alone have one entry; the passes run for both."""
    decisions = compiled(Model(breaks=True))
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    told = [(d.stage, d.subject, d.layer) for d in decisions]
    assert len(told) == len(set(told)), "a decision of the passes is told twice"
    lowered = [(d.subject, d.layer, d.replayed) for d in decisions if d.stage == "lower"]
    assert lowered == [(stage, f"layers.{layer}.experts", layer == 1) for layer in (0, 1) for stage in STAGES]


@pytest.mark.parametrize(
    "text",
    [
        "",
        decisions_to_json([Decision("lower", "moe_combine", "", "done")])[:-5],
        '{"stage": "lower"}',
        "[[1]]",
        '[{"stage": "lower", "subject": "a", "layer": "b", "outcome": 1}]',
        '[{"stage": "lower", "subject": "a", "layer": "b", "outcome": "c", "reason": {"code": "NEW", "detail": ""}}]',
        '[{"stage": "lower", "subject": "a", "layer": "b", "outcome": "c", "reason": "?"}]',
        '[{"stage": "lower", "subject": "a", "layer": "b", "outcome": "c", "cost": 1}]',
        '[{"stage": "lower", "subject": "a", "layer": "b", "outcome": "c", "cost": {"rows": 1}}]',
        "[" * 100_000,
        b"\xff",
        7,
    ],
)
def test_what_cannot_be_read_is_warned_about_once(text, monkeypatch, caplog):
    kept._warn_once.cache_clear()
    monkeypatch.setattr(kept, "decisions_to_json", lambda decisions: text)
    model = Model()
    compiled(model)
    with caplog.at_level(logging.WARNING, logger="diffulex"):
        assert compiled(model) == []
        assert compiled(model) == []
    assert counters["inductor"]["fxgraph_cache_hit"] == 2
    (message,) = [record.getMessage() for record in caplog.records if record.name == "diffulex"]
    assert "cannot be read" in message


TOLD = (
    Decision("lower", "moe_expert_up", "layers.0", "triton", cost=Cost("H100", 8, 1e9, 2e9, 300.5, 400.25)),
    Decision("lower", "moe_combine", "layers.0", "own", Reason(ReasonCode.DTYPE, "torch.float64")),
)


def replayed(text, caplog):
    """What is told of such an entry, and the warnings."""
    kept._warn_once.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diffulex"), collect() as decisions:
        kept._replay(text, ())
    return decisions, len(caplog.records)


def test_entries_cut_off_anywhere(caplog):
    text = decisions_to_json(TOLD)
    for index in range(64):
        assert replayed(text[: index * (len(text) - 1) // 63], caplog) == ([], 1)
    assert len(replayed(text, caplog)[0]) == len(TOLD)


def test_entries_with_any_bit_flipped(caplog):
    """Other words, or none and a warning: a report without a checksum, which nothing is computed by."""
    text = decisions_to_json(TOLD)
    warned = 0
    for index in range(96):
        place = index * (len(text) - 1) // 95
        decisions, warnings = replayed(
            text[:place] + chr(ord(text[place]) ^ 1 << index % 7) + text[place + 1 :], caplog
        )
        assert (len(decisions), warnings) in ((len(TOLD), 0), (0, 1))
        warned += warnings
    assert warned > 20


def test_an_entry_without_decisions_is_no_problem(caplog):
    """A graph with no experts."""
    for _ in range(2):
        torch._dynamo.reset()
        with collect() as decisions, torch.no_grad():
            torch.compile(lambda x: x @ x)(torch.ones(2, 2))
        assert decisions == []
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    assert "diffulex" not in {record.name for record in caplog.records}


def test_decisions_of_a_graph_that_failed_are_not_kept_with_the_next():
    record("lower", "moe_combine", layer="of a graph that was never made", outcome="")
    model = Model()
    compiled(model)
    assert "of a graph that was never made" not in {decision.layer for decision in compiled(model)}


@pytest.mark.parametrize("module", [SimpleNamespace(), SimpleNamespace(CompiledFxGraph=object)])
def test_another_inductor_compiles_without_it(module, caplog):
    kept.keep_decisions(module)
    assert "on a warm start no decisions are told" in caplog.text


def test_decisions_as_text():
    decisions = (
        Decision("lower", "moe_route", 'a "quoted" ünïcode', "triton", Reason(ReasonCode.LAYOUT, "strides (1, 2)")),
        Decision("plan", "row_ranges", "", ""),
        Decision("lower", "moe_expert_up", "", "triton", cost=Cost("H100", 8, 1e9, 2e9, 300.5, 400.25)),
    )
    assert decisions_from_json(decisions_to_json(decisions)) == decisions


def test_what_waits_does_not_grow_without_end():
    for _ in range(20_000):
        record("lower", "a", layer="", outcome="")
    assert len(take_decisions()) < 20_000
    assert take_decisions() == ()
