"""The check before timing: exact rows are exact, and small mistakes are seen."""

import re

import pytest
import torch

from diffulex.benching import check
from diffulex.benching.check import Checker, exact_rows, free_memory, spread
from lowering.errors import MoEUnsupportedError
from lowering.reference.moe_block import moe_block_reference
from tests.support.benching import CPU, FORMS, tiny_inputs, tiny_layer


def outputs(layer, inputs, source="topk"):
    """What eager torch makes of each set."""
    return [layer.with_implementation("grouped_mm")(*one.of("topk")) for one in inputs]


def verdict(layer, inputs, change=lambda out: out, source="topk"):
    return Checker(layer, inputs, source=source)(lambda number: change(outputs(layer, inputs)[number]))


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (5, 5), (64, 64), (65, 64), (1000, 64), (16384, 64)])
def test_rows_are_spread_from_the_first_to_the_last(tokens, rows):
    index_R = spread(tokens, 64)
    assert len(index_R) == rows and index_R[0] == 0 and index_R[-1] == tokens - 1
    gaps = index_R.diff()
    assert rows == 1 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["topk", "logits"])
def test_exact_rows_are_those_of_the_loop(form, source):
    layer, (one,) = tiny_layer(form), tiny_inputs(11)
    weights_TK = one.weights_TK
    if source == "logits":
        exact_TE = one.logits_TE.double().softmax(-1)
        weights_TK = exact_TE.gather(1, one.ids_TK)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    expected = moe_block_reference(one.hidden_TH, weights_TK, one.ids_TK, experts=layer.weights())
    found = exact_rows(layer, one, source=source, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", ["topk", "logits"])
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_what_is_right_passes(tokens, source, dtype):
    layer, inputs = tiny_layer(dtype=dtype), tiny_inputs(tokens, sets=3, dtype=dtype)
    found = verdict(layer, inputs, source=source)
    assert not found.problem and 0 < found.relative < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1.0001), (torch.bfloat16, 1.02), (torch.float16, 1.003)], ids=str
)
def test_what_is_slightly_wrong_everywhere_is_seen(dtype, factor):
    layer, inputs = tiny_layer(dtype=dtype), tiny_inputs(100, dtype=dtype)
    assert "mean error over" in verdict(layer, inputs, lambda out: out * factor).problem


def test_one_wrong_row_is_seen_where_it_is_sampled():
    layer, inputs = tiny_layer(dtype=torch.bfloat16), tiny_inputs(1000, dtype=torch.bfloat16)

    def last_row(out):
        out = out.clone()
        out[-1] = out[-2]
        return out

    assert "error over" in verdict(layer, inputs, last_row).problem


def test_few_tokens_are_checked_over_several_sets():
    layer, inputs = tiny_layer(), tiny_inputs(5, sets=16)
    outs, asked = outputs(layer, inputs), []

    def call(number):
        asked.append(number)
        return outs[number] * (2 if number == 12 else 1)

    assert Checker(layer, inputs, source="topk")(call).problem
    assert asked == list(range(13))  # 13 sets of 5 rows are the first to reach 64
    many = tiny_inputs(70, sets=4)
    assert Checker(layer, many, source="topk")(lambda number: outputs(layer, many)[{0: 0}[number]]).problem == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: out[:-1], r"\[8, 64\] torch.float32, expected \[9, 64\] torch.float32"),
        (lambda out: out.double(), r"\[9, 64\] torch.float64, expected"),
        (lambda out: out.where(out != out[0, 0], float("nan")), "NaN at 1 places"),
    ],
)
def test_another_shape_dtype_or_nan_is_seen(change, words):
    assert re.search(words, verdict(tiny_layer(), tiny_inputs(9), change).problem)


def test_float32_where_float64_takes_too_much_memory(monkeypatch):
    monkeypatch.setattr(check, "free_memory", lambda device: 1000)
    seen = []
    kept = check.exact_rows
    monkeypatch.setattr(
        check, "exact_rows", lambda *args, dtype, **given: seen.append(dtype) or kept(*args, dtype=dtype, **given)
    )
    layer, inputs = tiny_layer(dtype=torch.bfloat16), tiny_inputs(64, dtype=torch.bfloat16)
    assert not verdict(layer, inputs).problem and seen == [torch.float32]
    with pytest.raises(MoEUnsupportedError, match=r"memory for one expert in float64, 49152 bytes.*--dtype bf16"):
        verdict(tiny_layer(), tiny_inputs(64))


def test_free_memory_is_measured():
    assert 10**6 < free_memory(CPU) < 10**15
