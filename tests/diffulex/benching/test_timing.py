"""Round-robin medians: who is timed when, and what counts. Capture itself needs a GPU."""

import functools
from types import SimpleNamespace

import pytest
import torch

from diffulex.benching import timing
from diffulex.benching.timing import call_seconds, capture, round_robin, wall_clock


class Clock:
    """Time that passes only in calls; each call notes its name and set."""

    def __init__(self, monkeypatch):
        self.now, self.made = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name, number, seconds):
        self.made.append((name, number))
        self.now += next(seconds) if hasattr(seconds, "__next__") else seconds

    def calls(self, name, *, sets, seconds):
        return [functools.partial(self.call, name, number, seconds) for number in range(sets)]


def test_sets_and_first_places_rotate(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {"a": clock.calls("a", sets=2, seconds=2e-6), "b": clock.calls("b", sets=2, seconds=3e-6)}
    assert wall_clock(calls, rounds=3) == {"a": pytest.approx(2), "b": pytest.approx(3)}
    assert clock.made == [*(("a", 0), ("b", 0)), *(("b", 1), ("a", 1)), *(("a", 0), ("b", 0)), *(("b", 1), ("a", 1))]


def test_the_first_round_does_not_count_and_the_middle_one_does(monkeypatch):
    clock = Clock(monkeypatch)
    seconds = iter([9.0, 4e-6, 1e-6, 2e-6])
    assert wall_clock({"a": clock.calls("a", sets=1, seconds=seconds)}, rounds=3) == {"a": pytest.approx(2, rel=1e-3)}


def test_slow_calls_are_made_a_few_times(monkeypatch):
    clock = Clock(monkeypatch)
    wall_clock({"a": clock.calls("a", sets=1, seconds=7.0)}, rounds=15, fewest=3, seconds=10)
    assert len(clock.made) == 1 + 3


def test_nothing_to_time():
    assert wall_clock({}) == {}


def test_graphs_are_replayed_in_changing_turns_and_warm_up_is_left_out(monkeypatch):
    replayed = []

    class Graph:
        def __init__(self, name):
            self.replay = functools.partial(replayed.append, name)

    def event_seconds(function):
        function()
        return len(replayed) * 1e-6

    monkeypatch.setattr(timing, "_event_seconds", event_seconds)
    graphs = {name: Graph(name) for name in "abc"}
    times = round_robin(graphs, 2, rounds=5)
    turns = [replayed[start : start + 3] for start in range(0, 15, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 2  # no graph has the same one before it all the time
    # a sample is the place of the replay in all of them; the medians are of the last three, by two calls a replay
    places = {name: [place for place, which in enumerate(replayed, 1) if which == name] for name in graphs}
    assert times == {name: pytest.approx(sorted(seen[2:])[1] / 2) for name, seen in places.items()}
    replayed.clear()
    round_robin(graphs, 2, rounds=5)
    assert [replayed[start : start + 3] for start in range(0, 15, 3)] == turns


def test_graphs_run_alone_before_their_samples(monkeypatch):
    """For so long, and without being counted."""
    clock, waits = Clock(monkeypatch), []
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: waits.append(clock.made[-1]))
    monkeypatch.setattr(timing, "_event_seconds", lambda replay: replay("sample"))

    def graph(name, seconds):
        def replay(kind="alone"):
            clock.call(name, kind, seconds)
            return seconds

        return SimpleNamespace(replay=replay)

    times = round_robin({"a": graph("a", 0.2), "b": graph("b", 0.3)}, 1, rounds=3, alone=0.5)
    assert times == {"a": pytest.approx(2e5), "b": pytest.approx(3e5)}
    for number, (name, kind) in enumerate(clock.made):
        if kind == "sample":
            count = {"a": 3, "b": 2}[name]
            assert clock.made[number - count : number] == [(name, "alone")] * count
    assert waits == [call for call in clock.made if call[1] == "alone"] and len(waits) == 3 * (3 + 2)


def test_the_first_of_several_calls_does_not_count(monkeypatch):
    clock = Clock(monkeypatch)
    seconds = iter([50.0, 1.0, 5.0, 3.0])
    call = functools.partial(clock.call, "a", 0, seconds)
    assert call_seconds(call, device=torch.device("cpu"), repeats=3) == [1.0, 5.0, 3.0]


@pytest.mark.gpu
def test_a_captured_graph_computes_again():
    inputs = [(torch.full((4,), float(number), device="cuda"),) for number in range(2)]
    out = torch.zeros(4, device="cuda")
    graph = capture(lambda x: out.add_(x), inputs)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert out.tolist() == [1.0] * 4
    assert round_robin({"a": graph}, 2, rounds=4)["a"] > 0
