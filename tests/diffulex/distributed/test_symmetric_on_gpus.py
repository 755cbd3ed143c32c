"""Exchanges between GPUs of one host. Symmetric memory: bit by bit what collectives give, in eager code and graphs."""

import pytest
import torch

from tests.support import gpu_rank_cases
from tests.support.ranks import running

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SIZE = 2


@pytest.fixture(scope="module")
def pair():
    with running(SIZE, "nccl") as group:
        yield group


def test_the_layer_says_that_memory_is_shared(pair):
    for text in pair.run(gpu_rank_cases.transport, SIZE):
        assert "dispatch by symmetric memory; combine by symmetric memory" in text


def test_exact_splits_in_one_graph(pair):
    assert pair.run(gpu_rank_cases.naive, SIZE) == [[], []]


@pytest.mark.parametrize("exact", [True, False])
def test_eager_outputs_and_gradients(pair, exact):
    assert pair.run(gpu_rank_cases.eager, SIZE, exact) == [[], []]


@pytest.mark.parametrize(("exact", "chunks"), [(True, 1), (False, 1), (False, 2), (False, 3)])
def test_compiled_and_replayed(pair, exact, chunks):
    assert pair.run(gpu_rank_cases.replayed, SIZE, exact, 300, chunks) == [[], []]


def test_a_graph_without_the_way_back(pair):
    assert pair.run(gpu_rank_cases.dispatched_only, SIZE, 60) == [[], []]


@pytest.mark.parametrize(("exact", "chunks"), [(True, 1), (False, 1), (False, 2), (False, 3)])
def test_the_host_waits_for_nothing(pair, exact, chunks):
    assert pair.run(gpu_rank_cases.without_host, SIZE, exact, chunks) == ["", ""]
