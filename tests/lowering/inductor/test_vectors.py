"""The experts of one token as products with vectors: values, who gets them, and what is read ahead."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn.functional import relu, silu

import diffulex  # noqa: F401  its graph passes
from lowering.inductor.offline import compile_kernels, offline_source
from lowering.inductor.passes import register_lowerings
from lowering.report import collect
from lowering.templates.vectors import PROGRAMS, VectorSum
from tests.support.interpreter import interpreter
from tests.support.oracle import assert_oracle_ratio

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: nothing to fake")

ops = torch.ops.diffulex
VECTORS = ["triton moe_expert_vector_up", "triton moe_expert_vector_sum", ("in the kernel of", "Inductor IR, its sum")]
SUMMED_APART = [VECTORS[0], "triton moe_expert_down", "Inductor IR"]
NONE = ["triton moe_expert_up", "triton moe_expert_down", "Inductor IR"]


def stages(hidden_TH, ids_TK, w13_EJH, w2_EHI, *, act="swiglu", biases=(None, None), interleaved=False):
    order_N, _, offsets_E1 = ops.moe_dispatch(ids_TK, w13_EJH.shape[0])
    index = (order_N, offsets_E1)
    act_NI = ops.moe_expert_up(hidden_TH, w13_EJH, biases[0], *index, ids_TK.shape[1], act, interleaved)
    return ops.moe_expert_down(act_NI, w2_EHI, biases[1], *index)


def experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, **options):
    return ops.moe_combine(stages(hidden_TH, ids_TK, w13_EJH, w2_EHI, **options), weights_TK)


def interleaved(*inputs):
    return experts(*inputs, interleaved=True)


def ungated(*inputs):
    return experts(*inputs, act="relu2")


def clipped(*inputs):
    return experts(*inputs, act="swiglu_oai")


def with_shared(*inputs, act="swiglu"):
    """A pass takes the shared expert into the stages."""
    hidden_TH, w1_SH, w3_SH, w2_HS = inputs[0], *inputs[5:]
    if act == "swiglu":
        act_TS = silu(hidden_TH @ w1_SH.t()) * (hidden_TH @ w3_SH.t())
    else:
        act_TS = relu(hidden_TH @ w1_SH.t()).square()
    return experts(*inputs[:5], act=act) + act_TS @ w2_HS.t()


def ungated_with_shared(*inputs):
    return with_shared(*inputs, act="relu2")


def inputs_of(form, *, seed=0, act_halves=2, dtype=torch.float32, index=torch.int32, shared=0):
    """(K, E, H, I), S; any ids, those of no expert and several times the same among them."""
    top_k, num_experts, hidden, width = form
    generator = torch.Generator().manual_seed(seed)
    sizes = [(1, hidden), (1, top_k), (num_experts, act_halves * width, hidden), (num_experts, hidden, width)]
    sizes += [(shared, hidden), (shared, hidden), (hidden, shared)] if shared else []
    hidden_TH, weights_TK, *weights = (torch.randn(size, generator=generator) / 4 for size in sizes)
    ids_TK = torch.randint(-1, num_experts + 2, (1, top_k), generator=generator, dtype=index)
    return [hidden_TH.to(dtype), ids_TK, weights_TK, *(weight.to(dtype) for weight in weights)]


def generated(function, inputs, *, graphs=False):
    register_lowerings()
    torch._dynamo.reset()
    with collect() as decisions, torch._inductor.config.patch({"triton.cudagraphs": graphs}):
        code = offline_source(function, inputs)
    stages = ("moe_expert_up", "moe_expert_down", "moe_combine")
    return code, [d.outcome for d in decisions if d.stage == "lower" and d.subject in stages]


def assert_told(told, wanted):
    assert all(outcome.startswith(words) for outcome, words in zip(told, wanted, strict=True)), told


def check(code, function, inputs):
    (out,) = interpreter().graph(code, function, inputs)
    wanted = function(*inputs)
    assert out.dtype == wanted.dtype and out.shape == wanted.shape
    doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    assert_oracle_ratio(out, wanted, function(*doubles))


@pytest.fixture(scope="module")
def codes():
    return {}


@settings(max_examples=24, phases=(Phase.explicit, Phase.generate))
@given(
    function=st.sampled_from([experts, interleaved, ungated, clipped]),
    form=st.sampled_from([(1, 1, 8, 1), (3, 7, 40, 24), (8, 9, 64, 129), (2, 4, 1100, 600), (5, 6, 33, 2)]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 9999),
)
def test_values(codes, function, form, dtype, index, seed):
    """Rows that do and do not fill their pieces, few and many of these; for few results rounding is chance."""
    dtype = dtype if form[2] >= 64 else torch.float32
    inputs = inputs_of(form, seed=seed, act_halves=1 if function is ungated else 2, dtype=dtype, index=index)
    key = (function, form, dtype, index)
    if key not in codes:
        codes[key] = generated(function, inputs)
    code, told = codes[key]
    assert_told(told, VECTORS)
    check(code, function, inputs)


@settings(max_examples=16, phases=(Phase.explicit, Phase.generate))
@given(
    function=st.sampled_from([with_shared, ungated_with_shared]),
    form=st.sampled_from([(1, 1, 8, 8, 24), (3, 7, 40, 24, 129), (2, 4, 72, 40, 600), (2, 3, 600, 6, 10)]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 9999),
)
def test_values_with_a_shared_expert(codes, function, form, dtype, seed):
    """Narrow and wide ones, that are read ahead and not."""
    dtype = dtype if form[2] >= 64 else torch.float32
    halves = 1 if function is ungated_with_shared else 2
    inputs = inputs_of(form[:4], seed=seed, act_halves=halves, dtype=dtype, shared=form[4])
    key = (function, form, dtype)
    if key not in codes:
        codes[key] = generated(function, inputs)
    code, told = codes[key]
    assert_told(told, VECTORS)
    assert sum("moe_expert" in kernel.name for kernel in code.kernels) == 2 and not code.extern_calls
    check(code, function, inputs)


@pytest.mark.parametrize("shared", [0, 12])
def test_ids_of_no_expert_add_nothing(shared):
    inputs = inputs_of((3, 5, 32, 16), shared=shared)
    inputs[1] = torch.zeros(1, 3, dtype=torch.int64)
    function = with_shared if shared else experts
    code, told = generated(function, inputs)
    assert_told(told, VECTORS)
    for value in (-1, 5, torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min, 2**32):
        inputs[1] = torch.tensor([[value, 1, value]])
        check(code, function, inputs)
        inputs[1] = torch.full((1, 3), value)
        inputs[3][0], inputs[4][0] = torch.nan, torch.nan  # what an expert that is not asked for holds
        check(code, function, inputs)
        inputs[3][0], inputs[4][0] = 0.0, 0.0


def with_bias(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    return experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI, biases=(w13_EJH[..., 0], w2_EHI[..., 0]))


def transposed(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    w13_EJH, w2_EHI = (weight.transpose(1, 2).contiguous().transpose(1, 2) for weight in (w13_EJH, w2_EHI))
    return experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI)


def shows_slots(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    slots_NH = stages(hidden_TH, ids_TK, w13_EJH, w2_EHI)
    return ops.moe_combine(slots_NH, weights_TK) + slots_NH.sum(0, keepdim=True)


def float64_weights(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    return ops.moe_combine(stages(hidden_TH, ids_TK, w13_EJH, w2_EHI), weights_TK.double())


def a_row_a_slot(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    return ops.moe_combine(stages(hidden_TH, ids_TK, w13_EJH, w2_EHI), weights_TK.T)


def two_rows(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    return ops.moe_combine(stages(hidden_TH, ids_TK, w13_EJH, w2_EHI), weights_TK.view(2, -1))


def by_ids(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    slots_NH = stages(hidden_TH, ids_TK, w13_EJH, w2_EHI)
    return ops.moe_combine(slots_NH, weights_TK, ids_TK, w13_EJH.shape[0])


OTHERS = {
    with_bias: NONE,
    transposed: NONE,
    shows_slots: SUMMED_APART,
    by_ids: SUMMED_APART,
    float64_weights: [*SUMMED_APART[:2], "the op's own kernel"],
    a_row_a_slot: SUMMED_APART,
    two_rows: SUMMED_APART,
}


@pytest.mark.parametrize("function", OTHERS)
def test_who_does_not_get_them(function):
    inputs = inputs_of((4, 7, 40, 24))
    code, told = generated(function, inputs)
    assert_told(told, OTHERS[function])
    check(code, function, inputs)


def cast(weights_TK):
    return weights_TK.half()


def scaled(weights_TK):
    return weights_TK * 2.5


def normed(weights_TK):
    return weights_TK.softmax(1)


def expanded(weights_TK):
    return weights_TK[:, :1].expand(1, weights_TK.shape[1])


@pytest.mark.parametrize("change", [cast, scaled, normed, expanded])
def test_weights_that_are_computed_come_first(change):
    """Inductor puts what computes them behind the down stage, next to who reads them."""

    def function(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
        return ops.moe_combine(stages(hidden_TH, ids_TK, w13_EJH, w2_EHI), change(weights_TK)) + hidden_TH

    inputs = inputs_of((3, 7, 40, 24))
    code, told = generated(function, inputs)
    assert_told(told, VECTORS)
    check(code, function, inputs)


def test_what_weights_are_computed_of_is_there_for_others():
    def function(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
        slots_NH = stages(hidden_TH, ids_TK, w13_EJH, w2_EHI)
        wave_TH = hidden_TH.sin()
        return ops.moe_combine(slots_NH, weights_TK * hidden_TH.mean()) + wave_TH

    inputs = inputs_of((3, 7, 40, 24))
    with torch._inductor.config.patch(reorder_for_locality=False):
        code, told = generated(function, inputs)
    assert_told(told, VECTORS)
    check(code, function, inputs)


def routed(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    """Two layers as a model has them: a router ahead, a residual and a norm behind."""
    for _ in range(2):
        weights_TK, ids_TK = ops.moe_route(hidden_TH @ w13_EJH[:, 0].T, None, None, 3)
        weights_TK = weights_TK.to(hidden_TH.dtype)
        hidden_TH = hidden_TH + ops.moe_combine(stages(hidden_TH, ids_TK, w13_EJH, w2_EHI), weights_TK)
        hidden_TH = hidden_TH * torch.rsqrt(hidden_TH.square().mean(-1, keepdim=True) + 1e-6)
    return hidden_TH


def test_layers_of_a_model():
    inputs = inputs_of((3, 7, 40, 24))
    code, told = generated(routed, inputs)
    assert sum(outcome.startswith("triton moe_expert_vector") for outcome in told) == 4, told
    check(code, routed, inputs)


def test_strides():
    """Hidden states and weights of the sum whose elements lie apart, and experts that are a part of wider rows."""

    def function(hidden_HT, ids_TK, weights_KT, w13_EJH, w2_EHI):
        return experts(hidden_HT.T[:1], ids_TK, weights_KT.T[1:], w13_EJH[:, :, 3:], w2_EHI[:, 5:, 1:])

    hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI = inputs_of((3, 7, 40, 24))
    wide = [torch.nn.functional.pad(w, pad) for w, pad in ((w13_EJH, (3, 0)), (w2_EHI, (1, 0, 5, 0)))]
    inputs = [hidden_TH.T.repeat(1, 2).contiguous(), ids_TK, weights_TK.T.repeat(1, 2).contiguous(), *wide]
    code, told = generated(function, inputs)
    assert_told(told, VECTORS)
    check(code, function, inputs)


def written(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    w2_EHI.mul_(2)
    return experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI)


def written_later(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    out_TH = experts(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI)
    w2_EHI.mul_(2)
    return out_TH


def writes_shared(*inputs):
    inputs[-1].mul_(2)
    return with_shared(*inputs)


def computed(hidden_TH, ids_TK, weights_TK, w13_EJH, w2_EHI):
    return experts(hidden_TH, ids_TK, weights_TK, w13_EJH, (w2_EHI + 1).contiguous())


@pytest.mark.parametrize(
    ("function", "ahead"), [(experts, True), (written, False), (written_later, False), (computed, False)]
)
def test_weights_that_nobody_writes_are_read_ahead(function, ahead):
    code, told = generated(function, inputs_of((3, 7, 40, 24)), graphs=True)
    assert_told(told, VECTORS)
    (kernel,) = (k.source for k in code.kernels if "_row_of_expert" in k.source)
    body = kernel[kernel.index("w_row = ") :]
    wait = body.index("gdc_wait")
    assert kernel.count("    tl.extra.cuda.gdc_wait()\n    tl.extra.cuda.gdc_launch_dependents()\n") == 1
    assert kernel.count("gdc_wait") == kernel.count("gdc_launch_dependents") == 1
    for reads in ("IDS + ", "_weights("):
        assert (body.index(reads) < wait) == ahead
    for reads in ("(A + ", "(WEIGHTS + "):
        assert wait < body.index(reads)


@pytest.mark.parametrize(("function", "shared_ahead"), [(with_shared, True), (writes_shared, False)])
def test_a_shared_experts_weights_are_read_ahead(function, shared_ahead):
    code, told = generated(function, inputs_of((3, 7, 40, 24), shared=16), graphs=True)
    assert_told(told, VECTORS)
    (kernel,) = (k.source for k in code.kernels if "_row_of_expert" in k.source)
    body = kernel[kernel.index("w_row = ") :]
    wait = body.index("gdc_wait")
    for reads in ("shared_w = tl.load(", "_weights("):
        assert (body.index(reads) < wait) == shared_ahead
    assert wait < body.index("tl.load(SHARED_A")


@pytest.mark.parametrize("narrow", [8, 24, 64])
def test_a_shared_expert_of_another_width(narrow):
    """Behind a projection of the experts' rows alone: as deep and as wide as what is projected, 40."""

    def function(hidden_TH, project_DH, *inputs):
        w1_SH, w3_SH, w2_HS = inputs[4:]
        act_TS = silu(hidden_TH @ w1_SH.t()) * (hidden_TH @ w3_SH.t())
        return torch.cat([experts(hidden_TH @ project_DH.t(), *inputs[:4]), act_TS @ w2_HS.t()], 1)

    wide, routed = inputs_of((3, 7, 40, 24), shared=16), inputs_of((3, 7, narrow, 20))
    project_DH = torch.randn(narrow, 40, generator=torch.Generator().manual_seed(0)) / 6
    inputs = [wide[0], project_DH, *routed[1:], *wide[5:]]
    code, told = generated(function, inputs)
    assert_told(told, NONE)
    assert "SHARED_A" in code.kernel("expert_up").source
    check(code, function, inputs)


FORMS = {  # and the pieces of weights that are read ahead
    "qwen3": (8, 128, 2048, 768, 16),
    "mixtral": (2, 8, 4096, 14336, 16),
    "dsv3": (8, 64, 7168, 2048, 8),
    "qwen2": (4, 60, 2048, 1408, 8),
}
SHARED = {"qwen3": 512, "mixtral": 4096, "dsv3": 2048, "qwen2": 5632}  # some of these models have none


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_the_kernels_compile(name, shared):
    top_k, num_experts, hidden, width, held = FORMS[name]
    sizes = [(1, hidden), (1, top_k), (1, top_k), (num_experts, 2 * width, hidden), (num_experts, hidden, width)]
    dtypes = [torch.bfloat16, torch.int32, torch.float32, torch.bfloat16, torch.bfloat16]
    if shared:
        beside = SHARED[name]
        sizes += [(beside, hidden), (beside, hidden), (hidden, beside)]
        dtypes += [torch.bfloat16] * 3
    inputs = [torch.empty(size, dtype=dtype, device="meta") for size, dtype in zip(sizes, dtypes, strict=True)]
    code, told = generated(with_shared if shared else experts, inputs, graphs=True)
    assert_told(told, VECTORS)
    facts = compile_kernels(code)
    assert [fact.warps for fact in facts][:2] == [1, 1]
    assert not any(fact.spill_bytes for fact in facts)
    assert VectorSum(top_k, hidden, width, num_experts, 2, ahead=True, num_sms=132).held == held
    registers = -(-facts[1].registers // 8) * 8
    assert shared or abs((1 << 16) // (32 * registers) - PROGRAMS[held]) <= 2, registers
