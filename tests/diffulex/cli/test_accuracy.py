"""The ratio rule as the demo applies it, and the float64 oracle."""

import math

import pytest
import torch

from diffulex.cli.accuracy import Oracle, error_ratio
from tests.support.models import build_model, token_ids

EXACT = torch.linspace(-3, 3, 1001, dtype=torch.float64) ** 3


def off_by(relative, dtype):
    """The exact values, each wrong by the given share of the largest one, with alternating sign."""
    sign = torch.tensor([1.0, -1.0]).repeat(501)[:1001].double()
    return (EXACT + sign * relative * EXACT.abs().max()).to(dtype)


def ratio(ours, eager):
    return error_ratio([ours], [eager], oracle=[EXACT])


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-6), (torch.bfloat16, 0.05)])
def test_the_error_of_eager_itself_passes(dtype, eps):
    found = ratio(off_by(eps, dtype), off_by(eps, dtype))
    assert not found.problem
    assert found.mean == pytest.approx(1.0) and found.largest == pytest.approx(1.0)


@pytest.mark.parametrize(("dtype", "eps", "factor"), [(torch.float32, 1e-6, 11), (torch.bfloat16, 0.05, 1.2)])
def test_a_larger_mean_error_breaks_the_rule(dtype, eps, factor):
    found = ratio(off_by(factor * eps, dtype), off_by(eps, dtype))
    assert "mean error" in found.problem
    assert found.mean == pytest.approx(factor, rel=0.05)


def test_a_single_wrong_value_breaks_the_rule():
    ours = off_by(0.05, torch.bfloat16)
    ours[7] += 8
    assert "largest error" in ratio(ours, off_by(0.05, torch.bfloat16)).problem


def test_eager_that_is_exact_by_luck_is_no_scale():
    rounded = EXACT.to(torch.bfloat16)
    assert not error_ratio([rounded], [rounded], oracle=[rounded.double()]).problem
    assert not ratio(rounded, rounded).problem


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_break_the_rule_unless_the_oracle_has_them_too(value):
    broken, exact = EXACT.float(), EXACT.clone()
    broken[3] = value
    assert "at 1 places, the oracle has 0" in ratio(broken, EXACT.float()).problem
    exact[3] = value
    assert not error_ratio([broken], [EXACT.float()], oracle=[exact]).problem
    for other in {math.nan, math.inf, -math.inf} - {value}:
        exact[3] = other
        assert "places, the oracle has" in error_ratio([broken], [EXACT.float()], oracle=[exact]).problem


def test_eager_that_is_not_finite_excuses_nothing():
    stock, ours = EXACT.float(), EXACT.float()
    stock[3] = math.nan
    assert not ratio(ours, stock).problem
    ours[3] += 100
    assert "error over" in ratio(ours, stock).problem
    assert "error over" in ratio(ours, torch.full_like(stock, math.nan)).problem


def test_values_of_which_none_is_finite_are_not_compared():
    nothing = torch.full((3,), math.nan)
    assert "none of 3 values" in error_ratio([nothing], [nothing], oracle=[nothing.double()]).problem


def test_shapes_and_dtypes_must_agree_and_nothing_is_a_result_too():
    assert "shapes [1001], expected [2]" in error_ratio([EXACT], [EXACT], oracle=[EXACT[:2]]).problem
    assert "bfloat16" in ratio(EXACT.bfloat16(), EXACT.float()).problem
    empty = error_ratio([torch.zeros(1, 0, 4)], [torch.zeros(1, 0, 4)], oracle=[torch.zeros(1, 0, 4).double()])
    assert str(empty) == "empty" and not empty.problem


def test_the_oracle_computes_in_float64_where_the_model_asks_for_float32():
    model = build_model("qwen3_moe")
    ids = token_ids(model, 1, 9)
    oracle, dtypes = Oracle(model), set()
    for module in oracle.model.modules():
        if "RMSNorm" in type(module).__name__ or "Router" in type(module).__name__:
            module.register_forward_hook(
                lambda _m, _i, out: dtypes.add(out.dtype if torch.is_tensor(out) else out[1].dtype)
            )
    exact = oracle(lambda ids: oracle.model(input_ids=ids, use_cache=False).logits, ids)
    assert exact.dtype == torch.float64 and dtypes == {torch.float64}
    with torch.no_grad():
        plain = oracle.model(input_ids=ids, use_cache=False).logits  # norms and router scores in float32
    assert 1e-9 < (exact - plain).abs().max() < 1e-3
    assert model.config._experts_implementation != "eager"
