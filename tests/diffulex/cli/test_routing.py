"""Which tokens are compared: those whose experts rounding cannot change."""

import torch

from diffulex.cli import compare
from diffulex.cli.accuracy import Oracle
from diffulex.cli.routing import clear_choices, reference
from tests.support.models import build_model, token_ids

EXACT = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 1.52, 1.5, 0.0], [0.0, 5.0, 5.0, 1.0]], dtype=torch.float64)


def test_a_gap_smaller_than_the_errors_is_no_clear_choice():
    logits = EXACT.clone()
    logits[0, 3] += 0.02  # every logit may be off by 0.02, two by 0.04
    assert clear_choices(logits, EXACT, top_k=2).tolist() == [True, False, True]
    assert clear_choices(logits, EXACT, top_k=1).tolist() == [True, True, False]
    assert clear_choices(EXACT, EXACT, top_k=2).tolist() == [True, True, True]


def test_all_experts_or_no_tokens_leave_nothing_to_choose():
    assert clear_choices(EXACT + 9, EXACT, top_k=4).all()
    assert clear_choices(EXACT[:0], EXACT[:0], top_k=2).shape == (0,)


def test_routers_of_all_layers_are_asked():
    model = build_model("qwen3_moe")
    oracle, ids = Oracle(model), token_ids(model, 1, 9)
    models = {"module": model, "exact": oracle.model, "oracle": oracle}
    output, clear = reference(compare.logits, ids, **models)
    assert output.dtype == torch.float64 and output.shape == (1, 9, 128) and clear.all()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight += torch.randn_like(model.model.layers[1].mlp.gate.weight)
    assert not reference(compare.logits, ids, **models)[1].any()
