"""Exchanges through memory that ranks share: on threads, with stand-ins for the handles of torch's symmetric memory."""

import gc
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffulex.distributed import symmetric
from diffulex.distributed.collectives import added_in_order
from diffulex.distributed.overlap import begin_op
from diffulex.distributed.parts import PartsOfMemory
from diffulex.distributed.symmetric import (
    Workspace,
    all_to_all_op,
    disagreement,
    gather_op,
    offsets_of,
    rows_at,
    rows_of_ranks_op,
    workspace_for,
    workspace_of,
)
from diffulex.distributed.tokens import Route, bytes_to_ranks
from lowering.errors import MoERangeError, MoEStageError, ReasonCode
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


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from(DTYPES), st.randoms(use_true_random=False))
def test_rows_of_ranks_are_those_of_all_to_all(size, count, dtype, random):
    """At any places, each at most once, -1 among them, and zeros there."""
    places = [
        random.choice([place, -1]) for place in random.sample(range(size * count), random.randint(0, size * count))
    ]
    places_N = torch.tensor(places, dtype=torch.int64)
    num_bytes = max(256, offsets_of([((size * count, 4), dtype)])[1])

    def run(space):
        rank = space.handle.rank
        rows = drawn(size * count, 4, dtype=dtype, seed=rank)
        key = f"threads/{rank}"
        return rows_of_ranks_op(rows, places_N, size, key), all_to_all_op(rows, size, key)

    for found, every in on_threads(size, num_bytes, run):
        assert found.dtype == dtype and found.shape == (len(places), 4)
        for row, place in zip(found, places, strict=True):
            assert torch.equal(row, every[place] if place >= 0 else torch.zeros_like(row))


def test_kernels_read_between_the_barriers(monkeypatch):
    """With the number of their rank and the addresses, as the stand-in for the kernel finds rows by both."""
    size, places_N = 3, torch.tensor([5, -1, 0, 3])

    def rows_of_ranks(rows, places_N, addresses_R, *, own):
        space = workspace_of(f"threads/{own}")
        assert addresses_R.tolist() == [own] * size and space.handle.barriers % 2 == 1
        return rows_at(torch.cat(space._lent(rows)), places_N)

    monkeypatch.setattr(symmetric, "launcher", lambda: SimpleNamespace(rows_of_ranks=rows_of_ranks))

    def run(space):
        rank = space.handle.rank
        space._addresses_R = torch.tensor([rank] * size)
        rows = drawn(2 * size, 4, dtype=torch.float32, seed=rank)
        return space.rows_of_ranks(rows, places_N), rows_at(space.all_to_all(rows), places_N)

    for found, wanted in on_threads(size, 256, run):
        assert torch.equal(found, wanted)


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


def drawn_parts(rank, tokens=5):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(tokens, 3, generator=generator).bfloat16(), torch.full((tokens, 2), rank, dtype=torch.int32)


@given(st.integers(1, 6), st.integers(1, 3), st.lists(st.integers(0, 6), min_size=6, max_size=6))
def test_parts_through_memory(size, parts, tokens):
    """Sums are rounded where they travel, the own one is not, and they are added up in fp32 rank by rank."""
    capacity = 6

    def of_rank(source, rank):
        """The sum of a rank for the tokens of another one, wide."""
        rows, details = (tensor[: tokens[rank]] for tensor in drawn_parts(rank, capacity))
        return rows.float() * (source + 0.7) + details[:, :1]

    def run(space):
        rank = space.handle.rank
        route = Route("", size, f"threads/{rank}")
        mine = [tensor[: tokens[rank]] for tensor in drawn_parts(rank, capacity)]
        exchange = PartsOfMemory(*mine, rank=rank, capacity=capacity, parts=parts, route=route)
        assert torch.equal(exchange.own_TD, mine[1])
        after = exchange.own_TD
        for part in range(exchange.parts):
            rows, details = exchange.rows(part, after=after)
            sums = rows.float() * (rank + 0.7) + details[:, :1]
            after = exchange.send(sums.bfloat16(), part, mark=torch.tensor([part]))
            assert after.tolist() == [part]
        return exchange.collect(of_rank(rank, rank), after=after)

    for rank, found in enumerate(on_threads(size, 8192, run, of_call=2 + parts * (size > 1))):
        wide = [of_rank(source, rank) for source in range(size)]
        summed = added_in_order([one if source == rank else one.bfloat16() for source, one in enumerate(wide)])
        assert torch.equal(found, summed.bfloat16())


@pytest.mark.parametrize("meanwhile", ["begin", "gather", "all_to_all", "rows_of_ranks"])
def test_nothing_comes_between_a_call_in_parts(meanwhile):
    """As compiled code may have it where layers do not depend on one another; the next call goes on as ever."""
    rows, details = drawn_parts(0, 4)

    def call():
        exchange = PartsOfMemory(rows, details, rank=0, capacity=4, parts=2, route=Route("", 1, "threads/0"))
        return exchange.collect(rows.float() * 2, after=exchange.own_TD)

    def run(space):
        others = {
            "begin": lambda: begin_op(rows, details, 4, 2, 1, "threads/0"),
            "gather": lambda: gather_op([rows], 4, 1, "threads/0"),
            "all_to_all": lambda: all_to_all_op(rows, 1, "threads/0"),
            "rows_of_ranks": lambda: rows_of_ranks_op(rows, torch.arange(4), 1, "threads/0"),
        }
        begin_op(rows, details, 4, 2, 1, "threads/0")
        with raises_catalogue(MoEStageError, expected="one call in parts after the other"):
            others[meanwhile]()
        space.handle.barrier()  # of the call that ended half way
        return call()

    assert torch.equal(on_threads(1, 4096, run)[0], rows * 2)


@pytest.mark.parametrize("rows", [0, 3])
def test_ops_have_fakes_and_are_captured(rows):
    hidden, details = torch.rand(rows, 4), torch.randint(0, 9, (rows, 2), dtype=torch.int32)

    def step(hidden, details):
        gathered, places = gather_op([hidden, details], 5, 1, "threads/0")
        return all_to_all_op(gathered * 2, 1, "threads/0"), places

    def run(space):
        exchanges = torch.ops.diffulex_exchange
        for op, args in (
            (exchanges.gather, ([hidden, details], 5, 1, "threads/0")),
            (exchanges.all_to_all, (hidden, 1, "threads/0")),
            (exchanges.rows_of_ranks, (hidden, torch.arange(rows), 1, "threads/0")),
        ):
            torch.library.opcheck(op.default, args)
            torch.library.opcheck(op.default, (*args, torch.empty(0, dtype=torch.int32)))
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


@pytest.mark.parametrize("failing", [None, "_allocate", "_share"])
def test_ranks_settle_on_one_answer(monkeypatch, failing):
    """What each rank is told: the same, whatever it found itself; and none waits for one that failed before."""
    group = SimpleNamespace(size=lambda: 2, group_name="g")
    table, failure = [told(made=3), told(device="1", made=5)], "RuntimeError: no"

    def asked(rank):
        """The answer on this rank where it is the one that fails (rank 1), or the other (rank 0)."""
        steps, replies = [], iter([table, *([None, None] for _ in range(failing == "_share")), [None, failure]])
        no_failure = iter([table, [None, None], [None, None]])

        def step(name):
            steps.append(name)
            if failing == name and rank == 1:
                raise RuntimeError("no")
            return name

        def tell(group, value):
            told_now = next(replies if failing else no_failure)
            assert value in (table[rank], told_now[rank])
            return told_now

        monkeypatch.setattr(symmetric, "told_by_ranks", tell)
        monkeypatch.setattr(symmetric, "_tell", lambda group, num_bytes, spaces: table[rank])
        monkeypatch.setattr(symmetric, "_allocate", lambda num_bytes: step("_allocate"))
        monkeypatch.setattr(symmetric, "_share", lambda memory, group: step("_share"))
        monkeypatch.setattr(symmetric, "_addresses", lambda handle: f"of {handle}")
        return workspace_for(group, "cuda", num_bytes=8), steps

    for rank in range(2):
        found, steps = asked(rank)
        assert (found.key if failing is None else str(found)) == (
            "g/6" if failing is None else f"PEERS: on rank 1: {failure}"
        )
        assert steps == ["_allocate", "_share"][: 1 if failing == "_allocate" else 2]


def test_kernels_find_the_buffers_where_there_are_kernels(monkeypatch):
    buffers = [torch.zeros(4, dtype=torch.uint8) for _ in range(3)]
    handle = SimpleNamespace(rank=1, world_size=3, get_buffer=lambda rank, sizes, dtype: buffers[rank][: sizes[0]])
    assert symmetric._addresses(handle).tolist() == [buffer.data_ptr() for buffer in buffers]
    monkeypatch.setattr(symmetric.importlib.util, "find_spec", lambda name: None)
    assert symmetric._addresses(handle) is None


def test_an_open_workspace_is_kept_while_ranks_talk_of_it(monkeypatch):
    """Its last layer may be garbage by then, and be collected on one rank alone."""
    group = SimpleNamespace(size=lambda: 2, group_name="g")
    owners = [Workspace(None, 8, key="g/7", group=group)]

    def asked(group, value):
        owners.clear()
        gc.collect()
        return [value, {**value, "device": "1"}]

    monkeypatch.setattr(symmetric, "_tell", lambda *args, **options: told(open="g/7"))
    monkeypatch.setattr(symmetric, "told_by_ranks", asked)
    assert workspace_for(group, "cuda", num_bytes=8).key == "g/7"


def test_where_there_is_no_symmetric_memory():
    one = SimpleNamespace(size=lambda: 1)
    assert workspace_for(one, "cpu", num_bytes=8).code is ReasonCode.NOT_CUDA
    assert workspace_for(one, "cuda", num_bytes=8).code is ReasonCode.PEERS
