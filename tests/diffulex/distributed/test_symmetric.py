"""Exchanges through memory that ranks share: on threads, with stand-ins for the handles of torch's symmetric memory."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffulex.distributed import symmetric
from diffulex.distributed.symmetric import (
    all_to_all_op,
    disagreement,
    gather_op,
    offsets_of,
    workspace_for,
)
from diffulex.distributed.tokens import bytes_to_ranks
from lowering.errors import MoERangeError, Reason, ReasonCode
from tests.support.catalogue import raises_catalogue
from tests.support.shared_memory import on_threads

DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)


def drawn(count, width, *, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 250, (count, width), generator=generator).to(dtype)


@given(st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from(DTYPES)), max_size=5))
def test_parts_lie_one_after_the_other(parts):
    offsets, end = offsets_of(parts)
    stops = [start + math.prod(sizes) * dtype.itemsize for start, (sizes, dtype) in zip(offsets, parts, strict=True)]
    assert all(start % 256 == 0 for start in offsets)
    assert all(stop <= start for stop, start in zip(stops, [*offsets, end][1:], strict=True))
    assert end < sum(math.prod(sizes) * dtype.itemsize + 256 for sizes, dtype in parts) or not parts


@st.composite
def gathers(draw):
    """Ranks, a capacity, tokens of each rank for several calls, and the parts (width, dtype) of a call."""
    size, capacity = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    calls = draw(st.lists(st.lists(st.integers(0, capacity), min_size=size, max_size=size), min_size=1, max_size=3))
    parts = st.lists(st.tuples(st.integers(1, 5), st.sampled_from(DTYPES)), min_size=1, max_size=3)
    return size, capacity, calls, draw(parts)


@given(gathers())
def test_gather_has_all_tokens_and_zeros_behind_them(case):
    size, capacity, calls, parts = case
    num_bytes = offsets_of([((capacity, width), dtype) for width, dtype in parts])[1]

    def tensors(call, rank):
        return [
            drawn(call[rank], width, dtype=dtype, seed=rank + 9 * number) for number, (width, dtype) in enumerate(parts)
        ]

    def run(space):
        return [
            gather_op(tensors(call, space.handle.rank), capacity, size, f"threads/{space.handle.rank}")
            for call in calls
        ]

    for told in on_threads(size, num_bytes, run):
        for call, found in zip(calls, told, strict=True):
            every = [tensors(call, rank) for rank in range(size)]
            for part, received in enumerate(found):
                padded = [torch.nn.functional.pad(mine[part], (0, 0, 0, capacity - len(mine[part]))) for mine in every]
                assert received.dtype == parts[part][1] and torch.equal(received, torch.cat(padded))


@given(
    st.integers(1, 4), st.integers(0, 3), st.sampled_from(DTYPES), st.lists(st.integers(1, 4), min_size=1, max_size=2)
)
def test_all_to_all_gives_each_rank_its_part(size, count, dtype, widths):
    num_bytes = max(256, offsets_of([((size * count, max(widths)), dtype)])[1])

    def rows(rank, width):
        return drawn(size * count, width, dtype=dtype, seed=rank)

    def run(space):
        rank = space.handle.rank
        return [all_to_all_op(rows(rank, width), size, f"threads/{rank}") for width in widths]

    for rank, told in enumerate(on_threads(size, num_bytes, run)):
        for width, received in zip(widths, told, strict=True):
            every = [rows(source, width)[rank * count : (rank + 1) * count] for source in range(size)]
            assert torch.equal(received, torch.cat(every))


def test_exchanges_follow_one_another_in_one_buffer():
    """Also two of the same kind without the other between them, and of other sizes."""
    size, rounds = 3, 20

    def run(space):
        rank, told = space.handle.rank, []
        for number in range(rounds):
            mine = drawn(4, 2, dtype=torch.float32, seed=100 * number + rank)
            told.append(space.gather([mine], 4)[0])
            if number % 3:
                told.append(space.all_to_all(drawn(6, 5, dtype=torch.int64, seed=number + rank)))
        return told

    first, *others = on_threads(size, 1024, run)
    for other in others:
        for number, (found, wanted) in enumerate(zip(other, first, strict=True)):
            assert found.shape == wanted.shape, number
    gathered = [tensor for tensor in first if tensor.dtype == torch.float32]
    for number, found in enumerate(gathered):
        wanted = torch.cat([drawn(4, 2, dtype=torch.float32, seed=100 * number + rank) for rank in range(size)])
        assert torch.equal(found, wanted)


def test_a_call_that_does_not_fit_is_refused():
    def run(space):
        with raises_catalogue(MoERangeError, expected="at most 256 bytes", got="512"):
            space.gather([torch.zeros(3, 40)], 3)
        with raises_catalogue(MoERangeError, expected="at most 256 bytes"):
            space.all_to_all(torch.zeros(2, 40))

    on_threads(1, 256, run)


@pytest.mark.parametrize("rows", [0, 3])
def test_ops_have_fakes_and_are_captured(rows):
    hidden, details = torch.rand(rows, 4), torch.randint(0, 9, (rows, 2), dtype=torch.int32)

    def step(hidden, details):
        gathered, places = gather_op([hidden, details], 5, 1, "threads/0")
        return all_to_all_op(gathered * 2, 1, "threads/0"), places

    def run(space):
        for op, args in (
            (gather_op, ([hidden, details], 5, 1, "threads/0")),
            (all_to_all_op, (hidden, 1, "threads/0")),
        ):
            torch.library.opcheck(op, args)
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        return compiled(hidden, details), step(hidden, details)

    ((found, wanted),) = on_threads(1, 1024, run)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert found[0].shape == (5, 4)


def test_what_tokens_need_of_the_memory():
    assert bytes_to_ranks(3, 10, top_k=2) == 256 + 256
    assert bytes_to_ranks(64, 4096, top_k=8) == 64 * 4096 + 64 * 16 * 8


def told(**changed):
    return {"refused": None, "host": "a", "device": "0", "bytes": 8, "made": 0, "open": None} | changed


@pytest.mark.parametrize(
    ("others", "text"),
    [
        ({"refused": "torch has none"}, "on rank 1: torch has none"),
        ({"device": "1", "host": "b"}, "the ranks are on 2 hosts"),
        ({}, "ranks share a device"),
    ],
)
def test_ranks_that_share_no_memory(others, text):
    reason = disagreement([told(), told(**others)])
    assert reason is not None and reason.code is ReasonCode.PEERS and text in str(reason)


def test_a_workspace_that_one_rank_let_go_of_is_not_taken():
    ranks = [told(open="0/1"), told(device="1", open="0/1")]
    assert disagreement(ranks) is None and ranks[0]["open"] == "0/1"
    ranks[1]["open"] = None
    assert disagreement(ranks) is None and ranks[0]["open"] is None


def test_ranks_settle_on_one_answer(monkeypatch):
    """What each rank is told: the same, whatever it found itself."""
    group = SimpleNamespace(size=lambda: 2, group_name="g")
    answers = {}

    def asked(rank, failing):
        table = [told(made=3), told(device="1", made=5)]
        replies = iter((table, ["RuntimeError: no" if r == failing else None for r in range(2)]))
        monkeypatch.setattr(symmetric, "told_by_ranks", lambda group, value: next(replies))
        monkeypatch.setattr(symmetric, "_tell", lambda group, num_bytes: table[rank])
        made = Reason(ReasonCode.PEERS, "RuntimeError: no") if rank == failing else None
        monkeypatch.setattr(symmetric, "_open", lambda group, num_bytes, key: made or answers.setdefault("key", key))
        return workspace_for(group, "cuda", num_bytes=8)

    assert asked(0, None) == asked(1, None) == "g/6"
    for rank in range(2):
        assert str(asked(rank, 1)) == "PEERS: on rank 1: RuntimeError: no"


def test_where_there_is_no_symmetric_memory():
    one = SimpleNamespace(size=lambda: 1)
    assert workspace_for(one, "cpu", num_bytes=8).code is ReasonCode.NOT_CUDA
    assert workspace_for(one, "cuda", num_bytes=8).code is ReasonCode.PEERS
