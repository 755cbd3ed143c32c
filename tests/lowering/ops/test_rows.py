"""The ops on a CPU where results may not depend on the batch: each row by itself, bitwise the same in every batch."""

import contextlib

import pytest
import torch

from lowering.ops._rows import rows_alone
from lowering.state import batch_invariant

ops = torch.ops.diffulex
E, K, H, WIDTH = 5, 2, 37, 29  # no multiples of a vector
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def inputs(tokens, dtype, bias=False):
    generator = torch.Generator().manual_seed(0)
    sizes = [(E, 2 * WIDTH, H), (E, H, WIDTH), (E, 2 * WIDTH), (E, H), (tokens, E), (tokens, H)]
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64) / size[-1] ** 0.5 for size in sizes]
    w13_EJH, w2_EHI, b13_EJ, b2_EH, logits_TE, hidden_TH = (tensor.to(dtype) for tensor in drawn)
    return 5 * hidden_TH, 5 * logits_TE, w13_EJH, b13_EJ if bias else None, w2_EHI, b2_EH if bias else None


def block(hidden_TH, logits_TE, w13_EJH, b13_EJ, w2_EHI, b2_EH):
    """What the ops come to, and the weights, side by side."""
    weights_TK, ids_TK = ops.moe_route(logits_TE, None, None, K, "sqrtsoftplus")
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, E)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, b13_EJ, order_N, offsets_E1, K, "swiglu")
    out_TH = ops.moe_combine(ops.moe_expert_down(act_NI, w2_EHI, b2_EH, order_N, offsets_E1), weights_TK)
    return torch.cat((out_TH.to(weights_TK.dtype), weights_TK), 1)


def of_rows(rows, given):
    hidden_TH, logits_TE, *weights = given
    return block(hidden_TH[rows], logits_TE[rows], *weights)


PARTS = (slice(0, 1), slice(1, 4), [7, 3], torch.arange(99, -1, -1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_the_batch(dtype, bias):
    given = inputs(100, dtype, bias)
    with batch_invariant():
        whole = block(*given)
        for rows in PARTS:
            assert torch.equal(of_rows(rows, given), whole[rows])
    torch.testing.assert_close(whole, block(*given), rtol=0.05 if dtype.itemsize == 2 else 1e-4, atol=1e-2)


COUNTS = (1, 4, 16, 64, 257, 1024)


def differing(dtype):
    """The counts whose first rows have other bits than those of the largest batch."""
    given = inputs(COUNTS[-1], dtype)
    whole = block(*given)
    return [count for count in COUNTS if not torch.equal(of_rows(slice(0, count), given), whole[:count])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_tokens(dtype, record_property):
    with batch_invariant():
        found = differing(dtype)
    record_property("differing_counts", len(found))
    assert found == []


def test_by_default_the_number_of_tokens_is_seen(record_property):
    """The control."""
    found = differing(torch.float64)
    record_property("differing_counts_of_the_control", len(found))
    assert set(found) & {1, 4, 16}


def test_by_default_they_do():
    """The control."""
    given = inputs(100, torch.float64)
    whole = block(*given)
    assert any(not torch.equal(of_rows(rows, given), whole[rows]) for rows in PARTS)


def test_rows_of_no_expert_are_zero():
    given = inputs(3, torch.float32, bias=True)
    ids_TK = torch.tensor([[E, 0], [E, E], [1, -1]], dtype=torch.int32)
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, E)
    for mode in (batch_invariant(), contextlib.nullcontext()):
        with mode:
            act_NI = ops.moe_expert_up(given[0], given[2], given[3], order_N, offsets_E1, K, "swiglu")
            slots_NH = ops.moe_expert_down(act_NI, given[4], given[5], order_N, offsets_E1)
        assert act_NI[:2].all() and not act_NI[2:].any()
        assert not slots_NH[[0, 2, 3, 5]].any()


def test_no_rows():
    with batch_invariant():
        assert block(*inputs(0, torch.float32)).shape == (0, H + K)


def test_calls():
    seen = []

    def function(left_NX, right_NX):
        seen.append(None if right_NX is None else right_NX.shape[0])
        return (left_NX + 1, left_NX - 1) if right_NX is None else left_NX + right_NX

    left_NX = torch.arange(6.0).view(3, 2)
    assert torch.equal(rows_alone(function, left_NX, left_NX), 2 * left_NX)
    with batch_invariant():
        assert torch.equal(rows_alone(function, left_NX, left_NX), 2 * left_NX)
        more, less = rows_alone(function, left_NX, None)
    assert torch.equal(more - 1, left_NX) and torch.equal(less + 1, left_NX)
    assert seen == [3, 1, 1, 1, None, None, None]
