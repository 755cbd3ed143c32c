"""The order of exchanges between ranks, in inference and joint graphs: an op that swaps with nobody stands for them."""

import operator

import pytest
import torch
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx.experimental.proxy_tensor import make_fx

from diffulex.distributed.exchange_ops import NAMESPACE, define
from lowering.errors import MoEUnsupportedError
from lowering.graph.order_pass import order_pass
from tests.support.catalogue import raises_catalogue

swap = define(
    "swap_for_tests(Tensor rows, int number) -> Tensor",
    lambda rows, number: rows.clone(),
    fake=lambda rows, number: torch.empty_like(rows),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "number", inputs[1]),
    backward=lambda ctx, grad: (swap(grad, -ctx.number), None),
)
OP = getattr(torch.ops, NAMESPACE).swap_for_tests.default


class Zeros(torch.autograd.Function):
    """Its gradient exchanges zeros, whatever comes."""

    @staticmethod
    def forward(ctx, rows):
        return rows * 2

    @staticmethod
    def backward(ctx, grad):
        return swap(torch.zeros(3), -9) + grad * 0


def swaps(graph):
    """(number, that of the exchange it follows) of each, in order."""
    nodes = [node for node in graph.nodes if node.target == OP]
    for node in nodes:
        follows = node.kwargs.get("follows")
        if follows is not None and follows.op != "placeholder":
            assert follows.target is operator.getitem and follows.args[1] == 1 and follows.meta["val"].shape == (0,)
            follows = follows.args[0].args[1]
        yield node.args[1], follows


def test_calls_that_do_not_depend_on_one_another_keep_their_order():
    graph = make_fx(lambda x, y: (swap(x, 1), swap(y, 2), swap(x, 3)), tracing_mode="fake")(*torch.ones(2, 3)).graph
    order_pass(graph)
    assert list(swaps(graph)) == [(1, None), (2, 1), (3, 2)]


def test_nothing_else_is_touched():
    graph = make_fx(lambda x: x.sin() + 1, tracing_mode="fake")(torch.ones(3)).graph
    before = str(graph)
    assert str(order_pass(graph)) == before


def halves_of(function, *inputs):
    """The forward and the backward that a joint graph is parted into, behind the pass."""
    found = []

    def keep(module, _):
        found.append(module.graph)
        return module.forward

    def parted(joint, *args, **options):
        order_pass(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, *args, **options)

    out = aot_function(function, keep, keep, parted)(*inputs)
    out.sum().backward()
    return [list(swaps(graph)) for graph in found]


def test_forward_and_backward_have_a_chain_each():
    """Equal exchanges stay apart, and the way back is the other way round."""
    x, y = (torch.ones(3, requires_grad=True) for _ in range(2))
    forward, backward = halves_of(lambda x, y: swap(x, 1) * swap(x, 1) + swap(y, 2) * 3, x, y)
    assert forward == [(1, None), (1, 1), (2, 1)]
    assert [number for number, _ in backward] == [-2, -1, -1]
    assert [follows for _, follows in backward] == [None, -2, -1]
    torch.testing.assert_close(x.grad, torch.full((3,), 2.0))


def test_an_exchange_of_zeros_stays_in_the_backward():
    """It depends on no gradient, and would have been computed in the forward, or once for several."""
    x = torch.ones(3, requires_grad=True)
    forward, backward = halves_of(lambda x: swap(Zeros.apply(Zeros.apply(x)), 1), x)
    assert forward == [(1, None)]
    assert [number for number, _ in backward] == [-1, -9, -9]
    assert [follows for _, follows in backward] == [None, -1, -9]


def test_a_backward_that_begins_with_zeros():
    x = torch.ones(3, requires_grad=True)
    forward, backward = halves_of(lambda x: Zeros.apply(x), x)
    assert forward == []
    ((number, follows),) = backward
    assert number == -9 and follows.op == "placeholder"


@pytest.mark.parametrize("option", [{"aggressive_recomputation": True}, {"activation_memory_budget": 0.1}], ids=str)
def test_no_exchange_is_made_again_in_the_backward(option):
    """Whether one would be depends on sizes, which differ between ranks."""
    x = torch.ones(3, requires_grad=True)
    with torch._functorch.config.patch(option):
        with raises_catalogue(MoEUnsupportedError, got="=".join(map(str, *option.items()))):
            halves_of(lambda x: swap(x.exp(), 1).sin(), x)
        halves_of(lambda x: x.exp().sin(), x)


def test_a_graph_that_is_traced_again_is_ordered_again():
    x = torch.ones(2, 3)
    first = make_fx(lambda x, y: (swap(x, 1), swap(y, 2), swap(x, 3)), tracing_mode="fake")(*x)
    order_pass(first.graph)
    first.recompile()
    again = make_fx(first, tracing_mode="fake")(*x)
    order_pass(again.graph)
    again.recompile()
    follows = [node.args[2:] or node.kwargs.get("follows") for node in again.graph.nodes if node.target == OP]
    assert not follows[0] and all(isinstance(given[0], torch.fx.Node) for given in follows[1:])
    assert all(torch.equal(a, b) for a, b in zip(again(*x), (x[0], x[1], x[0]), strict=True))


def test_parts_of_a_graph_must_not_exchange():
    """One that is called as a whole would have an order of its own, and goes where nobody reads what it returns."""
    inner = make_fx(lambda x: swap(x, 1), tracing_mode="fake")(torch.ones(3))
    graph = torch.fx.Graph(torch.nn.ModuleDict({"inner": inner}))
    graph.output(graph.get_attr("inner"))
    with raises_catalogue(MoEUnsupportedError, got="diffulex_exchange.swap_for_tests.default in inner"):
        order_pass(graph)
