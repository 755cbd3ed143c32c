"""A few of the random models of `tests.support.fuzz`, and that it sees what is wrong with a pass.

`python -m tests.support.fuzz` runs a thousand.
"""

import dataclasses
import runpy

import pytest
import torch

from lowering.graph import pipeline
from lowering.graph.dataflow import aten
from lowering.report import collect
from tests.support.fuzz.check import check
from tests.support.fuzz.draw import Block, Form, draw
from tests.support.fuzz.shrink import shrunk
from tests.support.fuzz.source import write
from tests.support.graphs import stop_at_lowerings

moe = torch.ops.diffulex
PLAIN = Form(1, (Block(),))


@pytest.mark.parametrize("seed", range(1000, 1010))
def test_seeds(seed):
    result = check(draw(seed))
    assert not result.problem, f"{result.problem}\n{result.text}"


def test_a_seed_is_a_program():
    assert write(draw(3)) == write(draw(3)) != write(draw(4))


def test_what_is_drawn_reaches_the_passes():
    """Spines and routers that are rewritten, and such as are not."""
    result = check(PLAIN)
    assert not result.problem
    found = {decision.subject: decision.reason for decision in result.decisions}
    assert {found[name] for name in ("spine_pass", "route_pass", "activation_pass")} == {None}
    for name, change in (("route_pass", {"router": "squared"}), ("spine_pass", {"steps": ("index_add",)})):
        result = check(Form(1, (dataclasses.replace(Block(), **change),)))
        assert not result.problem
        assert {decision.subject: decision.reason for decision in result.decisions}[name] is not None


def broken(monkeypatch, name, change):
    """The pass, followed by a change of its result."""
    whole = pipeline._PASSES[name]

    def run(graph):
        whole(graph)
        for node in graph.nodes:
            change(graph, node)

    monkeypatch.setitem(pipeline._PASSES, name, run)


def other_act(graph, node):
    if node.target is moe.moe_expert_up.default and len(node.args) > 6:
        node.args = (*node.args[:6], node.args[6].replace("silu", "gelu"), *node.args[7:])


def other_bias(graph, node):
    if node.target is moe.moe_route.default:
        node.args = (node.args[0], None, *node.args[2:])


def other_order(graph, node):
    if node.target is moe.moe_combine.default:
        with graph.inserting_before(node):
            turned = graph.call_function(aten.flip.default, (node.args[1], [1]))
        node.args = (node.args[0], turned)


BREAKS = {
    "activation_pass": (other_act, Block()),
    "route_pass": (other_bias, dataclasses.replace(Block(), router_bias=True)),
    "spine_pass": (other_order, Block()),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_pass_is_seen_and_the_program_made_small(name, monkeypatch):
    change, block = BREAKS[name]
    form = Form(1, (dataclasses.replace(block, pre_norm="rms", shared="gated"),))
    assert not check(form).problem
    broken(monkeypatch, name, change)
    result = check(form)
    assert "error over" in result.problem
    small = shrunk(result, inductor=False)
    assert "error over" in small.problem and small.form.blocks == (block,)


def test_a_program_that_is_printed_runs(tmp_path, monkeypatch, capsys):
    """By itself, with what `torch.compile` does by default."""
    stop_at_lowerings(monkeypatch)
    torch._dynamo.reset()
    file = tmp_path / "program.py"
    file.write_text(write(PLAIN, ((0, 1, 2), (4, 5, 6))))
    with collect() as decisions:
        runpy.run_path(str(file), run_name="__main__")
    assert {"moe_expert_up", "moe_expert_down"} <= {decision.subject for decision in decisions}
    lines = [line.split(" ", 1) for line in capsys.readouterr().out.splitlines()]
    assert [count for count, _ in lines] == ["3", "3"] and all(float(error[1:-1]) < 1e-4 for _, error in lines)
