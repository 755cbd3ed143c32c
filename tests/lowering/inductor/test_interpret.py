"""The backend that rewrites graphs and runs them without generated code."""

import pytest
import torch

from lowering import ops
from lowering.errors import ReasonCode
from lowering.inductor.interpret import backend_with, rewrite
from lowering.report import collect
from lowering.state import disabled


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def experts(hidden_TH, ids_TK, w13_EJH, w2_EHI):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, w13_EJH.shape[0])
    pre_NJ = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, ids_TK.shape[1])
    gate_NI, up_NI = pre_NJ.chunk(2, dim=-1)
    return ops.moe_expert_down(torch.nn.functional.silu(gate_NI) * up_NI, w2_EHI, None, order_N, offsets_E1)


def arguments(tokens=5):
    generator = torch.Generator().manual_seed(0)
    hidden, w13, w2 = (torch.randn(size, generator=generator) for size in ((tokens, 8), (4, 12, 8), (4, 8, 6)))
    return hidden, torch.arange(2 * tokens).view(tokens, 2) % 4, w13, w2


def test_the_graph_is_rewritten_and_computes_the_same():
    with torch.no_grad(), collect() as decisions:
        out = torch.compile(experts, backend=backend_with(rewrite))(*arguments())
    torch.testing.assert_close(out, experts(*arguments()))
    lowered = [decision for decision in decisions if decision.stage == "lower"]
    assert {decision.subject for decision in lowered} == {"moe_dispatch", "moe_expert_up", "moe_expert_down"}
    assert {decision.reason.code for decision in lowered} == {ReasonCode.NO_CODE}
    (activation,) = [decision for decision in decisions if decision.subject == "activation_pass"]
    assert activation.outcome.startswith("folded")


def test_switched_off_the_graph_stays_as_it_is():
    with torch.no_grad(), disabled(), collect() as decisions:
        out = torch.compile(experts, backend=backend_with(rewrite))(*arguments())
    torch.testing.assert_close(out, experts(*arguments()))
    assert not decisions


def test_training_runs_the_pass_on_the_joint_graph():
    sizes = []
    inputs = [value.requires_grad_() if value.is_floating_point() else value for value in arguments()]
    compiled = torch.compile(experts, backend=backend_with(lambda graph: sizes.append(len(graph.nodes))))
    grads = [torch.autograd.grad(call(*inputs).sum(), inputs[0])[0] for call in (compiled, experts)]
    torch.testing.assert_close(*grads)
    assert len(sizes) == 1
