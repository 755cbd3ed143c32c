"""Regions read off graphs: sizes, activation, routing and neighbours, with and without a router in front."""

import pytest
import sympy
import torch

from lowering import ops
from lowering.graph.regions import find_regions
from lowering.spec import RoutingSpec

E, K, H, WIDTH = 8, 2, 16, 12


def _graph(function, *args, mode="symbolic"):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode=mode)(*args).graph


def _block(hidden, logits, w13, w2, *, route=True, act="silu(g) * u", down=True):
    if route:
        weights, ids = ops.moe_route(logits, None, None, K, renorm=False)
    else:
        weights, ids = logits.topk(K, dim=-1)
    order, _, offsets = ops.moe_dispatch(ids, E)
    rows = ops.moe_expert_up(hidden, w13, None, order, offsets, K, act, False)
    if not down:
        return rows
    if act == "identity":
        rows = torch.nn.functional.silu(rows[:, :WIDTH]) * rows[:, WIDTH:]
    return ops.moe_combine(ops.moe_expert_down(rows, w2, None, order, offsets), weights) + hidden


def _args(transposed=False):
    w13 = torch.randn(E, H, 2 * WIDTH).transpose(1, 2) if transposed else torch.randn(E, 2 * WIDTH, H)
    return torch.randn(5, H), torch.randn(5, E), w13, torch.randn(E, H, WIDTH)


def test_all_facts_of_a_block():
    (region,) = find_regions(_graph(lambda *args: _block(*args), *_args()))
    experts = region.experts
    assert (experts.num_experts, experts.hidden_size, experts.intermediate_size, region.top_k) == (E, H, WIDTH, K)
    assert (experts.act, experts.gated, experts.bias, experts.transposed) == ("silu(g) * u", True, False, False)
    assert experts.dtype == "float32"
    assert region.routing == RoutingSpec(top_k=K, renorm=False)
    assert region.neighbours == ("add",)
    assert isinstance(region.tokens, sympy.Symbol)
    assert region.rows == region.tokens * K


def test_a_router_in_aten_leaves_no_routing_spec():
    (region,) = find_regions(_graph(lambda *args: _block(*args, route=False), *_args()))
    assert region.routing is None


@pytest.mark.parametrize("transposed", [False, True])
def test_layout_is_read_off_the_strides(transposed):
    (region,) = find_regions(_graph(lambda *args: _block(*args), *_args(transposed), mode="fake"))
    assert region.experts.transposed is transposed


def test_an_unfolded_gate_is_still_gated():
    (region,) = find_regions(_graph(lambda *args: _block(*args, act="identity"), *_args()))
    assert region.experts.gated
    assert region.experts.act == "identity"


def test_a_dispatch_without_both_stages_is_no_region():
    assert find_regions(_graph(lambda *args: _block(*args, down=False), *_args())) == ()
