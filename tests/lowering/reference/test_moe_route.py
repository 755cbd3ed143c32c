"""The oracle of routing by hand, and against the formulas of stock models where these have no ties."""

import math

import pytest
import torch

from lowering.errors import MoERangeError
from lowering.reference.moe_route import moe_route_reference
from lowering.spec import RoutingSpec


def logits_of(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_softmax_by_hand():
    logits = logits_of([[0.1, 0.5, 0.15, 0.25]])
    weights, ids = moe_route_reference(logits, RoutingSpec(2))
    assert ids.tolist() == [[1, 3]] and ids.dtype == torch.int32
    torch.testing.assert_close(weights, torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64))
    weights, _ = moe_route_reference(logits, RoutingSpec(2, renorm=False, scale=4.0))
    torch.testing.assert_close(weights, torch.tensor([[2.0, 1.0]], dtype=torch.float64))
    weights, _ = moe_route_reference(logits, RoutingSpec(2, eps=0.25))
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.25]], dtype=torch.float64))


def test_bias_changes_the_choice_and_not_the_weight():
    weights, ids = moe_route_reference(
        torch.zeros(1, 3), RoutingSpec(1, "sigmoid", renorm=False), bias_E=torch.tensor([0.0, 0.0, 1.0])
    )
    assert ids.tolist() == [[2]] and weights.tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("group_score", "group_fill", "wanted"),
    [
        ("max", "-inf", [0, 1, 2]),
        ("top2_sum", "-inf", [2, 3, 0]),
        ("max", "0", [0, 1, 2]),
        ("top2_sum", "0", [2, 3, 0]),
    ],
)
def test_groups_by_hand(group_score, group_fill, wanted):
    """Groups (0.9, 0.1) and (0.6, 0.5): the first has the greatest score, the second the greatest sum."""
    probabilities = torch.tensor([[0.9, 0.1, 0.6, 0.5]], dtype=torch.float64)
    spec = RoutingSpec(3, "sigmoid", 2, 1, group_score, group_fill, renorm=False)
    weights, ids = moe_route_reference(probabilities.logit(), spec)
    assert ids.tolist() == [wanted]
    torch.testing.assert_close(weights, probabilities[:, wanted])


@pytest.mark.parametrize(("bias", "wanted"), [(0.5, [2, 3]), (2.0, [0, 2]), (3.0, [0, 2])])
def test_a_fill_of_zero_beats_a_negative_choice(bias, wanted):
    """Scores are 0.5. A bias of 2 makes the sums of the two groups equal: the first one wins."""
    spec = RoutingSpec(2, "sigmoid", 2, 1, group_fill="0")
    _, ids = moe_route_reference(torch.zeros(1, 4), spec, bias_E=torch.tensor([bias, -2.0, 0.0, 0.0]))
    assert ids.tolist() == [wanted]


def test_ties_and_nan():
    _, ids = moe_route_reference(torch.tensor([[1.0, 2.0, 2.0, 1.0]]), RoutingSpec(4))
    assert ids.tolist() == [[1, 2, 0, 3]]
    weights, ids = moe_route_reference(torch.tensor([[0.0, math.inf, math.nan, 1.0]]), RoutingSpec(4, "sigmoid"))
    assert ids.tolist() == [[2, 1, 3, 0]] and weights.isnan().all()


def test_given_ids_outside_weigh_nothing():
    ids = torch.tensor([[1, 4, -1], [4, 5, 6]])
    weights, out = moe_route_reference(torch.zeros(2, 4), RoutingSpec(3), ids_TK=ids)
    assert out.tolist() == [[1, 4, 4], [4, 4, 4]]
    assert weights.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_equals_the_formula_of_deepseek_v3():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    bias = torch.randn(16, generator=generator, dtype=torch.float64)
    spec = RoutingSpec(4, "sigmoid", 4, 2, eps=1e-20, scale=2.5)
    weights, ids = moe_route_reference(logits, spec, bias_E=bias)
    scores = logits.sigmoid()
    grouped = (scores + bias).view(50, 4, 4)
    kept = torch.zeros(50, 4).scatter(1, grouped.topk(2).values.sum(2).topk(2).indices, 1.0).bool()
    wanted = grouped.masked_fill(~kept.unsqueeze(2), -math.inf).flatten(1).topk(4).indices
    assert torch.equal(ids.long(), wanted)
    chosen = scores.gather(1, wanted)
    torch.testing.assert_close(weights, chosen / (chosen.sum(1, keepdim=True) + 1e-20) * 2.5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_by_formula(score, dtype):
    z = [-3.0, 0.25, 2.0]
    exact = {
        "softmax": [math.exp(v) / sum(math.exp(u) for u in z) for v in z],
        "sigmoid": [1 / (1 + math.exp(-v)) for v in z],
        "sqrtsoftplus": [math.sqrt(math.log1p(math.exp(v))) for v in z],
    }[score]
    weights, ids = moe_route_reference(torch.tensor([z]), RoutingSpec(3, score, renorm=False), dtype=dtype)
    assert ids.tolist() == [[2, 1, 0]] and weights.dtype == dtype
    torch.testing.assert_close(weights, torch.tensor([exact[::-1]], dtype=dtype))


def test_options_without_a_meaning_are_refused():
    with pytest.raises(MoERangeError):
        moe_route_reference(torch.zeros(1, 2), RoutingSpec(3))


def weights_of(scores, spec, **options):
    """Weights of one token with these sigmoid scores."""
    logits = torch.tensor([scores], dtype=torch.float64).logit()
    weights, ids = moe_route_reference(logits, spec, **options)
    return weights[0].tolist(), ids[0].tolist()


def test_norms_by_hand():
    """Scores 0.8 and 0.6: their 2-norm is 1."""
    spec = RoutingSpec(2, "sigmoid", renorm=2.0, scale=10.0)
    weights, ids = weights_of([0.6, 0.1, 0.8], spec)
    assert ids == [2, 0] and weights == pytest.approx([8.0, 6.0])
    half, _ = weights_of([0.64, 0.1, 0.81], RoutingSpec(2, "sigmoid", renorm=0.5))
    assert half == pytest.approx([0.81 / 1.7**2, 0.64 / 1.7**2])


@pytest.mark.parametrize(
    ("options", "divisor"),
    [
        ({"eps": 0.6}, 2.0),
        ({"eps": 0.6, "eps_mode": "clamp_min"}, 1.4),
        ({"eps": 2.0, "eps_mode": "clamp_min"}, 2.0),
        ({"eps": 0.0, "eps_mode": "clamp_min"}, 1.4),
        ({"renorm": 2.0, "eps": 0.5}, 1.5),
        ({"renorm": 2.0, "eps": 4.0, "eps_mode": "clamp_min"}, 4.0),
        ({"renorm": 0.0, "eps": 3.0}, 1.0),
    ],
)
def test_the_divisor_by_hand(options, divisor):
    weights, _ = weights_of([0.6, 0.8], RoutingSpec(2, "sigmoid", **options))
    assert weights == pytest.approx([0.8 / divisor, 0.6 / divisor])


def test_one_expert_without_division():
    assert weights_of([0.5, 0.25], RoutingSpec(1, "sigmoid"))[0] == [1.0]
    assert weights_of([0.5, 0.25], RoutingSpec(1, "sigmoid", renorm_if_k1=False))[0] == [0.5]


def test_a_bias_that_stays_in_the_weights():
    bias = torch.tensor([0.5, 0.0, 0.25], dtype=torch.float64)
    spec = RoutingSpec(2, "sigmoid", renorm=0.0, bias_in_weights=True)
    weights, ids = weights_of([0.5, 0.8, 0.5], spec, bias_E=bias)
    assert ids == [0, 1] and weights == pytest.approx([1.0, 0.8])
    weights, _ = weights_of([0.5, 0.8, 0.5], spec, bias_E=bias, ids_TK=torch.tensor([[2, 7]]))
    assert weights == pytest.approx([0.75, 0.0])


def test_shared_columns_share_in_the_division():
    """Two experts and two shared columns: the choice is among the experts, the sum over all that weigh."""
    spec = RoutingSpec(1, "sigmoid", n_shared=2, scale=2.0)
    weights, ids = weights_of([0.2, 0.4, 0.9, 0.7], spec, per_expert_scale_E=torch.tensor([10.0, 3.0]))
    assert ids == [1, 2, 3] and weights == pytest.approx([1.2, 0.9, 0.7])
    weights, ids = weights_of([0.2, 0.4, 0.9, 0.7], spec, ids_TK=torch.tensor([[2]]))
    assert ids == [4, 2, 3] and weights == pytest.approx([0.0, 1.125, 0.875]), "a shared column is no expert"


def test_the_scale_of_an_expert_comes_last():
    scale = torch.tensor([1.0, -2.0, 4.0])
    weights, ids = weights_of([0.25, 0.25, 0.5], RoutingSpec(3, "sigmoid", scale=2.0), per_expert_scale_E=scale)
    assert ids == [2, 0, 1] and weights == pytest.approx([4.0, 0.5, -1.0])


def test_a_soft_cap_by_hand():
    logits = torch.tensor([[3.0, -100.0, 1000.0]], dtype=torch.float64)
    weights, ids = moe_route_reference(logits, RoutingSpec(3, "sigmoid", softcap=2.0, renorm=0.0))
    wanted = [1 / (1 + math.exp(-2.0 * math.tanh(z / 2.0))) for z in (1000.0, 3.0, -100.0)]
    assert ids.tolist() == [[2, 0, 1]] and weights[0].tolist() == pytest.approx(wanted)


def test_rounded_scores_tie():
    """0.5 + 2**-10 is 0.5 in bfloat16: the lowest index wins, and the weight is the rounded score."""
    logits = torch.tensor([[0.0, 2**-8, -1.0]], dtype=torch.float64)
    assert moe_route_reference(logits, RoutingSpec(2, "sigmoid"))[1].tolist() == [[1, 0]]
    spec = RoutingSpec(2, "sigmoid", renorm=0.0, score_dtype="bfloat16")
    weights, ids = moe_route_reference(logits, spec)
    assert ids.tolist() == [[0, 1]] and weights.tolist() == [[0.5, 0.5]]
    by_logits = RoutingSpec(2, "sigmoid", renorm=0.0, score_dtype="bfloat16", select_on="logits")
    assert moe_route_reference(logits, by_logits)[1].tolist() == [[1, 0]]
    low = RoutingSpec(2, "sigmoid", renorm=0.0, score_dtype="logits")
    assert moe_route_reference(logits.bfloat16(), low)[1].tolist() == [[0, 1]]
    assert moe_route_reference(logits, low)[1].tolist() == [[1, 0]]


def test_a_wider_bias_keeps_its_digits():
    """0.5 + 2**-10 and 0.5 differ in fp32, and not in bfloat16."""
    spec, bias = RoutingSpec(1, "sigmoid", score_dtype="bfloat16"), torch.tensor([0.0, 2**-10])
    assert moe_route_reference(torch.zeros(1, 2), spec, bias_E=bias)[1].tolist() == [[1]]
    assert moe_route_reference(torch.zeros(1, 2), spec, bias_E=bias.bfloat16())[1].tolist() == [[0]]


def test_saturated_scores_tie_and_logits_do_not():
    logits = torch.tensor([[50.0, 60.0]])
    assert moe_route_reference(logits, RoutingSpec(1, "sigmoid"))[1].tolist() == [[0]]
    assert moe_route_reference(logits, RoutingSpec(1, "sigmoid", select_on="logits"))[1].tolist() == [[1]]
    bias = torch.tensor([20.0, 0.0])
    assert moe_route_reference(logits, RoutingSpec(1, "sigmoid", select_on="logits"), bias_E=bias)[1].tolist() == [[0]]
