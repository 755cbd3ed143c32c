"""One cell: checked before it is timed, what is wrong or refused is not timed, what is left is."""

import contextlib
import dataclasses
import types
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffulex.benching import cells
from diffulex.benching.ceilings import Ceilings, dense_products
from diffulex.benching.cells import Options, measure_cell
from diffulex.benching.check import Checker
from diffulex.benching.inputs import make_inputs
from diffulex.benching.peers import PEERS, Peer, Runner, choose
from lowering.errors import Reason, ReasonCode
from tests.support.benching import tiny_layer

OPTIONS = Options("topk", "uniform", Ceilings(1e11, 1e10))
(GROUPED,) = [peer for peer in PEERS if peer.name == "grouped_mm"]


def changed(name, factor, calls, **given):
    """A peer that multiplies what grouped_mm returns, and notes its calls."""

    def build(layer, source):
        runner = GROUPED.build(layer, source)

        def run(*arguments):
            calls.append(name)
            return runner.run(*arguments) * factor

        return dataclasses.replace(runner, run=run)

    return Peer(name, "cpu", build, **given)


def by_name(cell):
    return {result.peer: result for result in cell.results}


@pytest.mark.parametrize("source", ["topk", "logits"])
@pytest.mark.parametrize("routing", ["uniform", "zipf", "one-hot"])
def test_all_peers_of_a_cpu(source, routing):
    peers = [peer for peer in PEERS if peer.device == "cpu"]
    options = dataclasses.replace(OPTIONS, source=source, routing=routing)
    cell = measure_cell(tiny_layer(), 9, peers=peers, options=options)
    assert [result.peer for result in cell.results] == [peer.name for peer in peers]
    assert {result.outcome for result in cell.results} == {"timed"}
    assert all(result.microseconds > 0 for result in cell.results)
    assert cell.work.flop == 6 * 9 * 2 * 64 * 32 and cell.floor == cell.work.floor(OPTIONS.ceilings)
    assert cell.time_of("eager") == by_name(cell)["eager"].microseconds and cell.time_of("nobody") is None


def test_a_peer_that_is_wrong_is_not_timed_and_the_others_are():
    calls = []
    peers = [changed("right", 1, calls), changed("wrong", 1.0001, calls)]
    cell = measure_cell(tiny_layer(), 100, peers=peers, options=OPTIONS)
    right, wrong = cell.results
    assert wrong.outcome == "wrong" and wrong.microseconds is None and "mean error" in wrong.detail
    assert right.outcome == "timed" and right.microseconds is not None and right.detail == ""
    assert calls.count("wrong") == 1 < calls.count("right")
    assert calls[:2] == ["right", "wrong"], "all are checked before any is timed"


def test_a_peer_that_does_not_run_the_cell_says_why():
    calls = []
    peer = changed("picky", 1, calls, refuses=lambda layer, tokens: Reason(ReasonCode.OPTION, f"not {tokens}"))
    (result,) = measure_cell(tiny_layer(), 3, peers=[peer], options=OPTIONS).results
    assert (result.outcome, result.detail, result.microseconds) == ("skipped", "OPTION: not 3", None) and not calls


def test_a_peer_that_runs_out_of_memory_is_skipped():
    def run(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB. And more")

    peer = Peer("large", "cpu", lambda layer, source: Runner(run, lambda one: one.of(source)))
    (result,) = measure_cell(tiny_layer(), 3, peers=[peer], options=OPTIONS).results
    assert (result.outcome, result.detail) == ("skipped", "MEMORY: CUDA out of memory")


def test_any_other_failure_is_no_result():
    def run(*arguments):
        raise RuntimeError("a bug")

    peer = Peer("broken", "cpu", lambda layer, source: Runner(run, lambda one: one.of(source)))
    with pytest.raises(RuntimeError, match="a bug"):
        measure_cell(tiny_layer(), 3, peers=[peer], options=OPTIONS)


def test_arguments_are_made_outside_of_what_is_timed(monkeypatch):
    """And are kept as long as they are timed: a CUDA graph would read them after they are gone."""
    made, seen = [], []

    def prepare(one):
        made.append(one)
        return one.of("topk")

    def wall_clock(calls):
        seen.append((len(made), len(calls["own"])))
        for call in calls["own"]:
            call()
        seen.append(len(made))
        return {"own": 1.0}

    monkeypatch.setattr(cells, "wall_clock", wall_clock)
    peer = Peer("own", "cpu", lambda layer, source: Runner(GROUPED.build(layer, source).run, prepare))
    measure_cell(tiny_layer(), 1, peers=[peer], options=OPTIONS)
    assert seen == [(16, 16), 16]


def test_on_cuda_a_graph_is_captured_in_the_peers_state_and_its_arguments_stay(monkeypatch):
    """Without a GPU: everything that touches one is replaced. A graph keeps none of the tensors that it reads."""
    layer = tiny_layer()
    faked = types.SimpleNamespace(case=layer.case, dtype=layer.dtype, device=torch.device("cuda"))
    steps, arguments = [], []

    @contextlib.contextmanager
    def state():
        steps.append("enter")
        yield
        steps.append("leave")

    def capture(run, made):
        steps.append(f"capture {len(made)}")
        arguments.extend(weakref.ref(tensor) for tensor in made[0])
        return "graph"

    def timed(graphs, calls):
        steps.append(f"time {graphs} {calls}")
        assert all(reference() is not None for reference in arguments)
        return dict.fromkeys(graphs, 5.0)

    def prepare(one):
        return one.hidden_TH.clone(), one.ids_TK.int(), one.weights_TK.float()

    runner = dataclasses.replace(GROUPED.build(layer, "topk"), prepare=prepare)
    monkeypatch.setattr(cells, "make_inputs", lambda *args, device, **given: make_inputs(*args, device="cpu", **given))
    monkeypatch.setattr(cells, "Checker", lambda _layer, inputs, *, source: Checker(layer, inputs, source=source))
    monkeypatch.setattr(cells, "capture", capture)
    monkeypatch.setattr(cells, "round_robin", timed)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: steps.append("reset"))
    peers = [Peer("one", "cuda", lambda *args: runner, state=state), Peer("other", "cuda", lambda *args: runner)]
    cell = measure_cell(faked, 9, peers=peers, options=OPTIONS)
    assert cell.dense is None  # bytes decide
    assert steps[:-1] == ["reset", "enter", "capture 4", "leave", "reset", "capture 4"]
    assert steps[-1] == "time {'one': 'graph', 'other': 'graph'} 4"
    assert [result.microseconds for result in cell.results] == [5.0, 5.0]


def test_where_arithmetic_decides_dense_products_take_their_turn_on_cuda(monkeypatch):
    layer = tiny_layer()
    faked = types.SimpleNamespace(case=layer.case, dtype=layer.dtype, device=torch.device("cuda"))
    wanted = dense_products(layer.case.spec, 4, dtype=torch.float32, device=torch.device("cpu"))
    captured = []
    monkeypatch.setattr(cells, "make_inputs", lambda *args, device, **given: make_inputs(*args, device="cpu", **given))
    monkeypatch.setattr(cells, "Checker", lambda _layer, inputs, *, source: Checker(layer, inputs, source=source))
    monkeypatch.setattr(cells, "dense_products", lambda spec, rows, **place: captured.append(rows) or wanted)
    monkeypatch.setattr(cells, "capture", lambda run, made: (run, len(made)))
    turns = []
    monkeypatch.setattr(
        cells, "round_robin", lambda graphs, calls, **given: turns.append(given) or dict.fromkeys(graphs, 3.0)
    )
    options = dataclasses.replace(OPTIONS, ceilings=Ceilings(matrix_rate=1.0, read_rate=1e9))
    own = Peer("own", "cuda", lambda *args: GROUPED.build(layer, "topk"))
    cell = measure_cell(faked, 9, peers=[own], options=options)
    assert cell.dense == 3.0 and captured == [9 * layer.case.shape.top_k]
    assert [result.peer for result in cell.results] == ["own"]
    measure_cell(faked, 9, peers=[own], options=dataclasses.replace(options, alone=0.5))
    assert turns == [{}, {"rounds": 5, "alone": 0.5}]


def test_dense_products_have_the_flop_of_the_experts():
    spec = tiny_layer().case.spec
    with FlopCounterMode(display=False) as counter:
        dense_products(spec, 6, dtype=torch.float32, device=torch.device("cpu"))()
    assert counter.get_total_flops() == 2 * 3 * 6 * spec.hidden_size * spec.intermediate_size


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["topk", "logits"])
def test_the_peers_of_a_gpu(source):
    peers, _ = choose(None, device=torch.device("cuda"), dtype=torch.bfloat16)
    layer = tiny_layer(dtype=torch.bfloat16, device=torch.device("cuda"))
    cell = measure_cell(layer, 64, peers=peers, options=dataclasses.replace(OPTIONS, source=source))
    assert [(result.outcome, result.detail) for result in cell.results] == [("timed", "")] * len(peers)
    assert all(result.microseconds > 0 for result in cell.results)
