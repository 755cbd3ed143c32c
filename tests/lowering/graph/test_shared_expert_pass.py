"""A shared expert is taken into the experts' stages where that is right, and left with a reason where it is not."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, linear, silu

from lowering import ops
from lowering.errors import ReasonCode
from lowering.graph import shared_expert_pass as module_of_the_pass
from lowering.graph.dataflow import sort_nodes
from lowering.graph.shared_expert_pass import shared_expert_pass
from tests.support.graphs import applied, calls, trace_fakes

T, K, E, H, WIDTH, SHARED = 6, 2, 4, 16, 8, 12


def experts(x_TH, ids_TK, p, act="silu(g) * u"):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, E)
    act_NI = ops.moe_expert_up(x_TH, p["w13"], None, order_N, offsets_E1, K, act)
    return ops.moe_combine(ops.moe_expert_down(act_NI, p["w2"], None, order_N, offsets_E1), p["weights"])


def mlp(x, p):
    return linear(silu(linear(x, p["gate"])) * linear(x, p["up"]), p["down"])


def merged(x, p):
    gate, up = linear(x, p["gate_up"]).chunk(2, dim=-1)
    return linear(silu(gate) * up, p["down"])


def three_dimensional(x_TH, ids_TK, p):
    """As transformers' models have it: the MLP sees [B, L, H], before the experts see [T, H]."""
    x_BLH = x_TH.view(2, T // 2, H)
    shared_BLH = mlp(x_BLH, p) * torch.sigmoid(linear(x_BLH, p["shared_gate"]))
    return shared_BLH + experts(x_BLH.view(-1, H), ids_TK, p).view(x_BLH.shape)


def leaking(x_TH, ids_TK, p):
    act = silu(linear(x_TH, p["gate"])) * linear(x_TH, p["up"])
    return experts(x_TH, ids_TK, p) + linear(act, p["down"]), act


def cycle(x_TH, ids_TK, p):
    """A weight of the MLP is computed from what the experts give."""
    out = experts(x_TH, ids_TK, p)
    return out + mlp(x_TH, {**p, "down": p["down"] * out.mean()})


def draws_before(x_TH, ids_TK, p):
    """What comes before both paths stays there: attention, whose ops could draw a dropout mask, is in each model."""
    x_TH = x_TH + torch.rand_like(x_TH)
    return experts(x_TH, ids_TK, p) + mlp(x_TH, p)


def impure(x_TH, ids_TK, p):
    """Two draws, one on each path: their order is what a seed means."""
    noise = torch.rand_like(x_TH)
    shared = mlp(x_TH, p) * torch.rand_like(x_TH)
    return shared + experts(x_TH, ids_TK, p) * noise


def interleaved(x, ids, p):
    pre = linear(x, p["gate_up"])
    gate, up = (torch.ops.aten.slice.Tensor(pre, 1, start, 2 * SHARED, 2) for start in range(2))
    return experts(x, ids, p) + linear(silu(gate) * up, p["down"])


def half_unread(x, ids, p):
    """Experts without a gate, and an MLP that reads one half of its first product."""
    pre = torch.ops.aten.slice.Tensor(linear(x, p["gate_up"]), 1, 0, SHARED)
    routed = experts(x, ids, {**p, "w13": p["w1"]}, "square(relu(g))")
    return routed + linear(torch.relu(pre).square(), p["down"])


def other_dtype(x, ids, p):
    act = silu(linear(x, p["gate"])) * linear(x, p["up"])
    return experts(x, ids, p) + linear(act.to(torch.float16), p["down"].to(torch.float16))


def other_rows(x, ids, p):
    narrow = {"gate": p["narrow"], "up": p["narrow"], "down": p["down"]}
    return experts(x, ids, p) + mlp(x.view(2 * T, H // 2), narrow).view(T, 2, H).sum(1)


def escaping(x_TH, ids_TK, p):
    gate = linear(x_TH, p["gate"])
    out = experts(x_TH, ids_TK, p) + linear(silu(gate) * linear(x_TH, p["up"]), p["down"])
    return out, gate


def depending(x_TH, ids_TK, p):
    """The ids are computed from the shared expert's output."""
    shared = mlp(x_TH, p)
    return experts(x_TH, ids_TK + (shared.sum(1, keepdim=True) > 0), p) + shared


TAKEN = {
    "after": lambda x, ids, p: experts(x, ids, p) + mlp(x, p),
    "before": lambda x, ids, p: mlp(x, p) + experts(x, ids, p),
    "merged": lambda x, ids, p: experts(x, ids, p) + merged(x, p),
    "three_dimensional": three_dimensional,
    "up_first": lambda x, ids, p: (
        experts(x, ids, p) + linear(linear(x, p["up"]) * silu(linear(x, p["gate"])), p["down"])
    ),
    "copied": lambda x, ids, p: experts(x, ids, p) + mlp(x.clone(), p),
    "spelled_out": lambda x, ids, p: experts(x, ids, p, "g * sigmoid(g) * u") + mlp(x, p),
    "projected": lambda x, ids, p: experts(linear(x, p["square"]), ids, p) + mlp(x, p),
}
LEFT = {
    "activation": (
        lambda x, ids, p: experts(x, ids, p) + linear(gelu(linear(x, p["gate"])) * linear(x, p["up"]), p["down"]),
        ReasonCode.OPTION,
    ),
    "biased": (
        lambda x, ids, p: (
            experts(x, ids, p) + linear(silu(linear(x, p["gate"], p["bias"])) * linear(x, p["up"]), p["down"])
        ),
        ReasonCode.OPTION,
    ),
    "escaping": (escaping, ReasonCode.SHARED_USE),
    "leaking": (leaking, ReasonCode.SHARED_USE),
    "cycle": (cycle, ReasonCode.SHARED_USE),
    "impure": (impure, ReasonCode.SHARED_USE),
    "interleaved": (interleaved, ReasonCode.STRUCTURE),
    "half_unread": (half_unread, ReasonCode.STRUCTURE),
    "other_dtype": (other_dtype, ReasonCode.DTYPE),
    "other_rows": (other_rows, ReasonCode.STRUCTURE),
    "depending": (depending, ReasonCode.SHARED_USE),
    "not_folded": (
        lambda x, ids, p: experts(x, ids, {**p, "w13": p["w1"]}, "identity") + mlp(x, p),
        ReasonCode.NOT_POINTWISE,
    ),
    "transposed": (
        lambda x, ids, p: experts(x, ids, p) + (silu(x @ p["gate"].t()) * (x @ p["up"].t())) @ p["down_t"],
        ReasonCode.STRUCTURE,
    ),
}
NOTHING = {
    "no_mlp": lambda x, ids, p: experts(x, ids, p) + x,
    "other_values": lambda x, ids, p: experts(x, ids, p) + mlp(x + 1, p),
    "low_rank": lambda x, ids, p: experts(x, ids, p) + linear(linear(x, p["gate"]), p["down"]),
    "a_norm_between": lambda x, ids, p: (
        experts(x, ids, p) + linear(torch.rms_norm(linear(x, p["gate"]), (SHARED,)), p["down"])
    ),
}


def inputs(device="cpu", dtype=torch.float32):
    sizes = {
        "x": (T, H),
        "w13": (E, 2 * WIDTH, H),
        "w1": (E, WIDTH, H),
        "w2": (E, H, WIDTH),
        "weights": (T, K),
        "gate": (SHARED, H),
        "up": (SHARED, H),
        "gate_up": (2 * SHARED, H),
        "down": (H, SHARED),
        "down_t": (SHARED, H),
        "shared_gate": (1, H),
        "square": (H, H),
        "narrow": (SHARED, H // 2),
        "bias": (SHARED,),
    }
    torch.manual_seed(0)
    values = {name: torch.randn(size, dtype=dtype, device=device) for name, size in sizes.items()}
    ids_TK = torch.randint(0, E, (T, K), dtype=torch.int32, device=device)
    return values.pop("x"), ids_TK, values


def traced(function, device="cuda"):
    """The module after the pass and what it found; on fake tensors, so that CUDA needs no device."""
    found = []
    module = trace_fakes(function, lambda: inputs(device))
    return applied(lambda graph: shared_expert_pass(graph, record=found.append), module), found


@pytest.mark.parametrize("function", TAKEN.values(), ids=TAKEN)
def test_taken(function):
    module, found = traced(function)
    assert [record.reason for record in found] == [None]
    assert (
        len(calls(module.graph, ops.moe_expert_up_shared)) == len(calls(module.graph, ops.moe_expert_down_shared)) == 1
    )
    assert not calls(module.graph, ops.moe_expert_up, ops.moe_expert_down)
    x_TH, ids_TK, values = inputs(dtype=torch.float64)
    wanted = function(x_TH, ids_TK, values)
    torch.testing.assert_close(module(x_TH, ids_TK, *values.values()), wanted)


def test_what_draws_before_both_paths_is_in_no_way():
    module, found = traced(draws_before)
    assert [record.reason for record in found] == [None]
    assert len(calls(module.graph, ops.moe_expert_up_shared)) == 1


@pytest.mark.parametrize(("function", "code"), LEFT.values(), ids=LEFT)
def test_left_with_a_reason(function, code):
    module, (found,) = traced(function)
    assert found.reason is not None and found.reason.code is code, found.reason
    assert not calls(module.graph, ops.moe_expert_up_shared)


@pytest.mark.parametrize("function", NOTHING.values(), ids=NOTHING)
def test_nothing_to_tell(function):
    module, found = traced(function)
    assert found == []
    assert not calls(module.graph, ops.moe_expert_up_shared)


def test_only_on_cuda():
    _, (found,) = traced(TAKEN["after"], device="cpu")
    assert found.reason.code is ReasonCode.NOT_CUDA


def test_one_shared_expert_a_layer():
    module, found = traced(lambda x, ids, p: experts(x, ids, p) + mlp(x, p) + merged(x, p))
    assert [record.reason for record in found] == [None]
    assert len(calls(module.graph, torch.ops.aten.mm.default)) in (2, 3)


def test_two_layers():
    def function(x, ids, p):
        for _ in range(2):
            x = experts(x, ids, p) + mlp(x, p)
        return x

    module, found = traced(function)
    assert [record.reason for record in found] == [None, None]
    assert not calls(module.graph, torch.ops.aten.mm.default)


def test_the_cost_grows_with_the_graph_and_not_with_its_square():
    """Whole-graph work is done once a pass, not once a layer."""
    seen = []

    def function(x, ids, p):
        for _ in range(4):
            x = experts(x, ids, p) + mlp(x, p)
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_of_the_pass, "sort_nodes", lambda graph, sort=sort_nodes: seen.append(sort(graph)))
        _, found = traced(function)
    assert [record.reason for record in found] == [None] * 4
    assert len(seen) == 1
