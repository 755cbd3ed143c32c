"""The main promise: stock transformers models, unmodified, through plain `torch.compile` after `import diffulex`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import diffulex
from tests.support.graphs import stop_at_lowerings
from tests.support.models import FAMILIES, TINY, build_model, token_ids
from tests.support.oracle import assert_oracle_ratio

TOKENS = (0, 1, 2, 7, 64, 129, 512)
ONE_LAYER = TINY.__class__(layers=1)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def fp64_copy(model: Any) -> Any:
    """The oracle: the model in fp64, its experts run by transformers' own loop."""
    oracle = copy.deepcopy(model).double()
    oracle.set_experts_implementation("eager")
    return oracle


def check_token_counts(model: Any, compiled: Any, counts: tuple[int, ...], *, max_graphs: int) -> None:
    """Ratio rule against an fp64 copy at each count, no break, few graphs."""
    oracle = fp64_copy(model)
    counters.clear()
    for count in counts:
        ids = token_ids(model, 1, count, seed=count)
        assert_oracle_ratio(logits(compiled, ids), logits(model, ids), logits(oracle, ids), what=f"{count} tokens")
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= max_graphs


def first_output(block: Any, hidden: Tensor) -> Tensor:
    """Output [1, T, H] of a MoE block, which some families return beside the router's scores."""
    with torch.no_grad():
        out = block(hidden)
    return out[0] if isinstance(out, tuple) else out


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_compile_captures_every_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_lowerings(monkeypatch)
    model = build_model(family)
    report = diffulex.explain(model, token_ids(model, 1, 9), use_cache=False)
    assert report.all_captured, str(report)
    assert len(report.layers) == TINY.layers
    assert (report.graphs, report.breaks) == (1, 0)
    for layer in report.layers:
        assert layer.router.startswith("moe_route"), layer
        assert layer.activation.startswith("folded"), layer


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_compile_over_token_counts(family: str) -> None:
    """Stock attention cannot view zero tokens, in eager mode neither; the block below takes the zero."""
    model = build_model(family, ONE_LAYER)
    check_token_counts(model, torch.compile(model), TOKENS[1:], max_graphs=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_over_token_counts(family: str) -> None:
    model = build_model(family, ONE_LAYER)
    block = model.model.layers[0].mlp
    oracle = fp64_copy(model).model.layers[0].mlp
    compiled = torch.compile(block)
    counters.clear()
    for count in TOKENS:
        hidden = torch.randn(1, count, ONE_LAYER.hidden, generator=torch.Generator().manual_seed(count))
        outputs = [first_output(module, hidden) for module in (compiled, block)]
        assert_oracle_ratio(*outputs, first_output(oracle, hidden.double()), what=f"{count} tokens")
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_named_implementation(family: str) -> None:
    model = build_model(family, ONE_LAYER, experts="diffulex")
    stock = build_model(family, ONE_LAYER, experts="grouped_mm")
    ids = token_ids(model, 1, 7)
    oracle = logits(fp64_copy(stock), ids)
    assert_oracle_ratio(logits(model, ids), logits(stock, ids), oracle, what="eager")
    expected = stock.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
    check_token_counts(model, torch.compile(model), (1, 7, 64), max_graphs=3)


def test_disabled_leaves_the_model_stock() -> None:
    model = build_model("qwen3_moe", ONE_LAYER)
    with diffulex.disabled():
        report = diffulex.explain(model, token_ids(model, 1, 9), use_cache=False)
    assert not report.all_captured
    assert all(layer.reason.startswith("DISABLED") for layer in report.layers)
