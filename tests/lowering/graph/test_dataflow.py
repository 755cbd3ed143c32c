import pytest
import torch
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from lowering.errors import ReasonCode
from lowering.graph import dataflow
from lowering.graph.dataflow import MatchError, aten, prims
from lowering.report import layer_of
from tests.support.graphs import calls, trace

T, E = 6, 8
X = torch.randn(T, E)


def body(function, *inputs):
    """The node that a traced function returns."""
    graph = trace(function, *(inputs or (X,))).graph
    returned = graph.output_node().args[0]
    return returned[0] if isinstance(returned, tuple | list) else returned


def source(node):
    """The first input of the graph of a node."""
    return next(iter(node.graph.nodes))


def test_is_op_knows_overloads_packets_and_functions():
    node = body(lambda x: x * 2)
    assert dataflow.is_op(node, aten.mul) and dataflow.is_op(node, aten.mul.Tensor)
    assert not dataflow.is_op(node, aten.mul.Scalar) and not dataflow.is_op(node, aten.div)
    assert not dataflow.is_op(source(node), aten.mul) and not dataflow.is_op(2.0, aten.mul)
    assert dataflow.describe(node) == "aten.mul.Tensor" and dataflow.describe(2.5) == "2.5"
    assert dataflow.describe(source(node)).startswith("placeholder")


def test_arguments_fills_in_defaults_and_keywords():
    topk = body(lambda x: x.topk(2)[0]).args[0]
    assert dataflow.arguments(topk) == {"self": source(topk), "k": 2, "dim": -1, "largest": True, "sorted": True}
    total = body(lambda x: torch.sum(x, -1, keepdim=True))
    assert dataflow.arguments(total)["keepdim"] is True and dataflow.arguments(total)["dtype"] is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone(),
        lambda x: x.view(T, E).detach().clone(),
        lambda x: x.reshape(2, 3 * E).view(T, E),
        lambda x: x.unsqueeze(-1).squeeze(-1),
    ],
)
def test_copies_and_views_are_peeled(function):
    node = body(function)
    assert dataflow.peel_views(node) is dataflow.origin(node) is source(node)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.t(),  # not row-major
        lambda x: x[:, :4],
        lambda x: x[:1].expand(T, E),  # repeats
        lambda x: x + 0.0,
    ],
)
def test_what_changes_or_moves_values_is_not_peeled(function):
    node = body(function)
    assert dataflow.origin(node) is node


def test_copies_keep_the_shape():
    node = body(lambda x: x.reshape(T * E).clone())
    assert dataflow.is_op(dataflow.peel_copies(node), aten.view, aten.reshape)


@pytest.mark.parametrize(
    ("first", "second", "casts", "widening"),
    [
        (torch.bfloat16, torch.float32, True, True),
        (torch.float16, torch.float64, True, True),
        (torch.float32, torch.bfloat16, True, False),
        (torch.float32, torch.float64, True, False),
        (torch.int64, torch.int32, True, False),
        (torch.int64, torch.int8, False, False),
        (torch.float32, torch.int32, False, False),
        (torch.int32, torch.float32, False, False),
        (torch.float32, torch.bool, False, False),
    ],
)
def test_casts_between_kinds_of_numbers(first, second, casts, widening):
    node = body(lambda x: x.to(second), torch.ones(T, E, dtype=first))
    assert dataflow.cast_source(node) is source(node)
    assert (dataflow.peel_casts(node) is source(node)) == casts
    assert (dataflow.peel_widening(node) is source(node)) == widening


def test_only_the_exact_casts_of_a_chain_are_widening():
    node = body(lambda x: x.bfloat16().float())
    assert dataflow.peel_widening(node) is node.args[0]
    assert dataflow.peel_casts(node) is source(node)


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (lambda x: x * 0 + torch.zeros_like(x), 0),
        (lambda x: x + torch.full((E,), -1.5), -1.5),
        (lambda x: x + torch.full((1, E), 3.0).expand(T, E), 3.0),
        (lambda x: x + torch.ones(E, dtype=torch.bfloat16).float(), 1),
        (lambda x: x + 2, 2),
    ],
)
def test_constants(function, value):
    node = body(function)
    assert dataflow.constant(node.args[1]) == value
    assert dataflow.constant(source(node)) is None


def test_masked_fill_holds_its_constant():
    node = body(lambda x: x.masked_fill(x > 0, float("-inf")))
    assert dataflow.is_op(node, aten.where) and dataflow.constant(node.args[1]) == float("-inf")


@pytest.mark.parametrize(
    ("function", "same"),
    [
        (lambda x: (x.sigmoid(), x.sigmoid()), True),
        (lambda x: (x.sigmoid().clone(), x.sigmoid()), True),
        (lambda x: ((2 * x).exp().sum(-1), (2 * x).exp().sum(-1)), True),
        (lambda x: (x.sum(-1), x.sum(0)), False),
        (lambda x: (x.sigmoid(), (x + 1).sigmoid()), False),
        (lambda x: (x.sum(-1, keepdim=True), x.sum(-1)), False),
        (lambda x: (torch.rand_like(x), torch.rand_like(x)), False),
    ],
)
def test_same_value(function, same):
    graph = make_fx(function, tracing_mode="fake")(X).graph
    left, right = graph.output_node().args[0]
    assert left is not right
    assert dataflow.same_value(left, right) == same == dataflow.same_value(right, left)


def test_shapes_are_compared_without_guards():
    def function(x, y):
        return x + 1, y + 1

    graph = make_fx(function, tracing_mode="symbolic")(torch.randn(6, 8), torch.randn(10, 8)).graph
    left, right = graph.output_node().args[0]
    rows, columns = dataflow.tensor_of(left).shape
    guards = len(rows.node.shape_env.guards)
    assert dataflow.has_shape(left, (rows, columns)) and not dataflow.has_shape(left, (rows, columns, 1))
    assert not dataflow.has_shape(left, (columns, rows)) and not dataflow.has_shape(left, (6, 8))
    assert not dataflow.has_shape(right, (rows, columns))
    assert len(rows.node.shape_env.guards) == guards


@pytest.mark.parametrize(
    ("dim", "last"), [(-1, True), (1, True), ([1], True), ([-1], True), (0, False), ([0, 1], False)]
)
def test_last_dim(dim, last):
    assert dataflow.is_last_dim(dim, source(body(lambda x: x + 1))) == last


def test_reductions_over_everything_name_no_last_dim():
    assert not any(dataflow.is_last_dim(dim, source(body(lambda x: x + 1))) for dim in ([], None))


def test_outputs_and_users():
    values = body(lambda x: x.topk(2)[0] * x.topk(2)[1])
    first, second = values.args
    assert dataflow.outputs(first.args[0], 0) == [first] and dataflow.outputs(first.args[0], 1) == []
    assert dataflow.is_output(first, first.args[0], index=0) and not dataflow.is_output(first, first.args[0], index=1)
    assert dataflow.is_output(second, second.args[0], index=1)


def test_ancestors_stop():
    node = body(lambda x: (x.sigmoid() + x.exp()).sum(-1))
    everything = list(dataflow.ancestors(node, stop=lambda _: False))
    assert len(everything) == len(set(everything)) == 5
    below = list(dataflow.ancestors(node, stop=lambda n: dataflow.is_op(n, aten.add)))
    assert below == everything[:2]


def test_refusals_are_typed():
    with pytest.raises(MatchError, match="no such thing") as caught:
        dataflow.require(False, "no such thing", code=ReasonCode.OPTION)
    assert caught.value.reason.code is ReasonCode.OPTION
    dataflow.require(True, "never said")
    with pytest.raises(MatchError, match="no tensor metadata") as caught:
        dataflow.tensor_of(Graph().placeholder("x"))
    assert caught.value.reason.code is ReasonCode.STRUCTURE


def test_inserted_calls_know_their_value_and_place():
    module = trace(lambda x: x.half().topk(2)[0], X)
    (topk,) = calls(module.graph, aten.topk.default)
    topk.meta["nn_module_stack"] = {"0": ("L['self'].model", object), "1": ("L['self'].model.gate", object)}
    topk.meta["partitioner_tag"] = "is_forward"
    with module.graph.inserting_before(topk):
        sort = dataflow.insert_call(module.graph, aten.sort.default, args=(topk.args[0], -1, True), like=topk)
        wide = dataflow.insert_cast(module.graph, sort.args[0], dtype=torch.float32, like=topk)
        assert dataflow.insert_cast(module.graph, wide, dtype=torch.float32, like=topk) is wide
    assert [value.dtype for value in sort.meta["val"]] == [torch.float16, torch.int64]
    assert dataflow.is_op(wide, prims.convert_element_type) and dataflow.has_shape(wide, (T, E))
    assert dataflow.tensor_of(wide).dtype == torch.float32
    assert layer_of(sort) == "model.gate" and sort.meta["partitioner_tag"] == "is_forward"
    assert sort.meta["original_aten"] is aten.sort.default  # the name of the kernel that is generated for it


def test_inserted_calls_take_symbolic_sizes():
    module = make_fx(lambda x: x.exp(), tracing_mode="symbolic")(X)
    (exp,) = calls(module.graph, aten.exp.default)
    with module.graph.inserting_before(exp):
        flat = dataflow.insert_call(module.graph, aten.reshape.default, args=(exp.args[0], [-1]), like=exp)
    rows, columns = dataflow.tensor_of(exp).shape
    assert dataflow.has_shape(flat, (rows * columns,))
