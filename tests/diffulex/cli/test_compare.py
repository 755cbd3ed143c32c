"""Tasks, continuations and checks, on results that are made up."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from diffulex.cli import compare, measure
from diffulex.cli.accuracy import Oracle
from diffulex.cli.report import Comparison
from lowering.errors import Reason, ReasonCode
from lowering.report import Decision
from lowering.state import is_enabled
from tests.support.models import ModelSizes, build_model, token_ids

EXPERTS = "model.layers.0.mlp.experts"
STAGES = ("moe_route", "moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine")


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3_moe", ModelSizes(vocab=264, layers=1))


@pytest.fixture(scope="module")
def task(model):
    ids_N = token_ids(model, 1, 200)[0]
    return compare.make_task(model, ids_N, counts=[0, 3, 128], compared=12, length=5, prompt="Alice")


def result(variant, *, continuation=(1, 2, 3, 4, 5), graphs=2, breaks=(), outputs=None, stages=STAGES):
    reason = Reason(ReasonCode.NOT_CUDA)
    layer = {"moe_route": EXPERTS.replace("experts", "gate")}
    decisions = tuple(Decision("lower", op, layer.get(op, EXPERTS), "the op's own kernel", reason) for op in stages)
    counts = measure.DynamoCounts(graphs, breaks, graphs - 1)
    return compare.Result(variant, outputs or {}, list(continuation), counts, 1.0, {3: 1.5}, None, decisions)


def comparison(model, task, ours, *, references=None):
    references = references or {}
    outputs = {tokens: [t.float() for t in known.outputs] for tokens, known in references.items()}
    eager, stock = result(compare.EAGER, outputs=outputs), result(compare.STOCK, outputs=outputs)
    return Comparison(model, task, (eager, stock, ours), references, Oracle(model))


def problems(model, task, ours, **options):
    return {check.name: check.problem for check in comparison(model, task, ours, **options).checks() if check.problem}


def test_counts_that_the_stock_model_refuses_run_on_a_block(task):
    empty, some, many = task.cases
    assert "Error" in empty.refusal and [t.shape for t in empty.inputs] == [(1, 0, 64)]
    assert not some.refusal and [t.shape for t in some.inputs] == [(1, 3)] * 4
    assert [t.shape for t in many.inputs] == [(1, 128)]


def test_kernels_are_counted_as_each_variant_runs(model, monkeypatch):
    """On the block of the model, compiled or not, with the ops or without; on a CPU there are none."""
    seen = []

    def count(block, given):
        seen.append((getattr(block, "_orig_mod", block), hasattr(block, "_orig_mod"), is_enabled()))
        return len(seen)

    monkeypatch.setattr(compare, "_block_kernels", count)
    variants = [result(variant) for variant in (compare.EAGER, compare.STOCK, compare.OURS)]
    assert compare.with_kernels(variants, model) == variants
    block = compare.moe_block(model)
    monkeypatch.setattr(compare, "moe_block", lambda given: block)
    on_cuda = SimpleNamespace(device=torch.device("cuda"))
    assert [found.kernels for found in compare.with_kernels(variants, on_cuda)] == [1, 2, 3]
    assert seen == [(block, False, False), (block, True, False), (block, True, True)]


def test_all_variants_run_the_same_task(model, task):
    eager = compare.run_variant(compare.EAGER, model, task=task)
    assert [t.shape for t in eager.outputs[0]] == [(1, 0, 64)] and [t.shape for t in eager.outputs[3]] == [
        (1, 3, 264)
    ] * 4
    assert len(eager.continuation) == 5 and eager.counts.graphs == 0 and eager.kernels is None
    assert eager.milliseconds.keys() == {3, 128} and eager.decisions == ()
    references = compare.run_oracle(Oracle(model), model, task=task)
    assert [mask.shape for mask in references[3].compared] == [(3,)] * 4
    assert sum(int(mask.sum()) for mask in references[128].compared) > 120
    ratios = compare.accuracy(eager, eager, references=references)
    assert str(ratios[0]) == "empty" and not any(ratio.problem for ratio in ratios.values())
    assert ratios[3].mean == pytest.approx(1, abs=0.01)


def test_tokens_of_which_none_is_compared_break_the_rule(model):
    unclear = compare.Reference((torch.zeros(1, 3, 264).double(),), (torch.zeros(3, dtype=torch.bool),))
    outputs = {3: [torch.zeros(1, 3, 264)]}
    eager, ours = result(compare.EAGER, outputs=outputs), result(compare.OURS, outputs=outputs)
    assert "no token is compared" in compare.accuracy(ours, eager, references={3: unclear})[3].problem


def test_continuation_takes_the_most_likely_token_of_the_growing_text():
    def count_up(input_ids, use_cache):
        assert not use_cache
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids + 1, 50).float())

    assert compare.continue_greedily(count_up, torch.tensor([[3, 7]]), length=4) == [8, 9, 10, 11]


def test_a_block_that_was_compiled_alone_is_the_models(model, task):
    """Its decisions name what they are about without the layers around the block."""
    alone = result(compare.OURS)
    decisions = tuple(
        dataclasses.replace(decision, layer=decision.layer.removeprefix("model.layers.0.mlp."))
        for decision in alone.decisions
    )
    alone = dataclasses.replace(alone, decisions=decisions)
    report = comparison(model, task, alone).explanation
    assert [(layer.name, len(layer.stages)) for layer in report.layers] == [(EXPERTS, 5)]
    assert report.unattributed == ()


def test_everything_holds(model, task):
    assert problems(model, task, result(compare.OURS)) == {}


def test_everything_is_shown(model, task):
    references = compare.run_oracle(Oracle(model), model, task=task)
    outputs = {tokens: [t.float() for t in known.outputs] for tokens, known in references.items()}
    shown = comparison(model, task, result(compare.OURS, outputs=outputs), references=references).text()
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line[:1].isdigit()}
    assert rows["0"][1:5] == ["MoE", "block", "*", "0/0"] and rows["3"][1:3] == ["model", "12/12"]
    assert rows["3"][-1] == "1.50" and rows["128"][-1] == "-"
    assert "stock eager cannot run the model on 0 tokens" in shown and "'Alice" in shown
    assert "5 ops" in shown and f"{EXPERTS}: captured" in shown


def test_every_broken_promise_is_a_failed_check(model, task):
    breaks = (("call to print", 2),)
    ours = result(compare.OURS, graphs=4, breaks=breaks, stages=STAGES[:2])
    found = problems(model, task, ours)
    assert found.keys() == {"every MoE layer captured", "no graph breaks", "at most 3 graphs"}
    assert EXPERTS in found["every MoE layer captured"] and "call to print" in found["no graph breaks"]


def test_a_wrong_output_is_a_failed_check(model, task):
    exact = torch.randn(1, 3, 264, dtype=torch.float64)
    wrong = exact.float()
    wrong[:, 1] += 1e-3
    ours = result(compare.OURS, outputs={3: [wrong]})
    for clear, message in (([True, True, False], "3 tokens: mean error"), ([True, False, True], None)):
        known = {3: compare.Reference((exact,), (torch.tensor(clear),))}
        found = problems(model, task, ours, references=known).get("fp64 ratio rule at every token count")
        assert found is message or found.startswith(message)


def test_another_continuation_is_a_failed_check_unless_it_is_a_tie(model, task):
    with torch.no_grad():
        best = compare.logits(model, task.prompt)[0, -1].argsort(descending=True).tolist()
    eager = result(compare.EAGER, continuation=(best[0], 0, 0, 0, 0))
    ours = result(compare.OURS, continuation=(best[-1], 0, 0, 0, 0))
    other = Comparison(model, task, (eager, eager, ours), {}, Oracle(model))
    assert other.continuation(ours) == ("differs at byte 1", False)
    assert any(check.problem == "differs at byte 1" for check in other.checks())
    model.lm_head.weight.data[best[-1]] = model.lm_head.weight.data[best[0]]
    tied = Comparison(model, task, (eager, eager, ours), {}, Oracle(model))
    assert tied.continuation(ours) == ("tie at byte 1", True)
