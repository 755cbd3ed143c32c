"""Plans against what they promise: rows, replicas, the bound, and nothing worse than the even placement."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from diffulex.distributed import ExpertPlacement, balance, plan_placement
from diffulex.distributed.balance import rank_loads
from lowering.errors import MoEParallelError, MoERangeError
from tests.support.catalogue import raises_catalogue


@st.composite
def requests(draw, most_experts=12, most_ranks=5):
    """Loads, ranks and replicas: equal loads, none, a few large ones, fractions."""
    num_ranks = draw(st.integers(1, most_ranks))
    one = draw(st.sampled_from([st.integers(0, 3), st.integers(0, 1000), st.just(7), st.floats(0, 9)]))
    load_E = draw(st.lists(st.one_of(one, one, st.integers(0, 10**6)), min_size=num_ranks, max_size=most_experts))
    return load_E, num_ranks, draw(st.integers(0, min(len(load_E) * (num_ranks - 1), 2 * num_ranks)))


def shares_of(load_E, num_ranks, replicas):
    """Number of replicas and the share of each, by expert; and experts with their number, the largest share first."""
    loads = [Fraction(load) for load in load_E]
    counts = balance._replica_counts(loads, num_ranks, replicas)
    shares = [load / count for load, count in zip(loads, counts, strict=True)]
    order = sorted(range(len(loads)), key=lambda expert: (-shares[expert], expert))
    return counts, shares, [(expert, counts[expert]) for expert in order]


@given(requests())
@example(([10, 1, 1, 1, 1, 1, 1], 3, 0))  # two ranks want the one row that is over
def test_a_plan_is_what_it_promises(request):
    load_E, num_ranks, replicas = request
    plan, even = plan_placement(load_E, num_ranks, replicas=replicas), ExpertPlacement.even(len(load_E), num_ranks)
    owned = plan.placement.owned
    assert plan == plan_placement(load_E, num_ranks, replicas=replicas)
    assert {expert for experts in owned for expert in experts} == set(range(len(load_E)))
    assert all(len(set(experts)) == len(experts) for experts in owned)
    rows = [len(experts) for experts in owned]
    assert max(rows) - min(rows) <= 1 and sum(rows) in (len(load_E), len(load_E) + replicas)
    assert plan.before == rank_loads(even, load_E) and plan.after == rank_loads(plan.placement, load_E)
    assert sum(plan.after) == sum(plan.before) == sum(map(Fraction, load_E)) == plan.mean * num_ranks
    _, shares, _ = shares_of(load_E, num_ranks, replicas)
    assert plan.bound == plan.mean + (1 - Fraction(1, num_ranks)) * max(shares)
    assert max(plan.after) <= min(max(plan.before), plan.bound)
    assert plan.placement == even or max(plan.after) < max(plan.before)
    if not plan.placement.replicas:
        plan.placement.check(len(load_E), num_ranks)


@given(requests())
def test_no_two_ranks_differ_by_more_than_the_largest_share(request):
    """What the bound rests on, for both ways of spreading."""
    load_E, num_ranks, replicas = request
    counts, shares, copies = shares_of(load_E, num_ranks, replicas)
    for spread in (balance._packed(copies, num_ranks, shares=shares), balance._dealt(copies, num_ranks)):
        if spread is None:
            continue
        loads = [sum((shares[expert] for expert in experts), Fraction()) for experts in spread]
        assert max(loads) - min(loads) <= max(shares)
        held = [expert for experts in spread for expert in experts]
        assert [held.count(expert) for expert in range(len(counts))] == counts
        assert all(len(set(experts)) == len(experts) for experts in spread)


@given(requests(most_experts=4, most_ranks=3))
@example(([9, 8, 1], 3, 2))
def test_replicas_make_the_largest_share_as_small_as_possible(request):
    load_E, num_ranks, replicas = request
    counts, shares, _ = shares_of(load_E, num_ranks, replicas)
    assert sum(counts) == len(load_E) + replicas and all(1 <= count <= num_ranks for count in counts)
    choices = itertools.product(range(1, num_ranks + 1), repeat=len(load_E))
    assert max(shares) == min(
        max(Fraction(load) / count for load, count in zip(load_E, choice, strict=True))
        for choice in choices
        if sum(choice) == len(load_E) + replicas
    )


def test_the_busiest_expert_is_shared_and_ranks_are_level():
    plan = plan_placement([120, 10, 20, 30, 5, 15], 2, replicas=2)
    assert plan.placement.owned == ((0, 2, 3, 4), (0, 1, 3, 5))
    assert plan.before == (150, 50) and plan.after == (100, 100) and plan.bound == 130
    assert plan.placement.replicas == {0: (0, 1), 3: (0, 1)}


def test_ties_go_to_the_smaller_index():
    assert plan_placement([4, 0, 4, 0, 4, 0, 4, 0], 4).placement.owned == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert plan_placement([4, 4, 0, 0], 2).placement.owned == ((0, 2), (1, 3))
    assert plan_placement([6, 6, 1, 1], 2, replicas=1).placement.replicas == {0: (0, 1)}


def test_replicas_are_dealt_out_where_the_room_left_is_on_too_few_ranks():
    """Rank 1 is full of small shares when the two replicas of the smallest come."""
    shares = [Fraction(10), *[Fraction(1)] * 3, Fraction(1, 2)]
    copies = [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2)]
    assert balance._packed(copies, 2, shares=shares) is None
    assert balance._dealt(copies, 2) == [[0, 2, 4], [1, 3, 4]]


@pytest.mark.parametrize(
    ("load", "reason", "warned"), [(3, "no better was found", 0), (0, "every load is 0, nothing was counted", 1)]
)
def test_equal_and_absent_loads_stay_where_they_are(load, reason, warned, caplog):
    plan = plan_placement([load] * 6, 3, replicas=2)
    assert plan.placement == ExpertPlacement.even(6, 3) and f"even placement: {reason}" in str(plan)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    assert ("was anything counted?" in caplog.text) == bool(warned)


def test_the_report_names_loads_and_replicas():
    text = str(plan_placement([90, 10, 10, 10], 2, replicas=2))
    for line in (
        "load of a rank: mean 60.0, bound 82.5",
        "  before: max 100.0 (1.67 x mean)",
        "  after:  max 60.0 (1.00 x mean)",
        "  expert 0 on ranks 0, 1",
        "  1: load 60.0, experts 0, 1, 3",
    ):
        assert line in text.splitlines(), text
    assert "replicas: none" in str(plan_placement([1, 2, 3, 4], 2)).splitlines()


@pytest.mark.parametrize(
    ("arguments", "error", "got"),
    [
        (([1, -1], 2, 0), MoERangeError, "-1 for expert 1"),
        (([math.nan, 1], 2, 0), MoERangeError, "nan for expert 0"),
        (([1, math.inf], 2, 0), MoERangeError, "inf for expert 1"),
        (([1, 1], 0, 0), MoERangeError, "0"),
        (([1, 1], 2, -1), MoERangeError, "-1"),
        (([1, 1], 2, 3), MoERangeError, "3"),
        (([1, 1], 1, 1), MoERangeError, "1"),
        (([1, 1], 3, 2), MoEParallelError, "[1, 1, 0] experts"),
        (([], 1, 0), MoEParallelError, "[0] experts"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, error, got):
    load_E, num_ranks, replicas = arguments
    with raises_catalogue(error, got=got):
        plan_placement(load_E, num_ranks, replicas=replicas)
