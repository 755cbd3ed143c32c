"""The router's lowering: one kernel whatever the options, that computes what the op does and compiles for an H100."""

import pytest
import torch

from lowering.inductor.offline import compile_kernels, offline_source
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from lowering.spec import RoutingSpec
from tests.support.interpreter import interpreter
from tests.support.routing_cases import RoutingCase, assert_alike, given_ids, values

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

E = 16
SPECS = {
    "dbrx": RoutingSpec(4, renorm=2.0, score_dtype="logits"),
    "laguna": RoutingSpec(3, "sigmoid", softcap=30.0, scale=2.5),
    "inkling": RoutingSpec(3, "sigmoid", n_shared=2, scale=1.5),
    "ernie": RoutingSpec(3, eps=1e-12, eps_mode="clamp_min"),
    "mistral4": RoutingSpec(3, n_group=4, topk_group=2, group_fill="0", score_dtype="bfloat16"),
    "kolibri": RoutingSpec(3, "sigmoid", select_on="logits"),
    "llada_moe": RoutingSpec(3, renorm=0.0, bias_in_weights=True),
    "everything": RoutingSpec(
        *(3, "sqrtsoftplus", 4, 2, "top2_sum", "0", 3.0, 1e-6, 2.5),
        *(30.0, "float16", "scores", True, "clamp_min", 3),
    ),
    "every_softmax": RoutingSpec(3, renorm=0.5, softcap=5.0, n_shared=1, bias_in_weights=True, select_on="logits"),
}


def code_of(case):
    """The generated code, its function and inputs, and what was decided."""
    register_lowerings()
    torch._dynamo.reset()
    options = case.spec.op_args()

    def route(logits, bias, ids, scale):
        return torch.ops.diffulex.moe_route(logits, bias, ids, *options, scale)

    inputs = (case.logits, case.bias, case.ids, case.scale)
    with collect() as decisions:
        code = offline_source(route, inputs)
    return code, route, inputs, [d for d in decisions if d.stage == "lower"]


@pytest.mark.parametrize("chosen", ["selected", "given"])
@pytest.mark.parametrize("name", SPECS)
def test_one_kernel_that_computes_the_op(name, chosen):
    spec = SPECS[name]
    logits, bias = values("normal", (7, E + spec.n_shared), 1, torch.float16), values("grid", (E,), 2) / 4
    ids = given_ids(7, 3, E) if chosen == "given" and spec.top_k == 3 else None
    case = RoutingCase(spec, logits, bias, ids, values("normal", (E,), 3))
    code, route, inputs, (decision,) = code_of(case)
    assert (len(code.calls), code.extern_calls) == (1, ())
    assert decision.outcome.startswith("triton moe_route") and decision.reason is None
    assert_alike(interpreter().graph(code, route, inputs), case)


@pytest.mark.parametrize("name", ["plain", *SPECS])
def test_compiles_without_spills(name):
    """Up to 1,024 experts, one warp a program."""
    spec = SPECS.get(name, RoutingSpec(8))
    columns = 1024 + spec.n_shared
    bias, scale = (torch.zeros(1024), torch.ones(1024)) if name != "plain" else (None, None)
    code, *_ = code_of(RoutingCase(spec, torch.zeros(64, columns, dtype=torch.bfloat16), bias, None, scale))
    (facts,) = compile_kernels(code)
    assert facts.spill_bytes == 0, facts
