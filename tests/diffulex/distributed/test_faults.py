"""A rank that is gone or stuck: the others raise an error that names it, in time."""

import functools
import time
from types import SimpleNamespace

import pytest
import torch

from diffulex.distributed import faults, naming_lost_ranks
from diffulex.moe import MoESpec
from lowering.errors import MoERangeError, MoERankError, MoEStageError
from lowering.spec import RoutingSpec
from tests.support import rank_cases
from tests.support.catalogue import raises_catalogue
from tests.support.moe_layers import swiglu_experts
from tests.support.rank_cases import Case
from tests.support.ranks import running

TIMEOUT, SIZE = 2.0, 3
CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5793"
TIMED_OUT = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 6000ms for recv"
SPEC = MoESpec(32, RoutingSpec(2), swiglu_experts(6, 32, 32))
WAYS = {
    "naive": (("dispatcher", "naive"),),
    "static": (("dispatcher", "static"), ("max_tokens_per_rank", 4)),
    "tp": (("mode", "tp"),),
}


@pytest.mark.parametrize(("way", "how", "lost"), [("naive", "stuck", 1), ("static", "killed", 0), ("tp", "killed", 2)])
def test_a_lost_rank_is_named(way, how, lost, record_property):
    """Killed: gloo sees it at once, and nobody waits for the timeout of the group."""
    case = Case(SPEC, (4,) * SIZE, options=WAYS[way])
    limit = TIMEOUT if how == "stuck" else 0.0
    with running(SIZE, timeout=TIMEOUT if how == "stuck" else 60.0) as group:
        told = group.run_without(lost, functools.partial(rank_cases.lose_a_rank, how=how, lost=lost), case, SIZE)
    assert len(told) == SIZE - 1
    record_property("seconds_over_the_limit", round(max(seconds for *_, seconds in told) - limit, 1))
    for kind, text, seconds in told:
        assert kind == "MoERankError" and f"nothing from rank {lost} (" in text, text
        assert seconds < limit + 5


def test_failures_that_only_some_ranks_had_do_not_hide_a_later_one():
    case = Case(SPEC, (4,) * SIZE, options=WAYS["naive"])
    with running(SIZE, timeout=60.0) as group:
        told = group.run_without(2, functools.partial(rank_cases.lose_a_rank_again, alone=(0, 2), lost=2), case, SIZE)
    assert len(told) == SIZE - 1
    for text in told:
        assert "nothing from rank 2 (" in text, text


class Store:
    """A store that other ranks have written to, which is gone after so many questions."""

    def __init__(self, *ranks, questions=10**6):
        self.ranks, self.own, self.questions = ranks, set(), questions

    def set(self, key, value):
        self.own.add(key)

    def delete_key(self, key):
        if key not in self.own:
            raise RuntimeError("refused")
        self.own.remove(key)

    def check(self, keys):
        self.questions -= 1
        if self.questions < 0:
            raise RuntimeError("refused")
        return all(int(key.rpartition("/")[2]) in self.ranks for key in keys)


@pytest.fixture
def group(monkeypatch):
    """Four ranks, of which this is the second, and exchanges without patience."""
    monkeypatch.setattr(faults, "GRACE", 0.1)
    monkeypatch.setattr(faults, "_said", set())
    monkeypatch.setattr(faults, "timeout_of", lambda group: faults.timedelta(0))
    monkeypatch.setattr(faults.distributed, "get_process_group_ranks", lambda group: [4, 5, 6, 7])
    return SimpleNamespace(group_name="four", size=lambda: 4, rank=lambda: 1)


def fail(group, error):
    with naming_lost_ranks(group):
        raise error


@pytest.mark.parametrize(("here", "got"), [((0, 2), "rank 7 ("), ((3,), "ranks 4, 6 ("), ((0, 2, 3), "some rank (")])
def test_ranks_are_named_as_in_the_whole_job(group, monkeypatch, here, got):
    store = Store(*here)
    monkeypatch.setattr(faults, "_store_of", lambda group: store)
    with raises_catalogue(MoERankError, expected="the ranks 4, 5, 6, 7", got=f"nothing from {got}"):
        fail(group, RuntimeError(TIMED_OUT))
    (own,) = store.own
    assert own.endswith("/1")


def test_what_a_rank_said_holds_until_it_comes_again(group, monkeypatch):
    store = Store()
    monkeypatch.setattr(faults, "_store_of", lambda group: store)
    for _ in range(2):
        with pytest.raises(MoERankError):
            fail(group, RuntimeError(TIMED_OUT))
        assert len(store.own) == 1
    for _ in range(2):
        with naming_lost_ranks(group):
            assert not store.own


@pytest.mark.parametrize(
    ("text", "here", "timeout", "got"),
    [
        (CLOSED, (0, 2), 60.0, "rank 7 ("),
        (CLOSED, (0,), 0.5, "ranks 6, 7 ("),
        (TIMED_OUT, (0, 2), 0.5, "rank 7 ("),
        ("NCCL error in: socket.cc:1, Connection closed by peer", (0, 2), 0.5, "rank 7 ("),
    ],
)
def test_one_rank_lost_to_gloo_is_told_before_the_timeout(group, monkeypatch, text, here, timeout, got):
    """Of two one may be late; and NCCL's other ranks do not see a loss before their own timeout."""
    monkeypatch.setattr(faults, "_store_of", lambda group: Store(*here))
    monkeypatch.setattr(faults, "timeout_of", lambda group: faults.timedelta(seconds=timeout))
    began = time.monotonic()
    with raises_catalogue(MoERankError, got=f"nothing from {got}"):
        fail(group, RuntimeError(text))
    assert (time.monotonic() - began < timeout) == (timeout == 60.0)


@pytest.mark.parametrize(
    ("questions", "got", "known"),
    [
        (0, "some rank (", "no rank could be asked"),
        (2, "some rank (", "no rank could be asked"),
        (3, "ranks 6, 7 (", "what is named was missing by then"),
        (4, "ranks 6, 7 (", "what is named was missing by then"),
    ],
)
def test_a_store_that_is_gone_is_told(group, monkeypatch, questions, got, known):
    """With who was missing when every rank had been asked."""
    store = Store(0, questions=questions)
    monkeypatch.setattr(faults, "GRACE", 60.0)
    monkeypatch.setattr(faults, "_store_of", lambda group: store)
    with pytest.raises(MoERankError) as caught:
        fail(group, RuntimeError(CLOSED))
    assert f"nothing from {got}" in str(caught.value)
    assert f"; the store's keeper, usually rank 0, is lost, and {known}: refused)" in str(caught.value)


def test_a_store_that_is_gone_does_not_keep_from_going_on(group, monkeypatch):
    store = Store()
    monkeypatch.setattr(faults, "_store_of", lambda group: store)
    with pytest.raises(MoERankError):
        fail(group, RuntimeError(TIMED_OUT))
    store.own.clear()
    with naming_lost_ranks(group):
        assert not faults._said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(CLOSED),
        RuntimeError(TIMED_OUT),
        RuntimeError(f"Gloo connectFullMesh failed with {CLOSED}"),
        RuntimeError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=8)"),
        torch.distributed.DistBackendError("unhandled system error"),
        torch.distributed.DistNetworkError("Broken pipe"),
        torch.distributed.DistStoreError("wait timeout after 100ms"),
    ],
)
def test_errors_of_exchanges(group, monkeypatch, error):
    monkeypatch.setattr(faults, "_store_of", lambda group: Store(0, 2, 3))
    with raises_catalogue(MoERankError, got=str(error)[:40]):
        fail(group, error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of memory"),
        RuntimeError("metrics: connection to 10.0.0.7 refused"),
        RuntimeError("[loader:12] read timed out: Connection reset by peer"),
        RuntimeError("the gloo or NCCL ProcessGroup of the data has a timeout of 5 s"),
        MoERangeError("connection"),
        MoEStageError(CLOSED),
        ValueError(CLOSED),
    ],
)
def test_other_errors_are_left_as_they_are(group, monkeypatch, error):
    asked = []
    monkeypatch.setattr(faults, "_store_of", lambda group: asked.append(1) or Store(0, 2, 3))
    with pytest.raises(type(error)) as caught:
        fail(group, error)
    assert caught.value is error and not asked


def test_the_timeout_is_that_of_the_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=faults.timedelta(seconds=7))
    try:
        assert faults.timeout_of(torch.distributed.group.WORLD).total_seconds() == 7
    finally:
        torch.distributed.destroy_process_group()
