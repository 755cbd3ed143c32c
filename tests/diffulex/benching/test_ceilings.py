"""The floor of a benchmark counts what the timed inputs read."""

import pytest
import torch
from benchmarks.bench_experts import floor
from benchmarks.shapes import Shape


def inputs_of(ids_TK):
    return torch.zeros(ids_TK.shape[0], 4), ids_TK, torch.zeros(ids_TK.shape)


def test_experts_are_counted_in_the_ids():
    shape = Shape(num_experts=8, top_k=2, hidden=4, intermediate=3)
    one = inputs_of(torch.tensor([[0, 1], [0, 1]]))
    other = inputs_of(torch.tensor([[0, 1], [2, 3]]))
    weights, activations = 3 * 4 * 3 * 2, 2 * 2 * 4 * 2
    rates = {"matrix_rate": 1e30, "read_rate": 1e6}
    assert floor(shape, [one], **rates) == pytest.approx(2 * weights + activations)
    assert floor(shape, [one, other], **rates) == pytest.approx(3 * weights + activations)
    rates = {"matrix_rate": 1e6, "read_rate": 1e30}
    assert floor(shape, [one, other], **rates) == pytest.approx(6 * 2 * 2 * 4 * 3)
