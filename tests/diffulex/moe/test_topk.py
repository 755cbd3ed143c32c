"""The routers: by the op and by the loop the same, for every spec; which class is for which spec; their parameters."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffulex.moe.topk import (
    ROUTER_IMPLS,
    GroupLimitedTopKRouter,
    NaiveTopKRouter,
    TopKOutput,
    TopKRouter,
    build_topk_router,
)
from diffulex.moe.topk.reference import ReferenceTopKRouter
from lowering.errors import MoEOptionError, MoERangeError, MoEShapeError
from lowering.spec import RoutingSpec
from tests.support.moe_layers import routing_specs
from tests.support.oracle import assert_near_exact

GROUPS = RoutingSpec(2, "sigmoid", n_group=4, topk_group=2)


def filled(router, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in router.parameters():
        parameter.data.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return router.double()


def logits(tokens, spec, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, spec.num_logits(experts), generator=generator, dtype=torch.float64)


@given(st.integers(1, 6).flatmap(lambda e: st.tuples(st.just(e), routing_specs(e))), st.integers(0, 4), st.booleans())
def test_equals_the_loop(drawn, tokens, given_ids):
    experts, spec = drawn
    router, loop = (filled(build_topk_router(impl, spec, experts)) for impl in ("triton", "reference"))
    ids = torch.randint(-1, experts + 3, (tokens, spec.top_k)) if given_ids else None
    found, wanted = (r(logits(tokens, spec, experts), ids=ids) for r in (router, loop))
    assert torch.equal(found.ids, wanted.ids)
    assert_near_exact(found.weights, wanted.weights)


@pytest.mark.parametrize(
    ("impl", "spec", "kind"),
    [
        ("triton", RoutingSpec(2), NaiveTopKRouter),
        ("triton", GROUPS, GroupLimitedTopKRouter),
        ("naive", RoutingSpec(2), NaiveTopKRouter),
        ("group_limited", GROUPS, GroupLimitedTopKRouter),
        ("reference", GROUPS, ReferenceTopKRouter),
    ],
)
def test_the_class_of_a_spec(impl, spec, kind):
    router = build_topk_router(impl, spec, 8)
    assert type(router) is kind and isinstance(router, TopKRouter)


@pytest.mark.parametrize(
    ("impl", "spec", "error", "text"),
    [
        ("fast", RoutingSpec(2), MoEOptionError, rf"impl in \('{ROUTER_IMPLS[0]}'.*got 'fast'"),
        ("naive", GROUPS, MoEOptionError, "a spec without groups, got n_group=4"),
        ("group_limited", RoutingSpec(2), MoEOptionError, "n_group > 1, got n_group=1"),
        ("triton", RoutingSpec(9), MoERangeError, "top_k <= 8 experts, got top_k=9"),
    ],
)
def test_what_is_refused(impl, spec, error, text):
    with pytest.raises(error, match=text):
        build_topk_router(impl, spec, 8)


def test_columns_that_do_not_fit():
    router = build_topk_router("triton", RoutingSpec(2, num_null=2, n_shared=1), 5)
    with pytest.raises(MoEShapeError, match=r"router_logits \[T, 8\].*got shape \(3, 5\)"):
        router(torch.zeros(3, 5))


def test_parameters_are_those_of_the_spec():
    plain = build_topk_router("triton", RoutingSpec(2), 5)
    assert list(plain.parameters()) == [] and plain.correction_bias is None
    spec = RoutingSpec(2, num_null=2, select_bias=True, per_expert_scale=True, global_scale=True)
    router = build_topk_router("triton", spec, 5, dtype=torch.bfloat16)
    shapes = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in router.named_parameters()}
    assert shapes == {
        "correction_bias": ((7,), torch.float32, False),  # bf16 would round the balance away
        "per_expert_scale": ((7,), torch.bfloat16, True),
        "global_scale": ((1,), torch.bfloat16, True),
    }
    assert {name: p.detach().float().mean().item() for name, p in router.named_parameters()} == {
        "correction_bias": 0.0,
        "per_expert_scale": 1.0,
        "global_scale": 1.0,
    }


def test_factory_and_copies():
    router = build_topk_router("triton", RoutingSpec(2, select_bias=True), 5, device="meta")
    assert router.correction_bias.device.type == "meta"
    router = build_topk_router("triton", RoutingSpec(2, select_bias=True), 5)
    assert copy.deepcopy(router).spec == router.spec
    assert "top 2 of softmax" in repr(router)


def test_output_is_a_tuple_of_tensors():
    spec = RoutingSpec(2, n_shared=1, score="sigmoid")
    output = build_topk_router("triton", spec, 5)(logits(3, spec, 5).float())
    assert isinstance(output, TopKOutput)
    weights, ids, given_logits = output
    assert (weights.shape, weights.dtype, ids.shape, ids.dtype) == ((3, 3), torch.float32, (3, 3), torch.int32)
    assert torch.equal(ids[:, 2], torch.full((3,), 5, dtype=torch.int32))
    assert given_logits.shape == (3, 6)


def test_scales_learn_and_the_bias_does_not():
    spec = RoutingSpec(2, select_bias=True, per_expert_scale=True, global_scale=True)
    router = build_topk_router("triton", spec, 5)
    inputs = logits(4, spec, 5).float().requires_grad_()
    router(inputs).weights.square().sum().backward()
    assert router.correction_bias.grad is None
    assert all(t.grad.abs().sum() > 0 for t in (router.per_expert_scale, router.global_scale, inputs))


def test_the_bias_moves_the_choice_and_not_the_weights():
    router = build_topk_router("triton", RoutingSpec(1, "sigmoid", renorm=0.0, select_bias=True), 3)
    router.correction_bias.data[2] = 5.0
    output = router(torch.tensor([[3.0, 0.0, -1.0]]))
    assert output.ids.tolist() == [[2]]
    torch.testing.assert_close(output.weights, torch.tensor([[-1.0]]).sigmoid())
