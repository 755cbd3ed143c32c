"""A router with its product in kernels of its own, or apart: which, that they compute the same, how many there are."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear, silu

import diffulex  # noqa: F401  the pass that finds a router's product
from lowering.errors import ReasonCode
from lowering.graph import pipeline
from lowering.inductor import offline, route_linear_lowerings
from lowering.inductor.fake_device import H100 as FAKE
from lowering.inductor.fake_device import fake_gpu
from lowering.inductor.offline import compile_kernels, offline_source
from lowering.inductor.passes import register_lowerings
from lowering.ops.moe_dispatch import moe_dispatch
from lowering.report import collect
from lowering.schedule.device import DeviceSpec
from lowering.schedule.plan import plan
from lowering.schedule.schedule import GemmShape
from lowering.spec import RoutingSpec
from tests.support.interpreter import interpreter
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

ops = torch.ops.diffulex
GROUPED = RoutingSpec(8, "sigmoid", 8, 4, eps=1e-20, scale=2.5)


def generated(fn, tensors, *, dynamic=False):
    """The code for a faked H100 and what was said of the router and its slots."""
    register_lowerings()
    torch._dynamo.reset()
    if dynamic:
        torch._dynamo.mark_dynamic(tensors[0], 0)
    with collect() as decisions:
        code = offline_source(fn, tensors)
    return code, {d.subject: d for d in decisions if d.stage in ("lower", "plan")}


# What the kernels compute


@dataclasses.dataclass(frozen=True)
class Case:
    """E experts and H columns; hidden [T, H], weight [E, H] and what else a router reads, in fp16."""

    spec: RoutingSpec
    experts: int
    hidden: int
    linear_bias: bool = False
    scale: bool = False
    wide: bool = False
    kept: bool = True

    def tensors(self, tokens):
        generator = torch.Generator().manual_seed(tokens + self.experts)

        def drawn(*size):
            return torch.randn(size, generator=generator)

        hidden_TH, weight_EH = drawn(tokens, self.hidden), drawn(self.experts, self.hidden) / self.hidden**0.5
        return [hidden_TH.half(), weight_EH.half(), drawn(self.experts).half(), *(drawn(self.experts) for _ in "bs")]

    def logits(self, hidden_TH, weight_EH, linear_bias_E):
        if self.wide:
            dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
            hidden_TH, weight_EH = hidden_TH.to(dtype), weight_EH.to(dtype)
        return linear(hidden_TH, weight_EH, linear_bias_E.to(hidden_TH.dtype) if self.linear_bias else None)

    def route(self, logits_TE, bias_E, scale_E):
        bias_E = bias_E if self.spec.score == "sigmoid" or self.spec.bias_in_weights else None
        options = (*self.spec.op_args(), scale_E if self.scale else None)
        dtype = torch.promote_types(logits_TE.dtype, torch.float32)
        return ops.moe_route(logits_TE.to(dtype), bias_E, None, *options)

    def __call__(self, hidden_TH, weight_EH, linear_bias_E, bias_E, scale_E):
        """weights, ids, order, token, offsets, and the logits if they are kept."""
        logits_TE = self.logits(hidden_TH, weight_EH, linear_bias_E)
        weights_TK, ids_TK = self.route(logits_TE, bias_E, scale_E)
        found = (weights_TK, ids_TK, *ops.moe_dispatch(ids_TK, self.experts))
        return (*found, logits_TE) if self.kept else found


CASES = {
    "softmax": Case(RoutingSpec(2), 8, 64),
    "padded": Case(RoutingSpec(3, renorm=0.0), 12, 100, linear_bias=True),
    "grouped": Case(RoutingSpec(3, "sigmoid", 3, 2, eps=1e-20, scale=2.5), 18, 128, scale=True, wide=True),
    "capped": Case(RoutingSpec(2, softcap=3.0, bias_in_weights=True, score_dtype="logits"), 5, 96, kept=False),
    "one": Case(RoutingSpec(1), 2, 16),
    "many": Case(RoutingSpec(4, "sqrtsoftplus"), 80, 320),
}


def check(code, case, tensors):
    found = interpreter().graph(code, case, tensors)
    weights_TK, ids_TK, *slots = found
    if case.kept:
        logits_TE = slots.pop()
        wanted = case.logits(*tensors[:3])
        exact = case.logits(*(tensor.double() for tensor in tensors[:3]))
        assert_oracle_ratio(logits_TE, wanted, exact)
        assert logits_TE.dtype == wanted.dtype

        def routed(logits_TE, bias_E, scale_E):
            return case.route(logits_TE, bias_E, scale_E)

        given = [logits_TE, *tensors[3:]]
        code, _ = generated(routed, given)
        for ours, theirs in zip((weights_TK, ids_TK), interpreter().graph(code, routed, given), strict=True):
            assert torch.equal(ours, theirs)
    else:
        assert_oracle_ratio(weights_TK, case(*tensors)[0], case(*(tensor.double() for tensor in tensors))[0])
    for ours, theirs in zip(slots, moe_dispatch(ids_TK, case.experts), strict=True):
        assert torch.equal(ours, theirs)


COUNTS = {
    "softmax": (1, 8, 21),
    "padded": (1, 8, 70),
    "grouped": (1, 5),
    "capped": (4, 20),
    "one": (2,),
    "many": (1, 70),
}


@pytest.mark.parametrize(("name", "tokens"), [(name, tokens) for name in COUNTS for tokens in COUNTS[name]])
def test_the_kernels_compute_the_op(name, tokens):
    case = CASES[name]
    tensors = case.tensors(tokens)
    code, _ = generated(case, tensors)
    assert code.extern_calls == ()
    assert len(code.calls) == 3
    check(code, case, tensors)


@pytest.fixture(scope="module")
def symbolic_code():
    """For up to 181 tokens, as expert GEMMs behind it would bound them."""
    case = CASES["softmax"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route_linear_lowerings, "rows_bound", lambda rows, dispatch, device: 362)
        code, told = generated(case, case.tensors(9), dynamic=True)
    assert told["moe_route"].outcome == "triton moe_route_linear 16x8x64/1 4 warps"
    return code


@pytest.mark.parametrize("tokens", [2, 9, 40])
def test_symbolic_tokens(symbolic_code, tokens):
    check(symbolic_code, CASES["softmax"], CASES["softmax"].tensors(tokens))


# Which way


def test_many_tokens_are_left_to_the_library():
    case = CASES["softmax"]
    code, told = generated(case, case.tensors(513))
    assert code.extern_calls == ("extern_kernels.mm",)
    assert told["route_linear"].reason.code is ReasonCode.SCHEDULE
    assert told["moe_route"].reason is None and told["moe_dispatch"].reason is None


@pytest.mark.parametrize("name", ["padded", "grouped"])
def test_the_parts_stand_as_they_stood(name, monkeypatch):
    """Left to the library, the code is that of a graph whose router was not looked at."""
    case = CASES[name]
    monkeypatch.setattr(route_linear_lowerings, "MOST_TOKENS", -1)
    apart, _ = generated(case, case.tensors(5))
    monkeypatch.setitem(pipeline._PASSES, "route_linear_pass", lambda graph: graph)
    before, _ = generated(case, case.tensors(5))
    assert apart.extern_calls == before.extern_calls and len(apart.extern_calls) == 1

    def texts(code):
        return [kernel.function.replace("convert_element_type", "_to_copy") for kernel in code.kernels]

    assert texts(apart) == texts(before)


def test_no_bound_no_kernels():
    case = CASES["softmax"]
    code, told = generated(case, case.tensors(9), dynamic=True)
    assert code.extern_calls == ("extern_kernels.mm",)
    assert told["route_linear"].reason.code is ReasonCode.SCHEDULE


def test_no_tokens():
    case = CASES["softmax"]
    _, told = generated(case, case.tensors(0))
    assert "route_linear" not in told or told["route_linear"].reason.code is ReasonCode.SCHEDULE


# Whole layers

SHAPES = {  # E, H, width, routing, whether the product is in fp32 behind a cast; a shared expert of the same width then
    "qwen3": (128, 2048, 768, RoutingSpec(8), False),
    "llada2": (256, 2048, 512, GROUPED, True),
    "dsv3": (256, 7168, 2048, GROUPED, True),
    "mixtral": (8, 4096, 14336, RoutingSpec(2), False),
    "sixty": (60, 2048, 1408, RoutingSpec(4, renorm=0.0), False),
}


def layer(name):
    experts, _, _, spec, wide = SHAPES[name]

    def run(hidden_TH, weight_EH, bias_E, w13_EJH, w2_EHI, w1_SH, w3_SH, w2_HS):
        operands = (hidden_TH.float(), weight_EH.float()) if wide else (hidden_TH, weight_EH)
        bias = bias_E if spec.score == "sigmoid" else None
        weights_TK, ids_TK = ops.moe_route(linear(*operands), bias, None, *spec.op_args())
        order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, experts)
        act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, spec.top_k, "silu(g) * u")
        slots_NH = ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)
        out_TH = hidden_TH + ops.moe_combine(slots_NH, weights_TK)
        if wide:
            out_TH = out_TH + linear(silu(linear(hidden_TH, w1_SH)) * linear(hidden_TH, w3_SH), w2_HS)
        return out_TH * torch.rsqrt(out_TH.float().square().mean(-1, keepdim=True) + 1e-6).to(out_TH.dtype)

    return run


def layer_inputs(name, tokens):
    experts, hidden, width, *_ = SHAPES[name]
    sizes = [(tokens, hidden), (experts, hidden), (experts,), (experts, 2 * width, hidden), (experts, hidden, width)]
    sizes += [(width, hidden), (width, hidden), (hidden, width)]
    return [torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes]


@pytest.mark.parametrize("name", ["qwen3", "dsv3"])
@pytest.mark.parametrize(("tokens", "kernels", "products"), [(1, 5, 0), (8, 5, 0), (64, 6, 0), (4096, 7, 1)])
def test_kernels_of_a_layer(name, tokens, kernels, products):
    """Part, sum, up, down, combine; a dispatch but for few slots; for many tokens two, and a product."""
    code, _ = generated(layer(name), layer_inputs(name, tokens))
    shared = 3 if name == "dsv3" and tokens == 4096 else 0  # beside the experts, a pointwise kernel between
    experts = [name for name in code.extern_calls if "_expert_gemm_specialized" in name]
    assert len(experts) == (2 if tokens == 4096 else 0)
    assert len(code.extern_calls) == products + shared + len(experts)
    assert len(code.calls) + len(experts) + products == kernels + (1 if shared else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tokens", [1, 4, 8, 64, 200])
def test_what_the_compiler_makes_of_it(name, tokens):
    code, _ = generated(layer(name), layer_inputs(name, tokens))
    ours = tuple(kernel for kernel in code.kernels if "moe_route_linear" in kernel.name)
    facts = compile_kernels(dataclasses.replace(code, kernels=ours))
    assert len(facts) == 2 and all(kernel.spill_bytes == 0 for kernel in facts), facts


class Graphs:
    """Compiles a layer for a faked H100 and counts; nothing runs: the result is an empty tensor of the right shape."""

    def __init__(self, name):
        self.name, self.codes = name, []
        self.compiled = torch.compile(layer(name), backend=self.backend, fullgraph=True)

    def backend(self, graph, examples):
        from torch._inductor.compile_fx import compile_fx

        try:
            compile_fx(graph, examples)
        except offline._Captured as captured:
            self.codes.append(captured.wrapper_source)
        return lambda *args: (torch.empty(1, device="meta"),)

    def __call__(self, tokens, mode):
        fakes = offline.fake_cuda(layer_inputs(self.name, tokens), mode=mode)
        torch._dynamo.mark_dynamic(fakes[0], 0)
        self.compiled(*fakes)


def test_as_many_graphs_as_without():
    """The ranges of rows decide: the choice adds no guard."""
    register_lowerings()
    torch._dynamo.reset()
    experts, hidden, width, spec, _ = SHAPES["qwen3"]
    shapes = (GemmShape(experts, hidden, width, True), GemmShape(experts, width, hidden, False))
    bounds = [found.max_rows // spec.top_k for found in plan(shapes, DeviceSpec.of_properties(FAKE))[:-1]]
    assert bounds[0] <= route_linear_lowerings.MOST_TOKENS < bounds[-1]
    graphs = Graphs("qwen3")
    with fake_gpu(), offline._quiet_compiler(None), torch.no_grad():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        for tokens in (2, 9, bounds[0], bounds[0] + 1, bounds[1], bounds[1] + 1, 20_000):
            graphs(tokens, mode)
    torch._dynamo.reset()
    assert len(graphs.codes) == 3
    assert ["extern_kernels.mm" in code for code in graphs.codes] == [False, True, True]


# Expected texts


@pytest.fixture(scope="module")
def texts():
    return generated(CASES["softmax"], CASES["softmax"].tensors(21))[0]


@pytest.mark.parametrize("half", [0, 1])
def test_kernel_texts(half, expected, texts):
    kernels = [kernel for kernel in texts.kernels if "moe_route_linear" in kernel.name]
    expected(f"route_linear_{('part', 'sum')[half]}", kernels[half].function)
