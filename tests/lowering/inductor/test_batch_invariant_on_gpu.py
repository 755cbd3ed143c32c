"""On a real GPU: what a block computes for a token is bitwise the same for every number of tokens."""

import contextlib

import pytest
import torch

import diffulex  # noqa: F401  the passes that find a router's product and a shared expert
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from lowering.state import batch_invariant
from tests.support.invariance import SHAPES, Layer

pytestmark = pytest.mark.gpu

TOKENS = (1, 4, 16, 64, 257, 1024)


def joined(outputs):
    """[T, H + K] fp32: what a layer computes, side by side."""
    out_TH, weights_TK = outputs
    return torch.cat((out_TH.float(), weights_TK), 1)


def outputs(name, *, on, dynamic, mode=None):
    """What the first rows of one batch come to, by how many of them there are."""
    register_lowerings()
    torch._dynamo.reset()
    layer = Layer(name)
    hidden_TH, *weights = layer.inputs(max(TOKENS), device="cuda")
    run = torch.compile(layer, fullgraph=True, dynamic=None if dynamic else False, mode=mode)
    found = {}
    with (
        batch_invariant() if on else contextlib.nullcontext(),
        torch._inductor.config.patch(force_disable_caches=True),
        torch._dynamo.config.patch(recompile_limit=64),
        torch.no_grad(),
        collect() as decisions,
    ):
        for tokens in reversed(TOKENS):
            rows_TH = hidden_TH[:tokens].clone()
            if dynamic:  # their number alone, and one token is always code of its own
                torch._dynamo.maybe_mark_dynamic(rows_TH, 0)
            for _ in range(3 if mode else 1):  # the third is a replay of a CUDA graph
                found[tokens] = joined(run(rows_TH, *weights))
    assert not [decision for decision in decisions if decision.subject == "batch_invariance"]
    return found


def differing(found):
    """Numbers of tokens whose rows are not those of the largest batch."""
    return [tokens for tokens in TOKENS if not torch.equal(found[tokens], found[max(TOKENS)][:tokens])]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_first_rows_are_those_of_the_largest_batch(name, dynamic):
    assert differing(outputs(name, on=True, dynamic=dynamic)) == []


@pytest.mark.parametrize("name", SHAPES)
def test_in_cuda_graphs(name):
    """Where kernels begin early, on devices that can."""
    assert differing(outputs(name, on=True, dynamic=False, mode="reduce-overhead")) == []


@pytest.mark.parametrize("name", SHAPES)
def test_static_and_dynamic_code_agree(name):
    static, dynamic = (outputs(name, on=True, dynamic=dynamic) for dynamic in (False, True))
    for tokens in TOKENS:
        assert torch.equal(static[tokens], dynamic[tokens]), tokens


@pytest.mark.parametrize("name", SHAPES)
def test_rows_may_change_places(name):
    layer = Layer(name)
    hidden_TH, *weights = layer.inputs(257, device="cuda")
    order_T = torch.randperm(257, generator=torch.Generator().manual_seed(0)).cuda()
    torch._dynamo.reset()
    with batch_invariant(), torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        run = torch.compile(layer, fullgraph=True)
        assert torch.equal(joined(run(hidden_TH[order_T], *weights)), joined(run(hidden_TH, *weights))[order_T])


@pytest.mark.parametrize("name", SHAPES)
def test_given_the_routing_the_ops_hold_it_without_a_compiler(name):
    """Not the whole block: the router's product is the library's there."""
    layer = Layer(name)
    hidden_TH, gate_EH, bias_E, w13_EJH, w2_EHI, *_ = layer.inputs(max(TOKENS), device="cuda")
    logits_TE = hidden_TH @ gate_EH.T
    ops, top_k = torch.ops.diffulex, layer.spec.top_k
    bias_E = bias_E if layer.spec.score == "sigmoid" else None
    found = {}
    with batch_invariant():
        for tokens in TOKENS:
            weights_TK, ids_TK = ops.moe_route(logits_TE[:tokens], bias_E, None, *layer.spec.op_args())
            order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, gate_EH.shape[0])
            act_NI = ops.moe_expert_up(hidden_TH[:tokens], w13_EJH, None, order_N, offsets_E1, top_k, "silu(g) * u")
            slots_NH = ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)
            found[tokens] = joined((ops.moe_combine(slots_NH, weights_TK), weights_TK))
    assert differing(found) == []


def test_without_it_bits_differ():
    """The control: what is asserted above is not so by itself."""
    assert any(differing(outputs(name, on=False, dynamic=False)) for name in SHAPES)
