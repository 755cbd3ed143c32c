"""On a real GPU: products of indices and strides beyond 2^31, forward and backward, through the ops and compiled.

Most of each large tensor is zeros; what is looked at lies behind the first 2^31 elements.
"""

import pytest
import torch

import diffulex  # noqa: F401  the passes
from lowering.inductor.passes import register_lowerings
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.gpu

ops = torch.ops.diffulex
BOUND = 2**31
DTYPE = torch.bfloat16


def up(hidden_TH, w13_EJH, order_N, offsets_E1):
    return ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, 1)


def down(act_NI, w2_EHI, order_N, offsets_E1):
    return ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1)


def called(function, how):
    register_lowerings()
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False) if how == "compiled" else function


def near(found, left, right):
    """found = left @ right.T of the same rows, as a product of the library errs."""
    assert_oracle_ratio(found.cpu(), (left @ right.T).cpu(), (left.double() @ right.double().T).cpu())


def slots(counts):
    """Order and offsets of so many slots of each expert, already in order."""
    bounds = torch.tensor([0, *counts]).cumsum(0).int().cuda()
    return torch.arange(sum(counts), dtype=torch.int32, device="cuda"), bounds


@pytest.fixture(autouse=True)
def _empty():
    yield
    torch._dynamo.reset()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_rows_of_outputs_and_inputs(how, record_property):
    """N * J > 2^31: the outputs of up and what its gradients read; the inputs of down and what they write."""
    width, depth, experts = 4096, 64, 4
    rows = BOUND // width + 1000
    counts = [100, rows - 200 - 100, 100, 100]
    order_N, offsets_E1 = slots(counts)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(experts, width, depth, generator=generator) / 8).to(DTYPE).cuda().requires_grad_()
    hidden = torch.randn(rows, depth, generator=generator).to(DTYPE).cuda().requires_grad_()
    out_NJ = called(up, how)(hidden, weight, order_N, offsets_E1)
    assert out_NJ.numel() > BOUND
    last, middle = slice(rows - 100, rows), slice(rows - 300, rows - 200)  # of the last expert, and of the second
    near(out_NJ[last], hidden.detach()[last], weight.detach()[3])
    near(out_NJ[middle], hidden.detach()[middle], weight.detach()[1])
    grad_NJ = torch.zeros_like(out_NJ)
    grad_NJ[last] = torch.randn(100, width, generator=generator).to(DTYPE).cuda()
    grad_hidden, grad_weight = torch.autograd.grad(out_NJ, (hidden, weight), grad_NJ)
    near(grad_hidden[last], grad_NJ[last], weight.detach()[3].T)
    near(grad_weight[3], grad_NJ[last].T, hidden.detach()[last].T)
    assert not grad_hidden[: rows - 100].any() and not grad_weight[:3].any()
    with torch.no_grad():
        back = called(down, how)(grad_NJ, weight.detach().transpose(1, 2), order_N, offsets_E1)
    near(back[last], grad_NJ[last], weight.detach()[3].T)
    record_property("elements", out_NJ.numel())


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_weights_of_the_last_experts(how, record_property):
    """E * J * H > 2^31: what both GEMMs read, and what the gradient of the weights writes."""
    width, depth = 4096, 4096
    experts = BOUND // (width * depth) + 4
    counts = [50] + [0] * (experts - 2) + [70]
    order_N, offsets_E1 = slots(counts)
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(experts, width, depth, dtype=DTYPE, device="cuda")
    weight[-1] = (torch.randn(width, depth, generator=generator) / 64).to(DTYPE).cuda()
    assert weight[:-1].numel() > BOUND
    hidden = torch.randn(120, depth, generator=generator).to(DTYPE).cuda().requires_grad_()
    weight.requires_grad_()
    out_NJ = called(up, how)(hidden, weight, order_N, offsets_E1)
    near(out_NJ[50:], hidden.detach()[50:], weight.detach()[-1])
    assert not out_NJ[:50].any()
    grad_NJ = torch.randn(120, width, generator=generator).to(DTYPE).cuda()
    grad_hidden, grad_weight = torch.autograd.grad(out_NJ, (hidden, weight), grad_NJ)
    near(grad_hidden[50:], grad_NJ[50:], weight.detach()[-1].T)
    near(grad_weight[-1], grad_NJ[50:].T, hidden.detach()[50:].T)
    near(grad_weight[0], grad_NJ[:50].T, hidden.detach()[:50].T)
    assert not grad_weight[1:-1].any()
    record_property("elements", weight.numel())
