"""The comparisons of the suite must fail where they should: a tolerance that accepts anything proves nothing."""

import math

import pytest
import torch

from tests.support.oracle import assert_near_exact, assert_oracle_ratio, gradients

LOW = [torch.float32, torch.float16, torch.bfloat16]
SHAPE = (64, 32)


def case(dtype):
    """An oracle, and an eager result with about twice the error of rounding once."""
    generator = torch.Generator().manual_seed(0)
    oracle = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64) * torch.finfo(dtype).eps
    return oracle, (oracle * (1 + noise)).to(dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rounding_once_and_eager_itself_pass(dtype):
    oracle, eager = case(dtype)
    assert_oracle_ratio(oracle.to(dtype), eager, oracle)
    assert_oracle_ratio(eager, eager, oracle)
    assert_oracle_ratio(oracle.to(dtype), oracle.to(dtype), oracle)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_mean_error_over_the_ratio_fails(dtype):
    oracle, eager = case(dtype)
    factor = 12.0 if dtype == torch.float32 else 1.3
    ours = oracle + (eager.double() - oracle) * factor
    with pytest.raises(AssertionError, match="mean error over"):
        assert_oracle_ratio((ours + ours.sign() * torch.finfo(dtype).eps).to(dtype), eager, oracle)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_one_wrong_element_fails(dtype):
    oracle, eager = case(dtype)
    ours = oracle.to(dtype)
    ours[3, 5] += 60 * torch.finfo(dtype).eps * oracle.abs().max()
    with pytest.raises(AssertionError, match=r"(largest|mean) error over"):
        assert_oracle_ratio(ours, eager, oracle)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
def test_masks_must_be_equal(dtype, value):
    oracle, eager = case(dtype)
    ours = oracle.to(dtype, copy=True)
    oracle[0, 0] = value
    with pytest.raises(AssertionError, match="at 0 places, the oracle has 1"):
        assert_oracle_ratio(ours, eager, oracle)
    ours[0, 0] = value
    assert_oracle_ratio(ours, eager, oracle)
    for other in {0.0, math.inf, -math.inf, math.nan} - {value}:
        oracle[0, 0] = other
        with pytest.raises(AssertionError, match="places, the oracle has"):
            assert_oracle_ratio(ours, eager, oracle)


def test_a_place_where_only_eager_overflows_must_still_be_right():
    oracle, eager = case(torch.float16)
    eager[1, 1] = math.inf
    assert_oracle_ratio(oracle.half(), eager, oracle)
    with pytest.raises(AssertionError, match=r"\+inf at 1 places"):
        assert_oracle_ratio(eager, eager, oracle)
    wrong = oracle.half()
    wrong[1, 1] += 1
    with pytest.raises(AssertionError, match=r"(largest|mean) error over"):
        assert_oracle_ratio(wrong, eager, oracle)


def test_an_overflow_of_the_dtype_is_expected_of_both():
    oracle, _ = case(torch.float16)
    oracle[0, 0] = 1e6
    assert_oracle_ratio(oracle.half(), oracle.half(), oracle)
    with pytest.raises(AssertionError, match=r"\+inf at 0 places"):
        assert_oracle_ratio(oracle.half().nan_to_num(), oracle.half(), oracle)


def test_exact_eager_asks_for_an_exact_result():
    oracle = torch.arange(8.0, dtype=torch.float64)
    exact = oracle.bfloat16()
    assert_oracle_ratio(exact, exact, oracle)
    with pytest.raises(AssertionError, match="mean error over"):
        assert_oracle_ratio(exact * 1.0078125, exact, oracle)


def test_shape_dtype_and_oracle_are_checked():
    oracle, eager = case(torch.bfloat16)
    for ours, other, exact in (
        (eager[:1], eager, oracle),
        (eager.half(), eager, oracle),
        (eager, eager, oracle[:1]),
        (eager, eager, oracle.float()),
    ):
        with pytest.raises(AssertionError):
            assert_oracle_ratio(ours, other, exact)


def test_near_exact_is_relative_to_the_largest_value():
    oracle = torch.tensor([1e-3, 2.0, -1000.0], dtype=torch.float64)
    assert_near_exact(oracle * (1 + 5e-13), oracle)
    assert_near_exact(oracle * 1e-200, oracle * 1e-200)
    for scale in (1.0, 1e-200, 1e200):
        with pytest.raises(AssertionError, match="error"):
            assert_near_exact(oracle * scale * (1 + 2e-12), oracle * scale)
    with pytest.raises(AssertionError, match="error"):
        assert_near_exact(torch.full((2,), 1e-300, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty_tensors_agree(shape):
    empty = torch.zeros(shape)
    assert_oracle_ratio(empty, empty, empty.double())
    assert_near_exact(empty.double(), empty.double())


def test_gradients_are_by_position_and_zero_where_unused():
    first, second = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    found = gradients(lambda a, number, b: a * number, (first, 3.0, second), torch.tensor([1.0, 2.0]))
    assert {i: g.tolist() for i, g in found.items()} == {0: [3.0, 6.0], 2: [0.0, 0.0]}
    found = gradients(lambda a: torch.zeros(2), (first,), torch.ones(2))
    assert found[0].tolist() == [0.0, 0.0]
