"""The work of a call counts what the timed inputs read; the floor is the longer of arithmetic and bytes."""

import pytest
import torch

from diffulex.benching import ceilings
from diffulex.benching.ceilings import Ceilings, Work, measure_ceilings, work_of
from diffulex.benching.inputs import Inputs
from lowering.spec import ExpertSpec

SPEC = ExpertSpec(num_experts=8, hidden_size=4, intermediate_size=3, act="silu(g) * u")


def inputs_of(*ids, dtype=torch.bfloat16):
    ids_TK = torch.tensor(ids)
    tokens = len(ids)
    return Inputs(torch.zeros(tokens, 4, dtype=dtype), ids_TK, torch.zeros(ids_TK.shape), torch.zeros(tokens, 8))


def test_experts_are_counted_in_the_ids():
    one, other = inputs_of([0, 1], [0, 1]), inputs_of([0, 1], [2, 3])
    weights, activations = 3 * 4 * 3 * 2, 2 * 2 * 4 * 2
    assert work_of(SPEC, [one]).bytes == 2 * weights + activations
    assert work_of(SPEC, [one, other]).bytes == 3 * weights + activations
    assert work_of(SPEC, [one, other]).flop == 6 * 2 * 2 * 4 * 3


def test_work_by_hand():
    # Qwen3's sizes at one token: 8 experts of three 2048 x 768 matrices in two bytes, a row of 2048 in and out
    spec = ExpertSpec(128, 2048, 768, "silu(g) * u")
    one = Inputs(
        torch.zeros(1, 2048, dtype=torch.bfloat16), torch.arange(8)[None], torch.zeros(1, 8), torch.zeros(1, 1)
    )
    work = work_of(spec, [one])
    assert (work.flop, work.bytes) == (75_497_472, 75_505_664)
    # the README's 18 us at 4206 GB/s
    assert work.floor(Ceilings(755e12, 4206e9)) == pytest.approx(17.95, abs=0.01)


def test_what_else_counts():
    one = inputs_of([0, 1], [0, 1])
    assert work_of(SPEC, [one], source="logits").bytes == work_of(SPEC, [one]).bytes + 2 * 8 * 4
    wide = work_of(SPEC, [inputs_of([0, 1], [0, 1], dtype=torch.float32)])
    assert wide.bytes == 2 * work_of(SPEC, [one]).bytes and wide.flop == work_of(SPEC, [one]).flop
    ungated = ExpertSpec(8, 4, 3, "relu(g)", gated=False)
    assert work_of(ungated, [one]) == Work(4 * 2 * 2 * 4 * 3, 2 * 2 * 4 * 3 * 2 + 2 * 2 * 4 * 2)


def test_the_floor_is_the_longer_of_the_two():
    work = Work(flop=6e6, bytes=2e6)
    assert work.floor(Ceilings(matrix_rate=1e12, read_rate=1e15)) == pytest.approx(6.0)
    assert work.floor(Ceilings(matrix_rate=1e15, read_rate=1e12)) == pytest.approx(2.0)
    assert work.intensity == 3


@pytest.mark.parametrize(("dtype", "side"), [(torch.float32, 16), (torch.bfloat16, 8)])
def test_both_rates_are_measured(dtype, side, monkeypatch):
    seconds = iter([[5.0, 2.0, 3.0], [4.0, 9.0, 8.0]])
    products = []

    def call_seconds(function, *, device):
        products.append(function())
        return next(seconds)

    monkeypatch.setattr(ceilings, "_SIDE", {"cpu": 16})
    monkeypatch.setattr(ceilings, "_READ_BYTES", {"cpu": 4096})
    monkeypatch.setattr(ceilings, "call_seconds", call_seconds)
    assert measure_ceilings(torch.device("cpu"), dtype) == Ceilings(2 * side**3 / 2.0, 4096 / 4.0)
    assert products[0].shape == (side, side) and products[0].dtype == dtype and products[1].dim() == 0


def test_rates_are_told_in_units():
    assert str(Ceilings(755.4e12, 4206e9)) == "755 TFLOP/s, 4.21 TB/s"
    assert str(Ceilings(93.21e9, 21.77e9)) == "93.2 GFLOP/s, 21.8 GB/s"
