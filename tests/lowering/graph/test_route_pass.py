import contextlib
import dataclasses

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

import diffulex  # noqa: F401  (gives transformers the experts implementation "diffulex")
from lowering.errors import ReasonCode
from lowering.graph import route_pass as route_module
from lowering.graph.dataflow import aten
from lowering.graph.route_pass import RouteRecord, route_pass
from lowering.reference.moe_route import moe_route_reference
from lowering.spec import RoutingSpec
from tests.support import routers
from tests.support.graphs import applied, backend_with, calls, no_pass, trace
from tests.support.models import FAMILIES, TINY, build_model, token_ids
from tests.support.oracle import assert_oracle_ratio
from tests.support.routers import BIASED, MATCHED, REFUSED, REFUSED_IDS, SCALED, E, K, T

moe = torch.ops.diffulex
H, WIDTH = 8, 8


def name(value):
    return getattr(value, "__name__", None)


def experts(hidden_TH, w13_EIH, w2_EHI, ids_TK, weights_TK):
    order, _, offsets = moe.moe_dispatch(ids_TK.to(torch.int32), w13_EIH.shape[0])
    act = moe.moe_expert_up(hidden_TH, w13_EIH, None, order, offsets, ids_TK.shape[1])
    slots = moe.moe_expert_down(torch.tanh(act), w2_EHI, None, order, offsets)
    return moe.moe_combine(slots, weights_TK)


def block(router):
    """A router and its experts; the logits, the probabilities, the weights and the ids are looked at as well."""

    def run(hidden_TH, w13_EIH, w2_EHI, logits_TE, bias_E):
        weights, ids = router(logits_TE, bias_E)
        out = experts(hidden_TH, w13_EIH, w2_EHI, ids, weights)
        return out, weights, ids, logits_TE.float().softmax(-1)

    return run


def inputs(*, tokens=T, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    bias = 0.2 * normal(E)
    return normal(tokens, H), normal(E, WIDTH, H), normal(E, H, WIDTH), (2 * normal(tokens, E)).to(dtype), bias


def routed(router, args):
    """The graph of the block after the pass, and what the pass recorded."""
    records = []
    graph = applied(lambda graph: route_pass(graph, record=records.append), trace(block(router), *args))
    (record,) = records
    return graph, record


def dense(weights_TK, ids_TK):
    """[T, E]: the order in which the experts of a token are named does not matter."""
    return torch.zeros(*weights_TK.shape[:1], E, dtype=weights_TK.dtype).scatter(1, ids_TK, weights_TK)


def assert_same_routing(router, spec, args, outputs):
    out, weights, ids, probs = outputs
    out_eager, weights_eager, ids_eager, probs_eager = block(router)(*args)
    assert ids.dtype == ids_eager.dtype and weights.dtype == weights_eager.dtype
    assert torch.equal(ids.sort(-1).values, ids_eager.sort(-1).values)
    bias = args[4] if router in BIASED else None
    scale = args[4] if router in SCALED else None
    weights_exact, ids_exact = moe_route_reference(args[3], spec, bias_E=bias, per_expert_scale_E=scale)
    oracle = dense(weights_exact, ids_exact.long())
    assert_oracle_ratio(dense(weights, ids), dense(weights_eager, ids_eager), oracle, what="weights")
    out_exact = block(lambda *_: (oracle.gather(1, ids), ids))(*(arg.double() for arg in args))[0]
    assert_oracle_ratio(out, out_eager, out_exact)
    torch.testing.assert_close(probs, probs_eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("router", "spec"), MATCHED.items(), ids=name)
def test_routers_are_rewritten(router, spec, dtype):
    args = inputs(dtype=dtype)
    graph, record = routed(router, args)
    (route,) = calls(graph.graph, moe.moe_route.default)
    assert record == RouteRecord("moe_dispatch", "", route=route.name, spec=spec)
    assert not calls(graph.graph, aten.topk.default, aten.gather.default), "the old selection is gone"
    (dispatch,) = calls(graph.graph, moe.moe_dispatch.default)
    assert dispatch.args[0] in route.users and route.args[0].op == "placeholder"
    assert_same_routing(router, spec, args, graph(*args))


@pytest.mark.parametrize(("router", "reason"), (REFUSED | REFUSED_IDS).items(), ids=name)
def test_others_are_left_alone(router, reason):
    args = inputs()
    untouched = trace(block(router), *args)
    graph, record = routed(router, args)
    assert record.route is None and record.spec is None
    assert record.reason.code is reason[0] and reason[1] in record.reason.detail
    assert str(graph.graph) == str(untouched.graph)


@pytest.mark.parametrize(
    "wrong",
    [{"scale": 2.5001}, {"eps": 1e-3}, {"topk_group": 1}, {"group_score": "max"}, {"score": "softmax"}, {}],
    ids=str,
)
def test_a_wrong_spec_would_be_seen(wrong, monkeypatch):
    """The comparison of the test above fails where the pass reads the formula wrongly, and only there."""
    read = route_module.match_formula

    def misread(weights, topk):
        formula = read(weights, topk)
        return dataclasses.replace(formula, spec=dataclasses.replace(formula.spec, **wrong))

    monkeypatch.setattr(route_module, "match_formula", misread)
    args, router = inputs(), routers.sigmoid_groups
    graph, _ = routed(router, args)
    with pytest.raises(AssertionError) if wrong else contextlib.nullcontext():
        assert_same_routing(router, MATCHED[router], args, graph(*args))


def test_what_the_op_does_not_take_is_refused(monkeypatch):
    """And the graph is as it was."""
    read = route_module.match_formula

    def misread(weights, topk):
        formula = read(weights, topk)
        return dataclasses.replace(formula, spec=dataclasses.replace(formula.spec, eps=-1.0))

    def router(logits, bias):
        return routers.sigmoid_bias(logits, bias.unsqueeze(0))

    monkeypatch.setattr(route_module, "match_formula", misread)
    args = inputs()
    graph, record = routed(router, args)
    assert record.reason.code is ReasonCode.OPTION and "got eps=-1.0" in record.reason.detail
    assert str(graph.graph) == str(trace(block(router), *args).graph)


def test_a_runtime_factor_stays_behind_the_op():
    """Under dynamic=True a float attribute of a module, such as routed_scaling_factor, is an input of the graph."""
    args, factor = inputs(), torch.tensor(2.5, dtype=torch.float64)

    def scaled(*args):
        def router(logits, bias):
            weights, ids = routers.softmax_topk_renorm(logits, bias)
            return args[5].to(torch.float32) * weights, ids

        return block(router)(*args[:5])

    records = []
    graph = applied(lambda graph: route_pass(graph, record=records.append), trace(scaled, *args, factor))
    assert records[0].spec == MATCHED[routers.softmax_topk_renorm]
    for ours, eager in zip(graph(*args, factor), scaled(*args, factor), strict=True):
        torch.testing.assert_close(ours, eager)


def test_two_layers_of_one_selection_share_the_op():
    def twice(hidden, w13, w2, logits, bias):
        weights, ids = routers.sigmoid_bias(logits, bias)
        return experts(experts(hidden, w13, w2, ids, weights), w13, w2, ids, weights)

    args, records = inputs(), []
    graph = applied(lambda graph: route_pass(graph, record=records.append), trace(twice, *args))
    (route,) = calls(graph.graph, moe.moe_route.default)
    assert [record.route for record in records] == [route.name] * 2 and records[0].spec == records[1].spec
    assert {dispatch.args[0] for dispatch in calls(graph.graph, moe.moe_dispatch.default)} <= set(route.users)
    torch.testing.assert_close(graph(*args), twice(*args))


def test_a_router_that_calls_the_op_itself_is_recorded():
    spec = RoutingSpec(K, "sigmoid", scale=2.0)
    records = []
    graph = trace(block(lambda logits, bias: moe.moe_route(logits, bias, None, K, "sigmoid", scale=2.0)[:2]), *inputs())
    before = str(graph.graph)
    route_pass(graph.graph, record=records.append)
    assert str(graph.graph) == before and records[0].spec == spec and records[0].reason is None


def test_shared_experts_of_the_ids_without_a_combine_are_refused():
    def no_combine(hidden, w13, w2, logits, bias):
        return moe.moe_dispatch(routers.softmax_topk(logits, bias)[1].int(), E)

    def two_combines(hidden, w13, w2, logits, bias):
        weights, ids = routers.softmax_topk(logits, bias)
        order, _, offsets = moe.moe_dispatch(ids.int(), E)
        slots = moe.moe_expert_down(moe.moe_expert_up(hidden, w13, None, order, offsets, K), w2, None, order, offsets)
        return moe.moe_combine(slots, weights), moe.moe_combine(slots, weights * 2)

    for function, code in ((no_combine, ReasonCode.STRUCTURE), (two_combines, ReasonCode.SHARED_USE)):
        records = []
        route_pass(trace(function, *inputs()).graph, record=records.append)
        assert records[0].reason.code is code


# --- training: the joint graph of forward and backward --------------------------------------------------------------


def train(function, args, graph_pass):
    """Outputs, and gradients of the floating arguments, of the function compiled through a joint graph."""

    def run(module, example_inputs):
        return make_boxed_func(module.forward)

    def partition(joint, *rest, **options):
        return min_cut_rematerialization_partition(applied(graph_pass, joint), *rest, **options)

    compiled = aot_function(function, run, run, partition_fn=partition, decompositions=select_decomp_table())
    leaves = [arg.clone().requires_grad_() for arg in args]
    outputs = compiled(*leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=generator)).sum() for o in (outputs[0], outputs[-1]))
    return outputs, torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_same_gradients(ours, stock):
    for mine, other in zip(ours, stock, strict=True):
        assert (mine is None) == (other is None)
        if other is not None:
            assert torch.linalg.vector_norm(mine - other) <= 1e-5 * torch.linalg.vector_norm(other)


@pytest.mark.parametrize("router", [router for router in MATCHED if router is not routers.softmax_groups], ids=name)
def test_gradients_are_those_of_the_formula(router):
    args, records, graphs = inputs(), [], []

    def recorded(graph):
        graphs.append(route_pass(graph, record=records.append))

    outputs, grads = train(block(router), args, recorded)
    stock_outputs, stock_grads = train(block(router), args, no_pass)
    assert records[0].spec == MATCHED[router] and calls(graphs[0], moe.moe_route.default)
    assert not calls(graphs[0], aten.topk.default)
    ids, stock_ids = outputs[2], stock_outputs[2]
    assert torch.equal(ids.sort(-1).values, stock_ids.sort(-1).values)
    assert_same_gradients(grads, stock_grads)


@pytest.mark.parametrize(
    "router", [routers.softmax_topk_renorm, routers.topk_softmax, routers.sigmoid_groups], ids=name
)
def test_ties_are_broken_once_for_forward_and_backward(router):
    """All logits equal: the op takes the lowest ids. Forward, saved ids and gradients must all speak of those."""
    args = [*inputs()]
    args[3], args[4] = torch.full((T, E), 0.5), torch.zeros(E)
    spec = MATCHED[router]

    def with_op(logits, bias):
        return moe.moe_route(logits, bias, None, *spec.op_args())

    outputs, grads = train(block(router), args, route_pass)
    op_outputs, op_grads = train(block(lambda *a: (with_op(*a)[0], with_op(*a)[1].long())), args, no_pass)
    assert torch.equal(outputs[2], op_outputs[2]) and outputs[2].max() < E // 2
    torch.testing.assert_close(outputs[0], op_outputs[0])
    assert_same_gradients(grads[:4], op_grads[:4])


def test_a_backward_through_the_mask_of_groups_is_refused():
    """Gradients of masked scores are masked with the old choice of groups, which may keep others where groups tie."""
    records = []
    args = [*inputs()]
    args[3] = torch.full((T, E), 0.5)
    _, ours = train(block(routers.softmax_groups), args, lambda graph: route_pass(graph, record=records.append))
    _, stock = train(block(routers.softmax_groups), args, no_pass)
    assert records[0].reason.code is ReasonCode.SHARED_USE
    assert_same_gradients(ours, stock)


def test_values_that_others_use_follow_the_ids():
    """An auxiliary loss on the top-k's own values and indices, in inference and training."""

    def with_loss(hidden, w13, w2, logits, bias):
        probs = logits.softmax(-1)
        values, ids = torch.topk(probs, K)
        out = experts(hidden, w13, w2, ids, values / values.sum(-1, keepdim=True))
        return out, values, ids, probs

    def with_masked_values(hidden, w13, w2, logits, bias):
        probs = logits.softmax(-1)
        groups = probs.view(-1, routers.G, E // routers.G)
        kept = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, groups.amax(-1).topk(2)[1], True)
        values, ids = groups.masked_fill(~kept[..., None], 0.0).flatten(1).topk(K)
        return experts(hidden, w13, w2, ids, values / values.sum(-1, keepdim=True)), values, ids, probs

    args = [*inputs()]
    args[3] = torch.randint(0, 3, (T, E), generator=torch.Generator().manual_seed(0)).float()  # many ties
    graphs = [applied(route_pass, trace(function, *args)) for function in (with_loss, with_masked_values)]
    assert all(calls(graph.graph, moe.moe_route.default) for graph in graphs)
    for outputs in (*(graph(*args) for graph in graphs), train(with_loss, args, route_pass)[0]):
        _, values, ids, probs = outputs
        torch.testing.assert_close(values, probs.gather(1, ids))


# --- stock models -----------------------------------------------------------------------------------------------------

SPECS = {
    "qwen3_moe": RoutingSpec(2, "softmax", renorm=True),
    "mixtral": RoutingSpec(2, "softmax", renorm=True),
    "olmoe": RoutingSpec(2, "softmax", renorm=False),
    "deepseek_v3": RoutingSpec(2, "sigmoid", n_group=4, topk_group=2, renorm=True, eps=1e-20, scale=2.5),
    "gpt_oss": RoutingSpec(2, "softmax", select_on="logits"),
}


def compiled_model(model, records, **options):
    torch._dynamo.reset()
    backend = backend_with(lambda graph: route_pass(graph, record=records.append))
    return torch.compile(model, backend=backend, fullgraph=True, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_models(family):
    layers = 2 if family == "qwen3_moe" else 1
    model, records = build_model(family, dataclasses.replace(TINY, layers=layers), experts="diffulex"), []
    ids = token_ids(model, 2, 9)
    with torch.no_grad():
        ours = compiled_model(model, records)(ids, use_cache=False).logits
        eager = model(ids, use_cache=False).logits
        exact = model.double()(ids, use_cache=False).logits
    assert [record.spec for record in records] == [SPECS[family]] * layers, records
    assert [record.module for record in records] == [f"model.layers.{i}.mlp.experts" for i in range(layers)]
    assert_oracle_ratio(ours, eager, exact)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_stock_blocks_in_bfloat16_over_token_counts(family):
    sizes = dataclasses.replace(TINY, layers=1)
    mlp = build_model(family, sizes, dtype=torch.bfloat16, experts="diffulex").model.layers[0].mlp
    records = []
    compiled = compiled_model(mlp, records, dynamic=True)
    with torch.no_grad():
        for tokens in (9, 33):
            hidden = torch.randn(1, tokens, TINY.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
            ours, eager = (output[0] if isinstance(output := run(hidden), tuple) else output for run in (compiled, mlp))
            assert torch.linalg.vector_norm(ours - eager) < 1e-2 * torch.linalg.vector_norm(eager)
    # Under dynamic=True the scaling factor is an input of the graph, so it stays outside the op.
    assert [record.spec for record in records] == [dataclasses.replace(SPECS[family], scale=1.0)], records


def test_a_stock_model_trains():
    model = build_model("deepseek_v3", dataclasses.replace(TINY, layers=1), experts="diffulex").train()
    ids, records = token_ids(model, 2, 9), []

    def gradients(run):
        model.zero_grad()
        run(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters()]

    assert_same_gradients(gradients(compiled_model(model, records)), gradients(model))
    assert [record.spec for record in records] == [SPECS["deepseek_v3"]]


def test_inductor_runs_the_pass_on_its_joint_graph():
    import torch._inductor.config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    records = []

    class Pass(CustomGraphPass):
        def __call__(self, graph):
            applied(lambda graph: route_pass(graph, record=records.append), graph.owning_module)

        def uuid(self):
            return None

    mlp = build_model("qwen3_moe", dataclasses.replace(TINY, layers=1), experts="diffulex").model.layers[0].mlp
    hidden = torch.randn(1, 7, TINY.hidden, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(joint_custom_pre_pass=Pass(), fx_graph_cache=False):
        ours = torch.compile(mlp, fullgraph=True)(hidden)
    assert [record.spec for record in records] == [SPECS["qwen3_moe"]]
    with torch.no_grad():
        assert_oracle_ratio(ours, mlp(hidden), mlp.double()(hidden.double()))
