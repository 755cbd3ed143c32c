"""Predictions for clusters: what must hold whatever the numbers are, planted measurements, and the kept tables."""

import csv
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bench_parallel import COLUMNS
from diffulex.benching.shapes import SHAPES, Shape
from diffulex.distributed import ExpertPlacement, plan_placement
from diffulex.distributed.links import REFERENCE_PROBE, exchange_seconds
from diffulex.distributed.measured import compare, fit_naive
from diffulex.distributed.simulate import (
    PAPER,
    PASSES,
    RANKS,
    WAYS,
    Host,
    Links,
    Scenario,
    main,
    planned,
    simulate,
    table,
    zipf_load,
)
from lowering.errors import MoEOptionError, MoERangeError
from lowering.schedule.device import H100, H200
from tests.support.catalogue import raises_catalogue

SMALL = Shape(16, 4, 1024, 512)
KEPT = Path(__file__).resolve().parents[3] / "docs" / "parallel.md"
# a nanosecond in a second: sums in another order
ROUNDING = 1 + 1e-9


@st.composite
def scenarios(draw, ways=WAYS):
    """Small layers on few ranks, with any loads, replicas now and then, and chunks."""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 8, 12]))
    load = draw(
        st.none() | st.lists(st.integers(0, 1000), min_size=SMALL.num_experts, max_size=SMALL.num_experts).map(tuple)
    )
    placement = None
    if load is not None and draw(st.booleans()):
        most = min(5, SMALL.num_experts * (ranks - 1))
        placement = plan_placement(load, ranks, replicas=draw(st.integers(0, most))).placement
    way, tokens = draw(st.sampled_from(ways)), draw(st.integers(0, 5000))
    chunks = draw(st.sampled_from([1, 2, 4])) if way == "sums" else 1
    return Scenario(SMALL, ranks, tokens, way, load, placement, chunks)


nodes = st.integers(1, 8).map(lambda size: Links(ranks_per_node=size))


@given(scenarios(), nodes, st.integers(0, 5000))
def test_more_tokens_take_no_less_time(scenario, links, more):
    larger = dataclasses.replace(scenario, tokens=scenario.tokens + more)
    before, after = simulate(scenario, links=links), simulate(larger, links=links)
    for phase in ("dispatch", "experts", "combine", "step"):
        assert getattr(before, phase) <= getattr(after, phase) * ROUNDING, phase


@given(scenarios(), nodes)
def test_a_step_is_no_shorter_than_its_parts(scenario, links):
    told = simulate(scenario, links=links)
    assert told.step * ROUNDING >= max(told.rank_experts) == told.experts
    if scenario.chunks == 1:
        parts = told.dispatch + told.experts + told.combine
        assert told.step <= max(parts, Host().call if scenario.way == "naive" else 0.0) * ROUNDING
        # of `naive` the host's part of a phase passes while the device is at another one
        apart = told.dispatch + told.combine if scenario.way != "naive" else max(told.dispatch, told.combine)
        assert told.step * ROUNDING >= apart
    assert sum(told.shares) == pytest.approx(1) and 1 - 1e-9 <= told.imbalance <= scenario.ranks + 1e-9


@given(scenarios(), nodes, st.randoms(use_true_random=False))
def test_ranks_of_a_node_and_nodes_have_no_order(scenario, links, random):
    size = links.ranks_per_node
    if scenario.ranks % size:
        return
    owned = scenario.placed.owned
    groups = [list(owned[start : start + size]) for start in range(0, scenario.ranks, size)]
    for group in groups:
        random.shuffle(group)
    random.shuffle(groups)
    other = dataclasses.replace(
        scenario, placement=ExpertPlacement(tuple(ranks for group in groups for ranks in group))
    )
    first, second = simulate(scenario, links=links), simulate(other, links=links)
    assert first.step == pytest.approx(second.step, rel=1e-9)
    assert sorted(first.rank_experts) == sorted(second.rank_experts)


@given(scenarios(), nodes, st.floats(1, 10), st.floats(1, 10))
def test_faster_links_are_never_slower(scenario, links, inside, between):
    faster = dataclasses.replace(
        links,
        inside_bandwidth=links.inside_bandwidth * inside,
        between_bandwidth=links.between_bandwidth * between,
        large_bandwidth=links.large_bandwidth * inside,
        gather_bandwidth=links.gather_bandwidth * inside,
        memory_bandwidth=links.memory_bandwidth * inside,
        inside_latency=links.inside_latency / inside,
    )
    assert simulate(scenario, links=faster).step <= simulate(scenario, links=links).step * ROUNDING


@given(scenarios(ways=("naive",)), st.integers(0, 12))
def test_replicas_that_are_taken_make_the_gemms_no_slower(scenario, replicas):
    replicas = min(replicas, SMALL.num_experts * (scenario.ranks - 1))
    without, with_them = (
        simulate(dataclasses.replace(scenario, placement=planned(scenario, replicas=count))) for count in (0, replicas)
    )
    assert with_them.experts <= without.experts


def test_replicas_pay_where_loads_are_skewed_and_tokens_many():
    skewed = Scenario(SMALL, 4, 4096, load=zipf_load(16, 4))
    few = dataclasses.replace(skewed, tokens=2, load=None)
    plain, spread = (
        simulate(dataclasses.replace(skewed, placement=planned(skewed, replicas=count))) for count in (0, 8)
    )
    assert spread.experts < 0.99 * plain.experts and spread.imbalance < plain.imbalance
    forced = plan_placement(few.loads, 4, replicas=8).placement
    assert simulate(dataclasses.replace(few, placement=forced)).experts >= simulate(few).experts
    assert not planned(few, replicas=8).replicas


FAST = dataclasses.replace(H100, bandwidth=1e30)  # no time for what stays on the device
NOTHING = Host(0.0, 0.0, 0.0, 0.0)


def links_of(size, inside, between=1e5, **starts):
    """Every kind of exchange within a node at the same rate."""
    rates = dict.fromkeys(("inside_bandwidth", "large_bandwidth", "gather_bandwidth", "memory_bandwidth"), inside)
    latencies = dict.fromkeys(("inside_latency", "large_start", "memory_latency", "reduce_latency"), 0.0)
    return Links(size, between_bandwidth=between, **rates | latencies | starts)


def test_ten_thousand_bytes_over_a_link():
    """By hand: two ranks, equal loads, half of the slots to the other one, no time to start."""
    links = links_of(2, 1e6)
    told = simulate(Scenario(SMALL, 2, 100), links=links, host=NOTHING, device=FAST)
    assert told.dispatch == pytest.approx(100 * 4 * (2048 + 12) / 2 / 1e6)
    apart = links_of(1, 1e6, between_latency=0.25)
    told = simulate(Scenario(SMALL, 2, 100), links=apart, host=NOTHING, device=FAST)
    assert told.dispatch == pytest.approx(3 * 0.25 + 100 * 4 * (2048 + 12) / 2 / 1e5)
    gathered = simulate(Scenario(SMALL, 2, 100, "static"), links=links, device=FAST)
    assert gathered.dispatch == pytest.approx(100 * (2048 + 32) / 1e6, rel=1e-3)
    assert gathered.combine == pytest.approx(100 * 4 * 2048 / 2 / 1e6, rel=1e-3)  # those of the other's experts alone
    sent = simulate(Scenario(SMALL, 2, 100, "static"), links=apart, device=FAST)
    assert sent.combine == pytest.approx(0.25 + 100 * 4 * 2048 / 1e5, rel=1e-3)
    load = tuple([3.0] * 8 + [1.0] * 8)
    uneven = simulate(Scenario(SMALL, 2, 100, "static", load=load), links=links, device=FAST)
    assert uneven.combine == pytest.approx(100 * 4 * 2048 * 0.75 / 1e6, rel=1e-3)
    load = tuple([2.0] * 4 + [1.0] * 12)
    busiest = simulate(Scenario(SMALL, 4, 100, "static", load=load), links=links_of(4, 1e6), device=FAST)
    assert busiest.combine == pytest.approx(100 * 4 * 2048 * 3 * 0.4 / 1e6, rel=1e-3)  # two fifths, to three others
    summed = simulate(Scenario(SMALL, 2, 100, "sums"), links=links, device=FAST)
    assert summed.combine == pytest.approx(100 * 2048 / 1e6, rel=1e-3)
    reduced = simulate(Scenario(SMALL, 2, 100, "tp"), links=links, device=FAST)
    assert reduced.combine == pytest.approx(100 * 1024 * 4 / 1e6, rel=1e-3)
    parts = simulate(Scenario(SMALL, 2, 100, "sums", chunks=2), links=links, device=FAST)
    assert parts.step == pytest.approx(2 * 100 * 2048 / 1e6, rel=1e-3)  # rows there and sums back, nothing to hide them


def test_the_host_is_waited_for():
    few = Scenario(SMALL, 2, 4)
    told, slow = (simulate(few, host=host) for host in (NOTHING, Host(0.0, 0.5, 0.25, 0.7)))
    assert told.step < 0.01 and (slow.dispatch, slow.combine, slow.step) == (0.5, 0.25, 0.7)
    counts = simulate(few, host=Host(before=1.0, dispatch=0.5, combine=0.25, call=0.7))
    assert counts.step == pytest.approx(1 + told.step) and counts.dispatch == pytest.approx(1 + told.dispatch)


def test_hosts_are_as_fast_as_their_probes():
    assert Host().at(REFERENCE_PROBE) == Host()
    slow = Host().at(3 * REFERENCE_PROBE)
    assert dataclasses.astuple(slow) == pytest.approx([3 * seconds for seconds in dataclasses.astuple(Host())])


@pytest.mark.parametrize(("source", "target", "seconds"), [(2, 3, 2.0), (3, 2, 2.0), (1, 2, 20.0), (0, 1, 2.0)])
def test_bytes_take_the_link_between_their_ranks(source, target, seconds):
    """Nodes of two ranks, ten times as fast inside."""
    links = links_of(2, 1e6, between_latency=0.0)
    sent = [[2e6 * ((a, b) == (source, target)) for b in range(4)] for a in range(4)]
    assert exchange_seconds(sent, links) == pytest.approx(seconds)


def test_parts_hide_what_travels():
    """Behind GEMMs that take longer; more parts read the weights more often, and hide no more."""
    whole, two, four = (simulate(Scenario(SMALL, 2, 65536, "sums", chunks=chunks)) for chunks in (1, 2, 4))
    assert two.experts < two.step < whole.step and two.experts < four.experts
    slow = dataclasses.replace(Links(), memory_bandwidth=1e9)
    exposed = simulate(Scenario(SMALL, 2, 65536, "sums", chunks=2), links=slow)
    assert exposed.step > 2 * 65536 * 2048 / 1e9


@pytest.mark.parametrize("num_experts", [4, 5, 64])
def test_zipf_gives_no_expert_more_than_a_token_can(num_experts):
    loads = zipf_load(num_experts, 4)
    assert sum(loads) == pytest.approx(1) and max(loads) <= 0.25 + 1e-12
    assert list(loads) == sorted(loads, reverse=True)


def test_what_has_no_meaning_is_refused():
    with raises_catalogue(MoEOptionError, expected="way in", got="'ring'"):
        simulate(Scenario(SMALL, 2, 1, "ring"))
    with raises_catalogue(MoEOptionError, expected="chunks=1 but for 'sums'", got="'static'"):
        simulate(Scenario(SMALL, 2, 1, "static", chunks=2))
    with raises_catalogue(MoERangeError, expected="tokens >= 0", got="-1 tokens"):
        simulate(Scenario(SMALL, 2, -1))
    with raises_catalogue(MoERangeError, expected="loads of 16 experts", got="2 and 3"):
        simulate(Scenario(SMALL, 2, 1, load=(1.0, 2.0, 3.0)))


def planted(path, **cells):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        row = {"device": "NVIDIA H200", "ranks": 2, "shape": "qwen3", "experts_in_all": 128, "tokens": 1024}
        writer.writerow(row | {"way": "naive"} | cells)
        writer.writerow(row | {"way": "tp-width", "time_us": 5})
        writer.writerow(row | {"device": "cpu", "way": "naive", "time_us": 5})
    return path


def test_measurements_stand_beside_predictions(tmp_path, capsys):
    told = simulate(Scenario(SHAPES["qwen3"], 2, 1024), device=H200)
    path = planted(tmp_path / "parallel.csv", time_us=2e6 * told.step, experts_us=1e6 * told.experts, combine_us="")
    found = {one.phase: one for one in compare(path)}
    assert set(found) == {"time", "experts"} and found["time"].ratio == pytest.approx(0.5)
    assert found["experts"].ratio == pytest.approx(1) and found["experts"].predicted == pytest.approx(
        1e6 * told.experts
    )
    main(["--compare", str(path)])
    assert "ratio 0.50" in capsys.readouterr().out


@pytest.mark.parametrize("slower", [1, 4])
def test_a_slower_host_is_expected_to_take_longer(tmp_path, slower):
    """By the probe beside the row."""
    path = planted(tmp_path / "parallel.csv", tokens=4, time_us=1, host_us=slower * 1e6 * REFERENCE_PROBE)
    (told,) = compare(path)
    assert told.predicted == pytest.approx(slower * 1e6 * Host().call)


def test_what_naive_takes_is_fitted(tmp_path):
    """To rows that the model itself makes, on hosts of two speeds."""
    path = tmp_path / "parallel.csv"
    host = Host(before=0.2e-3, dispatch=4e-3, combine=3e-3, call=8e-3)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for tokens, probe in ((64, 1e-4), (1024, 3e-4), (65536, 2e-4)):
            here = Host(*(seconds * probe / 2e-4 for seconds in dataclasses.astuple(host)))
            told = simulate(Scenario(SHAPES["qwen3"], 2, tokens), host=here, device=H200)
            row = {"device": "NVIDIA H200", "ranks": 2, "shape": "qwen3", "experts_in_all": 128, "tokens": tokens}
            times = {"time_us": told.step, "dispatch_us": told.dispatch, "combine_us": told.combine, "host_us": probe}
            writer.writerow(row | {"way": "naive"} | {name: 1e6 * seconds for name, seconds in times.items()})
    found = fit_naive(path)
    assert found == pytest.approx({"REFERENCE_PROBE": 2e-4, "PASSES": PASSES} | dataclasses.asdict(host), rel=1e-6)
    with raises_catalogue(MoEOptionError, expected="few tokens and with many", got="before, dispatch"):
        fit_naive(planted(tmp_path / "other.csv", way="static", time_us=1))


def test_the_fit_is_printed(capsys):
    main(["--fit-naive", str(MEASURED)])
    told = dict(line.split(" = ") for line in capsys.readouterr().out.splitlines())
    for name, value in dataclasses.asdict(Host()).items():
        assert float(told[name]) == pytest.approx(value, rel=0.02), name
    assert float(told["PASSES"]) == pytest.approx(PASSES, rel=0.02)


MEASURED = Path(__file__).with_name("measured_on_two_h200.csv")


def test_measurements_on_two_gpus_are_met():
    """Whole calls."""
    told = [one for one in compare(MEASURED) if one.phase == "time"]
    assert len(told) == 30 and {one.way for one in told} == {"naive", "static", "sums", "parts", "tp-experts"}
    assert [one for one in told if abs(one.ratio - 1) > 0.15] == []
    for one in told:
        cells = (one.shape, one.tokens, one.way, f"{one.measured:.0f}", f"{one.predicted:.0f}", f"{one.ratio:.2f}")
        assert f"| {' | '.join(map(str, cells))} |" in KEPT.read_text(encoding="utf-8")


def test_the_kept_tables_are_what_is_predicted(capsys):
    text = KEPT.read_text(encoding="utf-8")
    main(["--ranks", "8", "--tokens", "128"])
    assert capsys.readouterr().out.strip().splitlines()[4] in text
    for name, tokens in (("deepseek-v3", 4096), ("deepseek-v3", 128), ("qwen3", 4096)):
        assert table(name, tokens) in text, f"python -m diffulex.distributed.simulate --shape {name} --tokens {tokens}"
    assert RANKS == (8, 16, 32, 64) and set(PAPER) == {"deepseek-v3", "qwen3"}
