import pytest
import torch

from lowering.graph.dataflow import MatchError, aten
from lowering.graph.route_formula import match_formula
from lowering.spec import RoutingSpec
from tests.support.graphs import calls, trace
from tests.support.routers import BIASED, MATCHED, REFUSED, E, K, T


def name(value):
    return getattr(value, "__name__", None)


def formula(router, *, tokens=T, dtype=torch.float32):
    module = trace(router, torch.randn(tokens, E, dtype=dtype), torch.randn(E))
    weights, ids = module.graph.output_node().args[0]
    (topk,) = [node for node in calls(module.graph, aten.topk.default) if ids in node.users]
    logits, bias = list(module.graph.nodes)[:2]
    return match_formula(weights, topk), logits, bias


# Sizes that equal another one, 1 above all, make wrong shapes look right.
@pytest.mark.parametrize(
    ("tokens", "dtype"), [(T, torch.float32), (T, torch.bfloat16), (1, torch.float16), (0, torch.float32)]
)
@pytest.mark.parametrize(("router", "spec"), MATCHED.items(), ids=name)
def test_formulas_are_read(router, spec, tokens, dtype):
    found, logits, bias = formula(router, tokens=tokens, dtype=dtype)
    assert found.spec == spec
    assert found.logits is logits, "the logits are taken in the dtype they were computed in"
    assert found.bias is None if router not in BIASED else bias in {found.bias, *found.bias.all_input_nodes}


@pytest.mark.parametrize("tokens", [T, E, 1])
@pytest.mark.parametrize(("router", "reason"), REFUSED.items(), ids=name)
def test_what_is_one_step_away_is_refused(router, reason, tokens):
    with pytest.raises(MatchError) as caught:
        formula(router, tokens=tokens)
    if tokens > 1:  # one token has rows that look like a bias, and is refused for the other term
        assert caught.value.reason.code is reason[0]
        assert reason[1] in caught.value.reason.detail


def softmax_turned(logits, bias):
    exp = (logits - logits.amax(-1, keepdim=True)).exp()
    return torch.topk(exp / exp.sum(0)[:, None], K)


def renorm_turned(logits, bias):
    weights, ids = torch.topk(logits.softmax(-1), K)
    return weights / weights.sum(0)[:, None], ids


def topk_over_tokens(logits, bias):
    return torch.topk(logits.softmax(-1), E, dim=0)


@pytest.mark.parametrize(
    ("router", "tokens"), [(softmax_turned, E), (renorm_turned, K), (topk_over_tokens, E)], ids=name
)
def test_sums_over_tokens_are_refused_where_every_shape_fits(router, tokens):
    with pytest.raises(MatchError):
        formula(router, tokens=tokens)


def test_logits_that_the_model_rounds_stay_rounded():
    found, logits, _ = formula(lambda logits, bias: torch.topk(logits.bfloat16().float().softmax(-1), K))
    assert found.logits is not logits and found.logits.args == (logits, torch.bfloat16)


def test_a_bias_of_the_logits_is_none_of_the_selection():
    def router(logits, bias):
        values, ids = torch.topk(logits.float() + bias, K)
        return values.softmax(-1), ids

    found, logits, bias = formula(router)
    assert found.bias is None and found.logits.args == (logits, bias)
    assert found.spec == RoutingSpec(K, select_on="logits")
