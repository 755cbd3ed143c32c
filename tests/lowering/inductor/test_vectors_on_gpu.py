"""The experts of one token as products with vectors on a GPU: the ratio rule, and the same bits each time."""

import pytest
import torch
from torch.nn.functional import silu

import diffulex  # noqa: F401  its graph passes
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.gpu

ops = torch.ops.diffulex
# K, E, H, I and the width of a shared expert
FORMS = {
    "qwen3": (8, 128, 2048, 768, 0),
    "dsv3": (8, 16, 7168, 2048, 0),
    "uneven": (3, 9, 1000, 328, 0),
    "small": (1, 2, 64, 8, 0),
    "llada2-shared": (8, 64, 2048, 512, 512),
    "qwen2-shared": (4, 16, 2048, 1408, 5632),
    "uneven-shared": (3, 9, 1000, 328, 129),
}


def experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, *shared):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, w13_EJH.shape[0])
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, None, order_N, offsets_E1, ids_TK.shape[1], "swiglu")
    out_TH = ops.moe_combine(ops.moe_expert_down(act_NI, w2_EHI, None, order_N, offsets_E1), weights_TK)
    if not shared:
        return out_TH
    w1_SH, w3_SH, w2_HS = shared
    return out_TH + (silu(hidden_TH @ w1_SH.t()) * (hidden_TH @ w3_SH.t())) @ w2_HS.t()


def inputs_of(form, dtype, seed):
    """Ids of which one in ten is of no expert."""
    top_k, num_experts, hidden, width, shared = form
    generator = torch.Generator("cuda").manual_seed(seed)
    sizes = [(1, hidden), (1, top_k), (num_experts, 2 * width, hidden), (num_experts, hidden, width)]
    sizes += [(shared, hidden), (shared, hidden), (hidden, shared)] if shared else []
    hidden_TH, weights_TK, *weights = (torch.randn(size, generator=generator, device="cuda") for size in sizes)
    ids_TK = torch.randint(num_experts, (1, top_k), generator=generator, device="cuda", dtype=torch.int32)
    ids_TK[torch.rand(1, top_k, generator=generator, device="cuda") < 0.1] = -1
    weights = [weight.div_(weight.shape[-1] ** 0.5).to(dtype) for weight in weights]
    return [hidden_TH.to(dtype), ids_TK, weights_TK, *weights]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_values_and_bits(form, dtype, mode):
    register_lowerings()
    torch._dynamo.reset()
    sets = [inputs_of(form, dtype, seed) for seed in range(3)]
    weights = sets[0][3:]  # the same ones for all, as a model has them
    run = torch.compile(experts, fullgraph=True, mode=mode)
    with torch.no_grad(), collect() as decisions:
        found = [[run(*given[:3], *weights).clone() for given in sets] for _ in range(30)]
    told = [d.outcome for d in decisions if d.stage == "lower" and d.subject.startswith("moe_expert")]
    assert len(told) == 2 and all("moe_expert_vector" in outcome for outcome in told), told
    for outs in found[1:]:
        assert all(map(torch.equal, found[0], outs))
    for given, out_TH in zip(sets, found[0], strict=True):
        cpu = [tensor.cpu() for tensor in (*given[:3], *weights)]
        doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in cpu]
        assert_oracle_ratio(out_TH.cpu(), experts(*cpu), experts(*doubles))
