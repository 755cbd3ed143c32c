"""Kernels that begin early on a real device: the same bits as without, in CUDA graphs whose kernels follow closely."""

import functools
import re

import pytest
import torch
from torch import nn

import diffulex
from lowering.inductor.passes import register_lowerings
from lowering.report import collect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no early launches here"
    ),
]

ops = torch.ops.diffulex
E, K, H, WIDTH = 32, 8, 1024, 512
SIZES = [1, 8, 64, 512, 4096]
SETS, REPLAYS = 5, 50
ASKED = {"triton.enable_pdl": True}


def layers(hidden_TH, gate_EH, w13_EJH, w2_EHI):
    """Three layers, so that every kernel has a kernel before it; no sums that the compiler may order at will."""
    outs = []
    for _ in range(3):
        weights_TK, ids_TK = ops.moe_route(hidden_TH @ gate_EH.T, None, None, K)
        order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, E)
        act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, K, "swiglu")
        slots_NH = ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)
        hidden_TH = torch.tanh(hidden_TH + ops.moe_combine(slots_NH, weights_TK))
        outs.append((hidden_TH, ids_TK.long()))  # a kernel of Inductor's own that reads what a template mutates
    return outs


def inputs_of(tokens):
    """Several times hidden [T, H], with the same weights; bf16."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    sizes = [(E, H), (E, 2 * WIDTH, H), (E, H, WIDTH), *[(tokens, H)] * SETS]
    tensors = [torch.randn(size, generator=generator, device="cuda").bfloat16() for size in sizes]
    gate_EH, w13_EJH, w2_EHI = (tensor / tensor.shape[-1] ** 0.5 for tensor in tensors[:3])
    return [(hidden_TH, gate_EH, w13_EJH, w2_EHI) for hidden_TH in tensors[3:]]


def flat(outs):
    return [tensor for pair in outs for tensor in pair]


def compiled(function, inputs, wanted, **how):
    """`function` compiled with all caches off, and run once; every op of ours says whether it begins early."""
    register_lowerings()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True), collect() as decisions:
        result = torch.compile(function, fullgraph=True, dynamic=False, **how)
        result(*inputs[0])
    lowered = [decision for decision in decisions if decision.stage == "lower"]
    assert lowered
    own = [decision for decision in lowered if not decision.outcome.startswith("in the kernel of ")]
    for decision in own:  # tiles for many rows do not
        many = re.search(r"\b(128|192)x\d+x\d+ .*\btma\b", decision.outcome)
        assert (", begins early" in decision.outcome) == (wanted and not many), decision
    return result


@functools.cache
@torch.no_grad()
def reference(tokens):
    """Inputs, and outputs for each set of them by kernels that do not begin early."""
    inputs = inputs_of(tokens)
    run = compiled(layers, inputs, wanted=False)
    return inputs, [[tensor.clone() for tensor in flat(run(*one))] for one in inputs]


@pytest.mark.parametrize("tokens", SIZES)
@torch.no_grad()
def test_cuda_graphs_of_a_compiled_model(tokens):
    from torch._dynamo.utils import counters

    inputs, wanted = reference(tokens)
    counters.clear()
    run = compiled(layers, inputs, wanted=True, mode="reduce-overhead")
    for _ in range(3):  # warm up, record
        run(*inputs[0])
    for replay in range(REPLAYS):
        outs = [tensor.clone() for tensor in flat(run(*inputs[replay % SETS]))]
        assert all(map(torch.equal, outs, wanted[replay % SETS])), replay
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("tokens", SIZES)
@torch.no_grad()
def test_calls_back_to_back_in_one_graph(tokens):
    """Nothing between the calls, and the memory of one is used again by the next."""
    inputs, wanted = reference(tokens)
    run = compiled(layers, inputs, wanted=True, options=ASKED)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [flat(run(*one)) for one in inputs]
    for replay in range(REPLAYS):
        graph.replay()
        for one, right in zip(outs, wanted, strict=True):
            assert all(map(torch.equal, one, right)), replay


@torch.no_grad()
def test_without_graphs():
    """Launched one by one, among kernels that know nothing of it."""
    inputs, wanted = reference(64)
    run = compiled(layers, inputs, wanted=True, options=ASKED)
    for replay in range(REPLAYS):
        hidden_TH, *weights = inputs[replay % SETS]
        outs = flat(run(hidden_TH + 0, *weights))
        assert all(map(torch.equal, outs, wanted[replay % SETS])), replay


def test_gradients():
    inputs = inputs_of(512)[0]

    def gradients(run):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        sum(hidden_TH.float().sum() for hidden_TH, _ in run(*leaves)).backward()
        return [leaf.grad for leaf in leaves]

    register_lowerings()
    found = []
    for options in ({}, ASKED):
        torch._dynamo.reset()
        # sums over rows are Inductor's own, in an order that it would choose by timing
        with torch._inductor.config.patch(force_disable_caches=True, deterministic=True):
            run = torch.compile(layers, fullgraph=True, dynamic=False, options=options)
            found.append([gradients(run) for _ in range(5)])
    plain, early = found
    for once in early:
        for one, right in zip(once, plain[0], strict=True):
            assert torch.equal(one, right)


@torch.no_grad()
def test_explain_says_so():
    class Layer(nn.Module):
        def forward(self, *inputs):
            return layers(*inputs)

    for cudagraphs in (False, True):
        with torch._inductor.config.patch({"triton.cudagraphs": cudagraphs}):
            report = diffulex.explain(Layer().eval(), *inputs_of(8)[0])
        assert ("begins early" in str(report)) == cudagraphs
