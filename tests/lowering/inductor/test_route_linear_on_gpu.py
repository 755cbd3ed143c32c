"""A router with its product on a real device: against the product and `moe_route`, in CUDA graphs, on two streams."""

import functools

import pytest
import torch
from torch.nn.functional import linear

import diffulex  # noqa: F401  the pass that finds a router's product
from lowering.inductor.passes import register_lowerings
from lowering.ops.moe_route_linear import route_linear_schedule
from lowering.report import collect
from lowering.spec import RoutingSpec
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.gpu

ops = torch.ops.diffulex
GROUPED = RoutingSpec(8, "sigmoid", 8, 4, eps=1e-20, scale=2.5)
SHAPES = {  # E, H, routing, whether the product is in fp32 behind a cast
    "qwen3": (128, 2048, RoutingSpec(8), False),
    "llada2": (256, 2048, GROUPED, True),
    "dsv3": (256, 7168, GROUPED, True),
    "mixtral": (8, 4096, RoutingSpec(2), False),
}
TOKENS = [1, 2, 4, 8, 64, 200]
SETS, REPLAYS = 5, 50


class Router:
    """weights [T, K], ids [T, K], order, token [N], offsets [E+1], and with `kept` the logits [T, E]."""

    def __init__(self, name, *, kept=False):
        self.experts, self.hidden, self.spec, self.wide = SHAPES[name]
        self.kept = kept

    def logits(self, hidden_TH, weight_EH):
        return linear(hidden_TH.float(), weight_EH.float()) if self.wide else linear(hidden_TH, weight_EH)

    def route(self, logits_TE, bias_E):
        bias_E = bias_E if self.spec.score == "sigmoid" else None
        return ops.moe_route(logits_TE, bias_E, None, *self.spec.op_args())

    def __call__(self, hidden_TH, weight_EH, bias_E):
        logits_TE = self.logits(hidden_TH, weight_EH)
        weights_TK, ids_TK = self.route(logits_TE, bias_E)
        found = (weights_TK, ids_TK, *ops.moe_dispatch(ids_TK, self.experts))
        return (*found, logits_TE) if self.kept else found

    def inputs(self, tokens, sets=1):
        """Several times hidden [T, H] bf16, with the same weight [E, H] bf16 and bias [E] fp32."""
        generator = torch.Generator("cuda").manual_seed(tokens)

        def drawn(*size):
            return torch.randn(size, generator=generator, device="cuda")

        weight_EH, bias_E = drawn(self.experts, self.hidden).bfloat16() / self.hidden**0.5, 0.1 * drawn(self.experts)
        return [(drawn(tokens, self.hidden).bfloat16(), weight_EH, bias_E) for _ in range(sets)]


def compiled(function, inputs, **how):
    """`function` compiled with all caches off, and run once: its routers take kernels of their own."""
    register_lowerings()
    torch._dynamo.reset()
    how = {"fullgraph": True, "dynamic": False, **how}
    with torch._inductor.config.patch(force_disable_caches=True), collect() as decisions:
        run = torch.compile(function, **how)
        run(*inputs)
    told = [decision.outcome for decision in decisions if (decision.stage, decision.subject) == ("lower", "moe_route")]
    assert told and all(outcome.startswith("triton moe_route_linear") for outcome in told), told
    return run


def cloned(values):
    return [value.clone() for value in values]


def assert_equal(ours, wanted, what=""):
    for one, other in zip(ours, wanted, strict=True):
        assert torch.equal(one, other), what


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_against_the_parts(name, tokens):
    router = Router(name, kept=True)
    (inputs,) = router.inputs(tokens)
    weights_TK, ids_TK, *slots, logits_TE = compiled(router, inputs)(*inputs)
    apart_TE = router.logits(*inputs[:2])
    exact_TE = inputs[0].double() @ inputs[1].double().T
    assert logits_TE.dtype == apart_TE.dtype
    if router.wide:  # against the accuracy of what is summed in fp32 by matrix units: the library's product does so
        apart_TE = torch.mm(inputs[0], inputs[1].T, out_dtype=torch.float32)
    assert_oracle_ratio(logits_TE, apart_TE, exact_TE)
    # of these logits, everything is what the ops make of it
    wanted_TK, wanted_ids_TK = router.route(logits_TE, inputs[2])
    assert torch.equal(ids_TK, wanted_ids_TK)
    exact_TK, _ = ops.moe_route(logits_TE.double(), None, ids_TK, *router.spec.op_args())
    assert_oracle_ratio(weights_TK, wanted_TK, exact_TK)
    assert_equal(slots, ops.moe_dispatch(ids_TK, router.experts))
    # and where the logits are those of the product, so is the choice
    _, apart_ids_TK = router.route(apart_TE, inputs[2])
    same_T = (apart_TE == logits_TE).all(1)
    assert torch.equal(apart_ids_TK[same_T], ids_TK[same_T])


@functools.cache
@torch.no_grad()
def reference(name, tokens):
    """A router, inputs, the compiled router, and its outputs for each set of them: launched one by one."""
    router = Router(name)
    inputs = router.inputs(tokens, SETS)
    run = compiled(router, inputs[0])
    return inputs, run, [cloned(run(*one)) for one in inputs]


CELLS = [("qwen3", 1), ("mixtral", 4), ("dsv3", 1), ("llada2", 8), ("qwen3", 64), ("dsv3", 200)]


@pytest.mark.parametrize(("name", "tokens"), CELLS)
@torch.no_grad()
def test_cuda_graphs(name, tokens):
    inputs, run, wanted = reference(name, tokens)
    static = cloned(inputs[0])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run(*static)
    for replay in range(REPLAYS):
        static[0].copy_(inputs[replay % SETS][0])
        graph.replay()
        assert_equal(outs, wanted[replay % SETS], replay)


@pytest.mark.parametrize(("name", "tokens"), CELLS)
@torch.no_grad()
def test_two_streams_at_once(name, tokens):
    inputs, run, wanted = reference(name, tokens)
    torch.cuda.synchronize()
    streams, outs = [torch.cuda.Stream() for _ in range(2)], []
    for replay in range(REPLAYS):
        with torch.cuda.stream(streams[replay % 2]):
            outs.append(run(*inputs[replay % SETS]))
    torch.cuda.synchronize()
    for replay, out in enumerate(outs):
        assert_equal(out, wanted[replay % SETS], replay)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no early launches here"
)
@pytest.mark.parametrize(("name", "tokens"), CELLS)
@torch.no_grad()
def test_early_launches_give_the_same_bits(name, tokens):
    """Back to back in one graph, so that every kernel follows another one closely."""
    inputs, _, wanted = reference(name, tokens)
    run = compiled(Router(name), inputs[0], options={"triton.enable_pdl": True})
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [run(*one) for one in inputs]
    for replay in range(REPLAYS):
        graph.replay()
        for out, right in zip(outs, wanted, strict=True):
            assert_equal(out, right, replay)


@torch.no_grad()
def test_one_graph_for_many_token_counts():
    """A layer whose expert GEMMs bound the rows: kernels scheduled for the most rows are right for any number."""
    experts, hidden, width, top_k = 32, 512, 256, 4
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*size):
        return torch.randn(size, generator=generator, device="cuda").bfloat16() / size[-1] ** 0.5

    weights = (drawn(experts, hidden), drawn(experts, 2 * width, hidden), drawn(experts, hidden, width))

    def layer(hidden_TH, gate_EH, w13_EJH, w2_EHI):
        logits_TE = hidden_TH @ gate_EH.T
        weights_TK, ids_TK = ops.moe_route(logits_TE, None, None, top_k)
        order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, experts)
        act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, top_k, "swiglu")
        slots_NH = ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)
        return ops.moe_combine(slots_NH, weights_TK), weights_TK, ids_TK, order_N, offsets_E1, logits_TE

    rows = {tokens: 8 * drawn(tokens, hidden) for tokens in (9, 2, 3, 16, 64, 77)}
    torch._dynamo.mark_dynamic(rows[9], 0)
    run = compiled(layer, (rows[9], *weights), dynamic=None)
    with torch.compiler.set_stance("fail_on_recompile"):
        for hidden_TH in rows.values():
            out_TH, weights_TK, ids_TK, order_N, offsets_E1, logits_TE = run(hidden_TH, *weights)
            assert_oracle_ratio(logits_TE, hidden_TH @ weights[0].T, hidden_TH.double() @ weights[0].double().T)
            assert torch.equal(ids_TK, ops.moe_route(logits_TE, None, None, top_k)[1])
            assert_equal((order_N, offsets_E1), ops.moe_dispatch(ids_TK, experts)[::2])
            wanted_TK, exact_TK = (ops.moe_route(x, None, ids_TK, top_k)[0] for x in (logits_TE, logits_TE.double()))
            assert_oracle_ratio(weights_TK, wanted_TK, exact_TK)
            assert out_TH.isfinite().all()


def test_the_cells_are_all_schedules():
    """Products without matrix units, tiles of 16 rows and of 64."""
    kinds = set()
    for name, tokens in CELLS:
        experts, hidden, *_ = SHAPES[name]
        schedule = route_linear_schedule(tokens, experts, hidden=hidden)
        kinds.add((schedule.part["DOT"], schedule.part["BLOCK_T"] == 64))
    assert kinds == {(False, False), (True, False), (True, True)}
