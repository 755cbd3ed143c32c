"""Placements with replicas: for planning alone."""

from diffulex.distributed import ExpertPlacement
from lowering.errors import MoEParallelError
from tests.support.catalogue import raises_catalogue


def test_replicas_are_named_and_refused_where_an_expert_has_one_rank():
    placement = ExpertPlacement(((3, 0), (2, 0, 1), (1, 0)))
    assert placement.replicas == {0: (0, 1, 2), 1: (1, 2)}
    for asked in (placement.rank_of, placement.row_of, lambda count: placement.check(count, 3)):
        with raises_catalogue(MoEParallelError, expected="each expert of 4 on one rank"):
            asked(4)


def test_tables_of_a_placement_without_replicas():
    placement = ExpertPlacement(((3, 0), (2,), (1,)))
    assert placement.replicas == {}
    assert placement.rank_of(4) == [0, 2, 1, 0, -1] and placement.row_of(4) == [1, 0, 0, 0, -1]
