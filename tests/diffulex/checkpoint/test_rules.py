"""One rule at a time: the stored tensor built by hand, through `pair` both ways."""

from __future__ import annotations

import pytest
import torch

from diffulex.checkpoint.rules import Rule, pair, separate

ROWS, HIDDEN = 6, 4
W13 = torch.arange(ROWS * HIDDEN).view(ROWS, HIDDEN)
B13 = torch.arange(ROWS)
DOWN = torch.arange(HIDDEN * ROWS).view(HIDDEN, ROWS)
UP = "shared_experts.gate_up_proj.weight"
ALTERNATING = torch.stack([W13[:3], W13[3:]], dim=1).reshape(ROWS, HIDDEN)

CASES = {
    "whole": (Rule("x", "w13"), W13, W13, False),
    "transposed": (Rule("x", "w13", form="transposed"), W13, W13.t(), False),
    "gate": (Rule("x", "w13", part="gate"), W13, W13[:3], False),
    "up": (Rule("x", "w13", part="up"), W13, W13[3:], False),
    "gate of alternating rows": (Rule("x", "w13", part="gate"), W13, W13[0::2], True),
    "up of alternating rows": (Rule("x", "w13", part="up"), W13, W13[1::2], True),
    "gate, transposed": (Rule("x", "w13", part="gate", form="transposed"), W13, W13[:3].t(), False),
    "alternating in the file": (Rule("x", "w13", form="interleaved"), W13, ALTERNATING, False),
    "alternating in the parameter": (Rule("x", "w13"), ALTERNATING, W13, True),
    "alternating in both": (Rule("x", "w13", form="interleaved"), W13, W13, True),
    "alternating and transposed": (Rule("x", "w13", form="transposed interleaved"), W13, ALTERNATING.t(), False),
    "bias": (Rule("x", "b13", form="interleaved"), B13, torch.tensor([0, 3, 1, 4, 2, 5]), False),
    "down": (Rule("x", "w2"), DOWN, DOWN, True),
    "row": (Rule("x", "router.correction_bias", form="row"), B13, B13.view(1, ROWS), False),
    "bank gate": (Rule("x", UP, part="gate", form="bank"), W13, W13[:3].view(3, 1, HIDDEN), False),
    "bank up": (Rule("x", UP, part="up", form="bank"), W13, W13[3:].view(3, 1, HIDDEN), False),
    "bank of both": (
        Rule("x", UP, form="bank interleaved"),
        W13,
        torch.stack([torch.stack([W13[i], W13[3 + i]]) for i in range(3)]),
        False,
    ),
    "bank down": (
        Rule("x", "shared_experts.down_proj.weight", form="bank"),
        DOWN,
        torch.stack([DOWN[:, 2 * i : 2 * i + 2] for i in range(3)]),
        False,
    ),
}


@pytest.mark.parametrize(("rule", "piece", "stored", "interleaved"), CASES.values(), ids=CASES)
def test_both_views_hold_the_same_numbers(rule, piece, stored, interleaved):
    assert rule.piece_shape(tuple(piece.shape), num_shared=3) == tuple(stored.shape)
    ours, theirs = pair(rule, piece, stored=stored, interleaved=interleaved)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("rule", "piece", "stored", "interleaved"), CASES.values(), ids=CASES)
def test_both_are_views_and_cover_what_they_should(rule, piece, stored, interleaved):
    """Written through either view, the tensor behind it has exactly the numbers it should have."""
    written = torch.full_like(stored.contiguous(), -1)
    ours, theirs = pair(rule, piece, stored=written, interleaved=interleaved)
    theirs.copy_(ours)
    assert torch.equal(written, stored)

    read = torch.full_like(piece.contiguous(), -1)
    ours, theirs = pair(rule, read, stored=stored, interleaved=interleaved)
    ours.copy_(theirs)
    touched = read != -1
    assert torch.equal(read[touched], piece[touched])
    assert int(touched.sum()) == stored.numel()


def test_separate_keeps_the_gate_first():
    assert torch.equal(separate(W13, interleaved=False)[0], W13[:3])
    assert torch.equal(separate(W13, interleaved=True)[1], W13[1::2])


def test_pattern_finds_the_expert_and_nothing_else():
    rule = Rule("mlp.experts.{e}.w1.weight", "w13", part="gate")
    assert rule.pattern.fullmatch("mlp.experts.12.w1.weight")[1] == "12"
    assert not rule.pattern.fullmatch("mlp.experts.12.w1xweight")
    assert not rule.pattern.fullmatch("mlp.experts..w1.weight")
    assert rule.per_expert and rule.of_experts
