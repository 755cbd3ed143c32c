"""The distributions of expert ids, and that ids, weights and logits of a set belong together."""

import pytest
import torch

from diffulex.benching.inputs import ROUTINGS, SOURCES, count_of_sets, draw_logits, make_inputs, route
from diffulex.benching.shapes import Shape

SHAPE = Shape(num_experts=16, top_k=4, hidden=8, intermediate=8)


def made(tokens, *, routing, sets=1, shape=SHAPE, **given):
    return make_inputs(shape, tokens, sets=sets, routing=routing, device="cpu", **given)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_ids_and_weights_are_those_of_the_logits(routing):
    (one,) = made(200, routing=routing)
    weights_TK, ids_TK = route(one.logits_TE, 4, dtype=torch.bfloat16)
    assert torch.equal(one.ids_TK, ids_TK) and torch.equal(one.weights_TK, weights_TK)
    assert one.hidden_TH.dtype == one.weights_TK.dtype == torch.bfloat16 and one.logits_TE.dtype == torch.float32
    assert all(len(set(row)) == 4 for row in one.ids_TK.tolist()), "an expert comes twice"
    assert one.logits_TE.isfinite().all() and (one.weights_TK > 0).all()
    torch.testing.assert_close(one.weights_TK.float().sum(-1), torch.ones(200), atol=0.02, rtol=0)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_sets_are_seeded_and_differ(routing):
    first, again = (made(5, routing=routing, sets=2) for _ in range(2))
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(first[0].hidden_TH, first[1].hidden_TH)
    assert not torch.equal(first[0].ids_TK.sort().values, first[1].ids_TK.sort().values)


def test_uniform_experts_are_equally_popular():
    (one,) = made(20000, routing="uniform")
    share_E = one.ids_TK.flatten().bincount(minlength=16) / 20000
    assert (share_E - 4 / 16).abs().max() < 0.02


def test_zipf_popularity_falls_as_one_over_the_rank():
    (one,) = made(40000, routing="zipf", shape=Shape(16, 1, 8, 8))
    share_E = one.ids_TK.flatten().bincount(minlength=16).sort(descending=True).values / 40000
    expected_E = 1 / torch.arange(1, 17)
    expected_E /= expected_E.sum()
    assert (share_E - expected_E).abs().max() < 0.01


def test_zipf_without_repeats_follows_successive_draws():
    """Gumbel top-k: the second expert is drawn from what the first one left."""
    shape = Shape(3, 2, 8, 8)
    logits_TE = draw_logits("zipf", 60000, shape=shape, generator=torch.Generator().manual_seed(1))
    order_E = logits_TE.topk(1).indices.flatten().bincount(minlength=3).argsort(descending=True)
    first_T, second_T = logits_TE.topk(2).indices.T
    p_E = torch.tensor([6 / 11, 3 / 11, 2 / 11])
    for rank, other in ((0, 1), (1, 0), (2, 0)):
        after = second_T[first_T == order_E[rank]] == order_E[other]
        assert float(after.float().mean()) == pytest.approx(float(p_E[other] / (1 - p_E[rank])), abs=0.015)


def test_one_hot_is_the_same_experts_for_all_tokens_of_a_set():
    sets = made(300, routing="one-hot", sets=4)
    assert [one.ids_TK.unique().numel() for one in sets] == [4] * 4
    assert len({tuple(one.ids_TK.unique().tolist()) for one in sets}) > 1, "one set's experts would stay in the cache"
    assert len({tuple(row) for row in sets[0].ids_TK.tolist()}) > 1, "the order among them is drawn"


def test_what_a_function_is_given():
    (one,) = made(6, routing="uniform")
    assert [tuple(t.shape) for t in one.of("topk")] == [(6, 8), (6, 4), (6, 4)]
    assert [tuple(t.shape) for t in one.of("logits")] == [(6, 8), (6, 16)]
    assert set(SOURCES) == {"topk", "logits"}
    few = one.rows(torch.tensor([5, 0]))
    assert torch.equal(few.hidden_TH, one.hidden_TH[[5, 0]]) and few.logits_TE.shape == (2, 16)


def test_sets_grow_fewer_with_tokens():
    assert [count_of_sets(tokens) for tokens in (1, 8, 9, 512, 513, 16384)] == [16, 16, 4, 4, 2, 2]
