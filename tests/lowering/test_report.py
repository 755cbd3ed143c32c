"""Decisions reach every collector that is open, and name the layer they are about."""

import logging
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowering.errors import Reason, ReasonCode
from lowering.report import (
    Cost,
    Decision,
    collect,
    decisions_from_json,
    decisions_to_json,
    layer_of,
    microseconds,
    record,
)
from tests.support.graphs import backend_with, calls


def note(subject, reason=None):
    record("lower", subject, layer="layers.0", outcome="done", reason=reason)


def subjects(decisions):
    return [decision.subject for decision in decisions]


def test_decisions_are_collected_in_order():
    reason = Reason(ReasonCode.DTYPE, "torch.int8")
    with collect() as decisions:
        note("a")
        note("b", reason)
    note("after")
    assert decisions == [
        Decision("lower", "a", "layers.0", "done"),
        Decision("lower", "b", "layers.0", "done", reason),
    ]


def test_collectors_nest():
    with collect() as outer:
        note("a")
        with collect() as inner:
            note("b")
        note("c")
    assert (subjects(outer), subjects(inner)) == (["a", "b", "c"], ["b"])


def test_equal_collectors_are_told_apart():
    """Both hold nothing when the inner one closes: the outer one must stay."""
    with collect() as outer:
        with collect():
            pass
        note("a")
    assert subjects(outer) == ["a"]


def test_a_block_that_raises_is_closed():
    with pytest.raises(ZeroDivisionError), collect() as decisions:
        raise ZeroDivisionError
    note("after")
    assert decisions == []


def test_decisions_of_other_threads_are_collected():
    """Compilations may run in threads; none of their decisions is lost."""
    with collect() as decisions:
        threads = [threading.Thread(target=lambda: [note("a") for _ in range(200)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(decisions) == 1600


def test_decisions_are_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="diffulex"):
        note("moe_combine")
        note("moe_route", Reason(ReasonCode.NOT_CUDA, "device cpu"))
    assert caplog.messages == [
        "lower moe_combine layers.0: done",
        "lower moe_route layers.0: done (NOT_CUDA: device cpu)",
    ]


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("L['self'].model.layers.0.mlp.experts", "model.layers.0.mlp.experts"),
        ("L['self']._modules['model']._modules['layers'][3].mlp", "model.layers.3.mlp"),
        ("L['fn'].experts", "experts"),
        ("L['args'][0].layers.1.mlp", "layers.1.mlp"),
        ("self.layers['2'].mlp", "layers.2.mlp"),
        ("L['self']", ""),
    ],
)
def test_layer_of_paths_that_dynamo_writes(path, layer):
    node = SimpleNamespace(meta={"nn_module_stack": {"outer": ("L['self']", object), "inner": (path, object)}})
    assert layer_of(node) == layer


@pytest.mark.parametrize("meta", [{}, {"nn_module_stack": None}, {"nn_module_stack": {}}])
def test_layer_of_a_node_without_modules(meta):
    assert layer_of(SimpleNamespace(meta=meta)) == ""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"act": nn.Tanh()}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer["act"](x)
        return x


@pytest.mark.parametrize("train", [False, True], ids=["inference", "joint"])
def test_layer_of_real_graphs(train):
    layers = []
    backend = backend_with(
        lambda graph: layers.extend(layer_of(node) for node in calls(graph, torch.ops.aten.tanh.default))
    )
    torch._dynamo.reset()
    torch.compile(Block(), backend=backend)(torch.ones(2, requires_grad=train))
    assert layers == ["layers.0.act", "layers.1.act"]


def test_microseconds():
    assert [microseconds(value) for value in (1766.2, 267.4, 99.94, 5.484, 0.0123)] == [
        *("1766 us", "267 us", "99.9 us", "5.48 us", "0.0123 us"),
    ]


@pytest.mark.parametrize(("usual_us", "told"), [(None, ""), (5.0, ", 5 us by the schedule for these rows")])
def test_what_the_schedule_for_the_rows_would_take(usual_us, told):
    cost = Cost("H100", 8, 1e9, 2e9, floor_us=5.0, predicted_us=10.0, usual_us=usual_us)
    assert str(cost) == f"predicted 10 us at 8 rows, floor 5 us (50%){told}"
    decision = Decision("lower", "moe_expert_up", "", "triton", cost=cost)
    assert decisions_from_json(decisions_to_json([decision])) == (decision,)
