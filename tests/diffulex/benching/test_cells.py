"""One cell: checked before it is timed, what is wrong or refused is not timed, what is left is."""

import dataclasses

import pytest
import torch

from diffulex.benching import cells
from diffulex.benching.ceilings import Ceilings
from diffulex.benching.cells import Options, measure_cell
from diffulex.benching.peers import PEERS, Peer, Runner
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
