"""Placements: tables of ranks and rows, with replicas and without."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffulex.distributed import ExpertPlacement
from diffulex.moe.dispatcher import ExchangePlan
from diffulex.moe.dispatcher.naive_dispatcher import NaiveA2ADispatcher
from lowering.errors import MoEParallelError
from tests.support.catalogue import raises_catalogue

REPLICATED = ExpertPlacement(((3, 0), (2, 0, 1), (1, 0)))


def test_a_slot_goes_to_its_own_rank_if_that_has_a_copy():
    assert REPLICATED.replicas == {0: (0, 1, 2), 1: (1, 2)}
    assert REPLICATED.ranks_of(4, 0) == [(0,), (1, 2), (1,), (0,), (-1,)]
    assert REPLICATED.ranks_of(4, 2) == [(2,), (2,), (1,), (0,), (-1,)]
    assert REPLICATED.rows_of(4) == [[1, -1, -1, 0, -1], [1, 2, 0, -1, -1], [1, 0, -1, -1, -1]]


def chosen(placement, rank, ids_TK, **options):
    """Where a dispatcher of this rank sends slots: ranks and rows, [T, K] each."""
    parallel = SimpleNamespace(
        group=SimpleNamespace(group_name=""),
        size=len(placement.owned),
        rank=rank,
        mesh=SimpleNamespace(device_type="cpu"),
        experts_of=lambda num_experts: placement,
    )
    dispatcher = NaiveA2ADispatcher(ExchangePlan(parallel, 4, ids_TK.shape[1], **options))
    return [of_slots.tolist() for of_slots in dispatcher._chosen(dispatcher._known(ids_TK))]


def test_copies_elsewhere_take_turns():
    """By the number of the token; slots of no expert go nowhere."""
    ids_TK = torch.tensor([[1, 2], [1, 0], [1, 4], [3, 1], [-1, 1]])
    ranks_TK, rows_TK = chosen(REPLICATED, 0, ids_TK)
    assert ranks_TK == [[1, 1], [2, 0], [1, -1], [0, 2], [-1, 1]]
    assert rows_TK == [[2, 0], [0, 1], [2, -1], [0, 0], [-1, 2]]


def test_slots_that_travel_as_tokens_take_turns_as_tokens():
    """Else a copy would get all that an expert gets as a token's first choice."""
    ids_N1 = torch.tensor([1, 2, 1, 0, 3, 1, 1, 1]).unsqueeze(1)
    ranks_N1, _ = chosen(REPLICATED, 0, ids_N1, rows_per_token=2)
    assert ranks_N1 == [[1], [1], [2], [0], [0], [1], [2], [2]]


def test_ranks_begin_with_different_copies():
    """Where each has a single token, copies get one as well as the other."""
    placement = ExpertPlacement(((0,), (1,), (0, 1), (2,), (3,), (3, 2)))
    asked = torch.tensor([[0, 1]])
    assert [chosen(placement, rank, asked)[0][0] for rank in range(6)] == [
        [0, 1],
        [0, 1],
        [2, 2],
        [2, 2],
        [0, 1],
        [2, 2],
    ]


def test_tables_of_a_placement_without_replicas():
    placement = ExpertPlacement(((3, 0), (2,), (1,)))
    assert placement.replicas == {}
    assert placement.ranks_of(4, 1) == [(0,), (2,), (1,), (0,), (-1,)]


@pytest.mark.parametrize("owned", [((0, 1), (1, 1)), ((0,), (2,)), ((0, 1), (2, 5))])
def test_what_is_no_placement(owned):
    placement = ExpertPlacement(owned)
    for asked in (lambda: placement.ranks_of(3, 0), lambda: placement.rows_of(3), lambda: placement.check(3, 2)):
        with raises_catalogue(MoEParallelError, expected="each expert of 3 on a rank, and on none twice"):
            asked()


@given(st.lists(st.sets(st.integers(0, 6), min_size=1).map(tuple), min_size=1, max_size=7), st.integers(1, 9))
def test_slots_find_a_row_where_they_go(owned, tokens):
    """And copies get as many slots, where every rank sends as many, however few."""
    placement = ExpertPlacement((*owned, tuple(range(7))))
    size, rows = len(placement.owned), placement.rows_of(7)
    for expert in range(7):
        shares = [0] * size
        for rank in range(size):
            ranks = placement.ranks_of(7, rank)[expert]
            assert ranks == (rank,) or rank not in ranks
            assert all(placement.owned[other][rows[other][expert]] == expert for other in ranks)
            for token in range(tokens):
                shares[ranks[token % len(ranks)]] += 1
        holders = [share for share, experts in zip(shares, placement.owned, strict=True) if expert in experts]
        assert sum(holders) == size * tokens and max(holders) - min(holders) <= len(holders) / 2
