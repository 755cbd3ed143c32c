"""A router's product is taken into the router where that is right, and left with a reason where it is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.functional import linear

from lowering import ops
from lowering.errors import ReasonCode
from lowering.graph import pipeline
from lowering.graph.dataflow import arguments, aten, outputs
from lowering.graph.regions import find_regions
from lowering.graph.route_linear_pass import route_linear_pass
from lowering.graph.router_linear_pass import router_linear_pass
from lowering.spec import RoutingSpec
from tests.support.graphs import applied, calls, trace_fakes
from tests.support.oracle import assert_oracle_ratio

T, H, E, K, WIDTH = 6, 16, 8, 2, 4
BF16, F32 = torch.bfloat16, torch.float32
GROUPED = RoutingSpec(K, "sigmoid", 4, 2, eps=1e-20, scale=2.5)


def route(logits, spec=None, bias=None, **given):
    spec = spec or RoutingSpec(K)
    return ops.moe_route(logits, bias, given.get("ids"), *spec.op_args(), given.get("scale"))


def early_reader(x, w, p):
    """What reads the logits stands before the router."""
    logits = x @ w.t()
    late = logits.sigmoid() * 2
    return late, route(logits.float(), GROUPED, p["bias"] * 2)


def noise_between(x, w, p):
    """Random numbers come in the order of the calls."""
    logits = x @ w.t()
    return torch.rand_like(logits), route(logits)


def depending(x, w, p):
    logits = x @ w.t()
    return route(logits, GROUPED, logits.float().mean(0))


TAKEN = {  # the dtypes of product and logits
    "plain": (lambda x, w, p: route(x @ w.t()), BF16, BF16),
    "linear": (lambda x, w, p: route(linear(x, w)), BF16, BF16),
    "biased": (lambda x, w, p: route(linear(x, w, p["linear_bias"]).float()), BF16, F32),
    "widened": (lambda x, w, p: route((x @ w.t()).float(), GROUPED, p["bias"], scale=p["bias"]), BF16, F32),
    "wide_product": (lambda x, w, p: route(x.float() @ w.float().t(), GROUPED, p["bias"]), F32, F32),
    "three_dimensional": (lambda x, w, p: route(linear(x.view(2, T // 2, H), w).view(-1, E).float()), BF16, F32),
}
KEPT = {  # the logits are read by others, as they came and widened
    "returned": lambda x, w, p: (logits := linear(x, w), *route(logits)),
    "returned_wide": lambda x, w, p: (logits := linear(x, w).float(), *route(logits)),
    "returned_in_three_dimensions": lambda x, w, p: (
        logits := linear(x.view(2, T // 2, H), w),
        *route(logits.view(-1, E).float()),
    ),
    "read_before": early_reader,
}
LEFT = {
    "no_product": (lambda x, w, p: route(p["dense_bias"] * 2), ReasonCode.STRUCTURE),
    "no_transposed_weight": (lambda x, w, p: route(x @ p["w_t"]), ReasonCode.STRUCTURE),
    "scaled_later": (lambda x, w, p: route((x @ w.t()) * 2), ReasonCode.STRUCTURE),
    "scaled": (lambda x, w, p: route(torch.addmm(p["linear_bias"], x, w.t(), alpha=2)), ReasonCode.OPTION),
    "a_bias_for_each_token": (lambda x, w, p: route(torch.addmm(p["dense_bias"], x, w.t())), ReasonCode.SHAPE),
    "other_rows": (lambda x, w, p: route(linear(x, w).view(2 * T, E // 2)), ReasonCode.SHAPE),
    "single": (lambda x, w, p: route(p["x32"] @ p["w32"].t()), ReasonCode.DTYPE),
    "narrowed": (lambda x, w, p: route((p["x32"] @ p["w32"].t()).bfloat16()), ReasonCode.STRUCTURE),
    "double": (lambda x, w, p: route((x @ w.t()).double()), ReasonCode.DTYPE),
    "given_ids": (lambda x, w, p: route(x @ w.t(), ids=p["ids"]), ReasonCode.OPTION),
    "shared": (lambda x, w, p: route(x @ w.t(), RoutingSpec(K, n_shared=2)), ReasonCode.OPTION),
    "columns_of_hidden": (lambda x, w, p: route(p["x_t"].t() @ w.t()), ReasonCode.LAYOUT),
    "columns_of_weight": (lambda x, w, p: route(x @ p["w_columns"].t()), ReasonCode.LAYOUT),
    "many_experts": (lambda x, w, p: route(x @ p["many"].t()), ReasonCode.SHAPE),
    "noise_between": (noise_between, ReasonCode.SHARED_USE),
    "depending": (depending, ReasonCode.SHARED_USE),
}


def inputs(device="cpu"):
    sizes = {
        "x": (T, H),
        "w": (E, H),
        "w_t": (H, E),
        "x_t": (H, T),
        "linear_bias": (E,),
        "dense_bias": (T, E),
        "many": (257, H),
        "bias": (E,),
        "x32": (T, H),
        "w32": (E, H),
    }
    torch.manual_seed(0)
    wide = ("bias", "x32", "w32")
    values = {name: torch.randn(s, device=device).to(F32 if name in wide else BF16) for name, s in sizes.items()}
    values["w_columns"] = values["w_t"].t()
    values["ids"] = torch.randint(0, E, (T, K), dtype=torch.int32, device=device)
    return values.pop("x"), values.pop("w"), values


def traced(function, device="cuda"):
    """The graph of a function on fake tensors, so that CUDA needs no device."""
    return trace_fakes(function, lambda: inputs(device))


def passed(function, **options):
    """The module after both passes over the product, and what the second found."""
    found = []

    def both(graph):
        router_linear_pass(graph)
        route_linear_pass(graph, record=found.append)

    return applied(both, traced(function, **options)), found


def flat(values):
    return torch.utils._pytree.tree_leaves(values)


def assert_computes(module, function):
    """The module's outputs are the function's: on the CPU the products are the same ones."""
    x, w, values = inputs()
    for ours, wanted in zip(flat(module(x, w, *values.values())), flat(function(x, w, values)), strict=True):
        assert ours.dtype == wanted.dtype and torch.equal(ours, wanted)


@pytest.mark.parametrize(("function", "product", "logits"), TAKEN.values(), ids=TAKEN)
def test_taken(function, product, logits):
    module, (found,) = passed(function)
    assert found.reason is None, found.reason
    (node,) = calls(module.graph, ops.moe_route_linear)
    given = arguments(node)
    assert (given["product_dtype"], given["logits_dtype"]) == (product, logits)
    assert [value.dtype for value in node.meta["val"]] == [F32, torch.int32, product]
    assert not outputs(node, 2)
    assert not calls(module.graph, ops.moe_route, aten.mm.default, aten.mm.dtype, aten.addmm.default)
    assert_computes(module, function)


@pytest.mark.parametrize("function", KEPT.values(), ids=KEPT)
def test_the_logits_have_other_readers(function):
    module, (found,) = passed(function)
    assert found.reason is None, found.reason
    (node,) = calls(module.graph, ops.moe_route_linear)
    assert len(outputs(node, 2)) == 1
    assert not calls(module.graph, aten.mm.default)
    assert_computes(module, function)


@pytest.mark.parametrize(("function", "code"), LEFT.values(), ids=LEFT)
def test_left_with_a_reason(function, code):
    module = traced(function)
    before = str(module.graph)
    found = []
    applied(lambda graph: route_linear_pass(graph, record=found.append), module)
    assert found[0].reason is not None and found[0].reason.code is code, found[0].reason
    assert str(module.graph) == before


def test_only_on_cuda():
    _, (found,) = passed(TAKEN["plain"][0], device="cpu")
    assert found.reason.code is ReasonCode.NOT_CUDA


def symbolic(**sizes):
    """A router of fake tensors, one size of which is symbolic."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    size = mode.from_tensor(torch.empty(5), symbolic_context=context).shape[0]
    with mode:
        x = torch.empty(size if "T" in sizes else T, H, dtype=BF16, device="cuda")
        w = torch.empty(size if "E" in sizes else E, H, dtype=BF16, device="cuda")
        module = make_fx(lambda x, w: route(x @ w.t()), decomposition_table=select_decomp_table())(x, w)
    found = []
    return applied(lambda graph: route_linear_pass(graph, record=found.append), module), found


def test_symbolic_tokens():
    module, (found,) = symbolic(T=None)
    assert found.reason is None
    (node,) = calls(module.graph, ops.moe_route_linear)
    assert all(isinstance(value.shape[0], torch.SymInt) for value in node.meta["val"])


def test_symbolic_experts():
    _, (found,) = symbolic(E=None)
    assert found.reason.code is ReasonCode.SHAPE


def test_a_training_graph_is_left():
    """Its backward reads the logits."""

    def step(x, w, p):
        logits = x @ w.t()
        return *route(logits), logits * p["dense_bias"]

    for name, code in (("tangents_1", ReasonCode.SHARED_USE), ("dense", None)):
        module = traced(step)
        placeholders = {node.meta["val"].shape: node for node in module.graph.nodes if node.op == "placeholder"}
        placeholders[T, E]._rename(name)
        found = []
        route_linear_pass(module.graph, record=found.append)
        assert (found[0].reason.code if found[0].reason else None) is code


def deepseek(x, w, p):
    """A router in fp32 with a correction, experts, a shared expert."""
    weights, ids = route(linear(x.float(), w.float()), GROUPED, p["bias"])
    order, _, offsets = ops.moe_dispatch(ids, E)
    act = ops.moe_expert_up(x, x.new_ones(E, 2 * WIDTH, H), None, order, offsets, K, "silu(g) * u")
    routed = ops.moe_combine(ops.moe_expert_down(act, x.new_ones(E, H, WIDTH), None, order, offsets), weights)
    gate, up, down = x.new_ones(WIDTH, H), x.new_ones(WIDTH, H), x.new_ones(H, WIDTH)
    return routed + linear(torch.nn.functional.silu(linear(x, gate)) * linear(x, up), down)


def test_the_block_of_a_deepseek_model():
    module = applied(pipeline.run_passes, traced(deepseek))
    stages = (ops.moe_route_linear, ops.moe_dispatch, ops.moe_expert_up_shared, ops.moe_expert_down_shared)
    assert [len(calls(module.graph, op)) for op in (*stages, ops.moe_combine)] == [1] * 5
    assert not calls(module.graph, aten.mm.default, aten.mm.dtype)
    (region,) = find_regions(module.graph)
    assert region.routing == GROUPED and dataclasses.asdict(region)["top_k"] == K


def test_the_logits_are_near_the_exact_product():
    """The rounding of the logits is that of the product."""
    function = TAKEN["plain"][0]
    module, _ = passed(lambda x, w, p: (logits := linear(x, w), *route(logits)))
    x, w, values = inputs()
    logits = module(x, w, *values.values())[0]
    assert_oracle_ratio(logits, x @ w.t(), x.double() @ w.double().t())
    assert function(x, w, values)[0].shape == (T, K)
