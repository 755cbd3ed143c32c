"""The ops under `torch.func`: every transform in reverse mode against plain torch in fp64; forward mode is refused."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.functional import silu

from lowering.errors import MoEUnsupportedError
from lowering.ops import (
    moe_combine,
    moe_dispatch,
    moe_expert_down,
    moe_expert_down_shared,
    moe_expert_grad_weight,
    moe_expert_up,
    moe_expert_up_shared,
    moe_route,
    moe_route_linear,
)

T, H, E, K, I = 4, 3, 3, 2, 2  # noqa: E741
ACT = "silu(g) * u"
# no op has a rule for vmap: torch calls it once for each of a batch, and says so
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SLOTS_TK = torch.tensor([[0, 2], [2, 1], [1, 2], [0, 2]])
HIDDEN, ROUTER = normal(T, H, seed=0), normal(E, H, seed=1)
WEIGHTS = normal(T, K, seed=2).abs()
W13, B13 = normal(E, 2 * I, H, seed=3), normal(E, 2 * I, seed=4)
W2, B2 = normal(E, H, I, seed=5), normal(E, H, seed=6)
SHARED = normal(I, H, seed=7), normal(I, H, seed=8), normal(H, I, seed=9)


def experts(hidden, weights, w13, b13, w2, b2, ids=SLOTS_TK):
    order, _, offsets = moe_dispatch(ids, E)
    act = moe_expert_up(hidden, w13, b13, order, offsets, K, ACT)
    return moe_combine(moe_expert_down(act, w2, b2, order, offsets), weights)


def plain_experts(hidden, weights, w13, b13, w2, b2, ids=SLOTS_TK):
    out = 0
    for k in range(K):
        chosen = ids[:, k]
        gate, up = (torch.einsum("th,tjh->tj", hidden, w13[chosen]) + b13[chosen]).chunk(2, -1)
        rows = torch.einsum("ti,thi->th", silu(gate) * up, w2[chosen]) + b2[chosen]
        out = out + rows * weights[:, k : k + 1]
    return out


def routed(hidden, router, w13, b13, w2, b2):
    weights, ids = moe_route(hidden @ router.t(), None, None, K)
    return experts(hidden, weights, w13, b13, w2, b2, ids)


def routed_at_once(hidden, router, w13, b13, w2, b2):
    weights, ids, _ = moe_route_linear(hidden, router, None, None, torch.float64, torch.float64, K)
    return experts(hidden, weights, w13, b13, w2, b2, ids)


def plain_routed(hidden, router, w13, b13, w2, b2):
    weights, ids = (hidden @ router.t()).softmax(-1).topk(K)
    return plain_experts(hidden, weights / weights.sum(-1, keepdim=True), w13, b13, w2, b2, ids)


def with_shared(hidden, weights, w13, w2, *shared):
    order, _, offsets = moe_dispatch(SLOTS_TK, E)
    act, narrow = moe_expert_up_shared(hidden, w13, None, order, offsets, hidden, *shared[:2], K, ACT)
    slots, beside = moe_expert_down_shared(act, w2, None, order, offsets, narrow, shared[2], K)
    return moe_combine(slots, weights, SLOTS_TK, E) + beside


def plain_with_shared(hidden, weights, w13, w2, *shared):
    beside = (silu(hidden @ shared[0].t()) * (hidden @ shared[1].t())) @ shared[2].t()
    return plain_experts(hidden, weights, w13, torch.zeros_like(B13), w2, torch.zeros_like(B2)) + beside


def weight_gradient(left, right):
    order, token, offsets = moe_dispatch(SLOTS_TK, E)
    return moe_expert_grad_weight(left, right, order, token, offsets)


def plain_weight_gradient(left, right):
    pairs = torch.einsum("tki,th->tkih", left.view(T, K, I), right)
    chosen = torch.nn.functional.one_hot(SLOTS_TK, E).double()
    return torch.einsum("tke,tkih->eih", chosen, pairs)


FUNCTIONS = {
    "experts": (experts, plain_experts, (HIDDEN, WEIGHTS, W13, B13, W2, B2)),
    "routed": (routed, plain_routed, (HIDDEN, ROUTER, W13, B13, W2, B2)),
    "routed_at_once": (routed_at_once, plain_routed, (HIDDEN, ROUTER, W13, B13, W2, B2)),
    "with_shared": (with_shared, plain_with_shared, (HIDDEN, WEIGHTS, W13, W2, *SHARED)),
    "weight_gradient": (weight_gradient, plain_weight_gradient, (normal(T * K, I, seed=3), HIDDEN)),
}


def number(function):
    """The function with one number as its result, in which no part of the output counts as much as another."""

    def loss(*args):
        out = function(*args)
        return (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sin().sum()

    return loss


def everything(function, args):
    return grad(number(function), tuple(range(len(args))))


def second(function, args):
    first = everything(function, args)
    return everything(lambda *inner: torch.cat([value.flatten() for value in first(*inner)]), args)


def in_batch(function, args, at):
    """vmap over two values of one argument."""
    mapped = vmap(function, in_dims=tuple(0 if index == at else None for index in range(len(args))))
    return lambda *inner: mapped(*inner[:at], torch.stack([inner[at], 0.5 * inner[at]]), *inner[at + 1 :])


def autograd_over_grad(function, args):
    def run(*inner):
        leaves = [value.clone().requires_grad_() for value in inner]
        total = sum(value.sin().sum() for value in everything(function, args)(*leaves))
        return torch.autograd.grad(total, leaves)

    return run


def pulled_back(function, args):
    def run(*inner):
        out, pull = vjp(function, *inner)
        return pull(torch.ones_like(out))

    return run


TRANSFORMS = {
    "grad": everything,
    "grad_of_grad": second,
    "vjp": pulled_back,
    "jacrev": lambda function, args: jacrev(function, tuple(range(len(args)))),
    "jacrev_of_jacrev": lambda function, args: jacrev(jacrev(number(function), 0), 1),
    "autograd_over_grad": autograd_over_grad,
    "vmap_of_grad_of_first": lambda function, args: in_batch(everything(function, args), args, 0),
    "vmap_of_grad_of_second": lambda function, args: in_batch(everything(function, args), args, 1),
    "grad_of_vmap": lambda function, args: everything(in_batch(function, args, 0), args),
}


def assert_equal(ours, wanted):
    ours, wanted = ((value,) if isinstance(value, torch.Tensor) else value for value in (ours, wanted))
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(("ours", "plain", "args"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_reverse_mode(ours, plain, args, transform):
    assert_equal(transform(ours, args)(*args), transform(plain, args)(*args))


@pytest.mark.parametrize(("ours", "plain", "args"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_compiled(ours, plain, args):
    torch._dynamo.reset()
    compiled = torch.compile(everything(ours, args), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*args), everything(plain, args)(*args))


def dual(function, args):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(args[0], torch.ones_like(args[0])), *args[1:])


def dual_of_leaf(function, args):
    return dual(function, (args[0].clone().requires_grad_(), *args[1:]))


def pushed_forward(function, args):
    return jvp(lambda first: function(first, *args[1:]), (args[0],), (torch.ones_like(args[0]),))


@pytest.mark.parametrize(
    "forward_mode",
    [dual, dual_of_leaf, pushed_forward, lambda function, args: jacfwd(function)(*args)],
    ids=["dual", "dual_of_leaf", "jvp", "jacfwd"],
)
@pytest.mark.parametrize(("ours", "plain", "args"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_forward_mode_is_refused(ours, plain, args, forward_mode):
    """Otherwise the tangents would be lost without a word."""
    with pytest.raises(MoEUnsupportedError, match="derivatives in reverse mode"):
        forward_mode(ours, args)


@pytest.mark.slow
def test_a_block_of_transformers_through_inductor():
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    import diffulex  # noqa: F401  leads the experts to the ops

    config = Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=16, num_experts=6, num_experts_per_tok=2)
    config._experts_implementation = "grouped_mm"
    block, generator = Qwen3MoeSparseMoeBlock(config), torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    hidden, parameters = torch.randn(2, 5, 32, generator=generator), dict(block.named_parameters())

    def loss(parameters, hidden):
        out = functional_call(block, parameters, (hidden,))
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    torch._dynamo.reset()
    ours, wanted = torch.compile(grad(loss))(parameters, hidden), grad(loss)(parameters, hidden)
    for name, value in wanted.items():
        assert (ours[name] - value).norm() < 1e-5 * value.norm(), name
