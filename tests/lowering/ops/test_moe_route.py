"""`diffulex::moe_route` against its oracle: selection, ties, groups, NaN, given ids, gradients; what it refuses."""

import math
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from lowering.errors import MoEDeviceError, MoEDtypeError, MoEOptionError, MoERangeError, MoEShapeError
from lowering.ops import moe_route
from lowering.reference.moe_route import moe_route_reference
from lowering.spec import OP_OPTIONS, SCORES, RoutingSpec
from lowering.state import batch_invariant
from lowering.templates import standalone
from lowering.templates.render import route_text
from tests.support.catalogue import assert_refused
from tests.support.inputs import DEVICES, LOW_DTYPES
from tests.support.interpreter import interpreter
from tests.support.oracle import assert_near_exact, assert_oracle_ratio, gradients, random_like
from tests.support.routing_cases import (
    RoutingCase,
    assert_alike,
    assert_same,
    assert_same_route,
    given_ids,
    routing_cases,
    values,
)

MODULE = sys.modules["lowering.ops.moe_route"]
ATEN = sys.modules["lowering.ops._route_aten"]
DTYPES = (*LOW_DTYPES, torch.float64)
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SPECS = {
    "softmax": RoutingSpec(3),
    "softmax_plain": RoutingSpec(3, renorm=False, scale=16.0),
    "sigmoid": RoutingSpec(2, "sigmoid", eps=1e-6),
    "deepseek_v3": RoutingSpec(3, "sigmoid", 4, 2, eps=1e-20, scale=2.5),
    "deepseek_v2": RoutingSpec(3, n_group=4, topk_group=2, group_score="max", group_fill="0", renorm=False, scale=16.0),
    "sqrtsoftplus": RoutingSpec(3, "sqrtsoftplus", eps=1e-20, scale=1.5),
    "groups_of_one": RoutingSpec(2, "sigmoid", 16, 4),
    "more_than_the_groups_hold": RoutingSpec(6, "sigmoid", 4, 1, scale=2.0),
    "every_expert": RoutingSpec(16),
    "one": RoutingSpec(1, "sigmoid", renorm=False),
}
EXPERTS = 16


def route(logits, spec, bias=None, ids=None):
    return moe_route(logits, bias, ids, *spec.op_args())


def with_ties(tokens, dtype=torch.float32, seed=0):
    """Logits [T, 16] without near ties and with exact ones: columns 3 and 5 repeat columns 9 and 1."""
    logits = values("normal", (tokens, EXPERTS), seed, dtype)
    logits[:, 3], logits[:, 5] = logits[:, 9], logits[:, 1]
    return logits


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


# --- against the oracle ----------------------------------------------------------------------------------------------


@given(routing_cases(DTYPES), st.sampled_from([0, 2048]))
def test_every_option_equals_the_reference(case, sort_values):
    """Both ways of selecting: one stable sort, and keys without ties."""
    with mock.patch.object(ATEN, "_SORT_VALUES", sort_values):
        ours = case.run()
    assert_same_route(ours, case)
    assert ours[0].is_contiguous() and ours[1].is_contiguous()
    assert case.ids is None or ours[1].data_ptr() != case.ids.data_ptr() or case.ids.numel() == 0


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(routing_cases())
def test_every_option_on_the_gpu_equals_the_reference(case):
    assert_alike(case.run("cuda"), case)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_equals_reference(name, dtype, biased, device):
    logits, bias = with_ties(201, dtype), values("normal", (EXPERTS,), 1) / 8 if biased else None
    on_device = None if bias is None else bias.to(device)
    ours = route(logits.to(device), SPECS[name], on_device)
    exact = device == "cpu" or dtype == torch.float64
    oracle = moe_route_reference(logits, SPECS[name], bias_E=bias, dtype=wide(dtype) if exact else torch.float64)
    assert_same(ours, (oracle[0].to(ours[0].dtype), oracle[1]), rtol=1e-6 if exact else 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_given_ids(name, id_dtype, device):
    logits, spec = with_ties(33), SPECS[name]
    ids = given_ids(33, spec.top_k, EXPERTS, dtype=id_dtype)
    ids[0] = EXPERTS  # no valid id at all
    ours = route(logits.to(device), spec, None, ids.to(device))
    oracle = moe_route_reference(logits, spec, ids_TK=ids)
    assert_same(ours, (oracle[0].float(), oracle[1]), rtol=1e-5)
    assert not ours[0][0].any()


def test_ids_beyond_int32_stay_outside():
    ids = torch.tensor([[2**32, 1], [-(2**33), 2**63 - 1]])
    weights, out = route(torch.zeros(2, 4), RoutingSpec(2), None, ids)
    assert out.tolist() == [[4, 1], [4, 4]]
    assert weights.tolist() == [[0.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "deepseek_v3", "deepseek_v2", "sqrtsoftplus"])
def test_error_ratio(name, dtype):
    logits, spec = values("normal", (257, EXPERTS), 3, dtype), SPECS[name]
    weights, ids = route(logits, spec)
    oracle = moe_route_reference(logits, spec, ids_TK=ids)[0]
    assert_oracle_ratio(weights, formula(logits, spec, ids), oracle)


# --- edges -----------------------------------------------------------------------------------------------------------


def edge(spec, logits, bias=None, ids=None, scale=None, *, bias_dtype=torch.float32):
    tensors = (
        None if row is None else torch.tensor(row, dtype=dtype) for row, dtype in ((bias, bias_dtype), (scale, None))
    )
    bias, scale = tensors
    return RoutingCase(spec, torch.tensor([logits]), bias, None if ids is None else torch.tensor([ids]), scale)


HALF = 2.0**-9  # half a step of bfloat16 at 0.5
EDGES = {
    "infinite_scale_of_nobody": edge(RoutingSpec(2), [0.0] * 4, ids=[1, 9], scale=[math.inf, 1.0, 1.0, 1.0]),
    "infinite_bias_of_nobody": edge(
        RoutingSpec(2, bias_in_weights=True), [0.0] * 4, bias=[math.inf, 1.0, 1.0, 1.0], ids=[1, 9]
    ),
    # 0.5 + 0.504 rounds to 1, so the groups tie
    "sums_of_groups_are_rounded": edge(
        RoutingSpec(2, "sigmoid", 2, 1, score_dtype="bfloat16"), [0.0, 0.0, 0.015625, 0.0]
    ),
    "ties_round_to_even": edge(
        RoutingSpec(2, "sigmoid", score_dtype="bfloat16"), [0.0, 0.0], bias=[0.0, HALF], bias_dtype=torch.bfloat16
    ),
    "a_bias_of_fp32_is_not_rounded": edge(
        RoutingSpec(2, "sigmoid", score_dtype="bfloat16"), [0.0, 0.0], bias=[0.0, HALF]
    ),
    "logits_are_not_rounded": edge(
        RoutingSpec(2, score_dtype="bfloat16", select_on="logits"), [1.0, 1.001], [0.0, 0.0], bias_dtype=torch.bfloat16
    ),
    "every_bit_of_nan": edge(RoutingSpec(2, "sigmoid", score_dtype="bfloat16"), [1.0, math.nan, 2.0]),
    "powers_of_small_weights": edge(RoutingSpec(2, renorm=2.0), [0.0, -60.0, -61.0], ids=[1, 2]),
    "high_powers_of_small_weights": edge(RoutingSpec(2, renorm=3.5), [0.0, -40.0, -41.0], ids=[1, 2]),
    "infinite_weight": edge(RoutingSpec(2, "sqrtsoftplus", renorm=2.0), [math.inf, 1.0]),
    "infinite_weight_of_another_power": edge(RoutingSpec(2, "sqrtsoftplus", renorm=0.5), [math.inf, 1.0]),
    "three_shared_columns_under_a_cap": edge(
        RoutingSpec(2, renorm=0.0, softcap=1.5, n_shared=3), [0.5, 1.0, -1.0, 0.0, 2.0, 1.0]
    ),
    "a_shared_column_has_no_bias": edge(
        RoutingSpec(1, "sigmoid", renorm=0.0, bias_in_weights=True, n_shared=2), [1.0, 2.0, 3.0, 4.0], [8.0, 16.0]
    ),
    "small_logits_under_a_cap": edge(RoutingSpec(2, softcap=30.0, select_on="logits"), [1e-4, 1.001e-4]),
    "large_logits_under_a_cap": edge(
        RoutingSpec(5, "sigmoid", softcap=2.0, renorm=0.0), [math.inf, -math.inf, 1e30, 0.5, -0.5]
    ),
    "nothing_but_infinity": edge(RoutingSpec(2, n_shared=1), [-math.inf, -math.inf, -math.inf]),
    "a_sum_below_the_least": edge(RoutingSpec(1, "sigmoid", eps=1e-3, eps_mode="clamp_min"), [-20.0, -21.0]),
    "one_expert_without_division": edge(RoutingSpec(1, "sigmoid", renorm_if_k1=False), [1.0, 2.0]),
    "one_expert": edge(RoutingSpec(1, "sigmoid", softcap=3.0, bias_in_weights=True), [1.0], bias=[2.0], scale=[0.5]),
}
EDGES["every_bit_of_nan"].logits.view(torch.int32)[0, 1] = 0x7FFFFFFF


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", EDGES)
def test_edges(name, device):
    weights, ids = EDGES[name].reference(torch.float64)
    assert_same(EDGES[name].run(device), (weights.float(), ids), rtol=1e-5)


@pytest.mark.parametrize("name", EDGES)
def test_edges_of_the_kernel_in_the_interpreter(name):
    weights, ids = EDGES[name].reference(torch.float64)
    assert_same(run_kernel(EDGES[name]), (weights.float(), ids), rtol=1e-5)


# --- named cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("score", SCORES)
def test_the_lowest_index_wins_a_tie(score, tokens, device):
    logits = torch.zeros(tokens, 12)
    logits[:, 7] = 1.0
    _, ids = route(logits.to(device), RoutingSpec(4, score))
    assert ids.tolist() == [[7, 0, 1, 2]] * tokens
    _, ids = route(logits.to(device), RoutingSpec(4, score, 4, 2, group_score="max"))
    assert ids.tolist() == [[7, 0, 1, 2]] * tokens
    _, ids = route(logits.to(device), RoutingSpec(6, score, 4, 1))  # the rest of the experts is tied at -inf
    assert ids.tolist() == [[7, 6, 8, 0, 1, 2]] * tokens


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SPECS)
def test_nan_stays_in_its_row(name, device):
    logits = with_ties(150)
    clean = route(logits.to(device), SPECS[name])
    logits[3, 6], logits[77], logits[78], logits[149, 15] = math.nan, math.nan, -math.inf, math.inf
    weights, ids = route(logits.to(device), SPECS[name])
    assert ((ids >= 0) & (ids < EXPERTS)).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    rest = [t for t in range(150) if t not in (3, 77, 78, 149)]
    assert torch.equal(weights[rest], clean[0][rest]) and torch.equal(ids[rest], clean[1][rest])
    assert ids[77].tolist() == moe_route_reference(logits[77:78], SPECS[name])[1][0].tolist()
    if SPECS[name].score != "softmax":
        assert ids[3, 0] == 6 and weights[3, 0].isnan()


def test_nan_of_either_sign_and_payload_ties():
    """-NaN, a NaN with a payload and inf: the two NaN first, in order of index."""
    bits = torch.tensor([[0x3F800000, 0x7F800000, -0x400000 + 5, 0x7FC00007, 0]] * 3, dtype=torch.int32)
    with mock.patch.object(ATEN, "_SORT_VALUES", 0):
        assert ATEN.greatest(bits.view(torch.float32), 5).tolist() == [[2, 3, 1, 0, 4]] * 3


def test_negative_infinity_in_the_bias_is_not_a_taken_expert():
    bias = torch.tensor([-math.inf, -math.inf, 0.0, -math.inf])
    for sort_values in (0, 2048):
        with mock.patch.object(ATEN, "_SORT_VALUES", sort_values):
            _, ids = route(torch.zeros(2, 4), RoutingSpec(4), bias)
        assert ids.tolist() == [[2, 0, 1, 3]] * 2


def test_bias_selects_and_does_not_weigh():
    logits, bias = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([-10.0, 0.0, 5.0])
    weights, ids = route(logits, RoutingSpec(2, "sigmoid", renorm=False), bias)
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, torch.sigmoid(torch.tensor([[0.0, 1.0]])))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SPECS)
def test_no_tokens(name, device):
    spec = SPECS[name]
    logits = torch.zeros(0, EXPERTS, device=device, requires_grad=True)
    for ids in (None, torch.zeros(0, spec.top_k, dtype=torch.int64, device=device)):
        weights, out = route(logits, spec, None, ids)
        assert weights.shape == out.shape == (0, spec.top_k)
        assert torch.autograd.grad(weights.sum(), logits)[0].shape == (0, EXPERTS)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_do_not_matter(device):
    logits, ids = with_ties(40).to(device), given_ids(40, 3, EXPERTS).to(device)
    column_major, every_second = logits.t().contiguous().t(), torch.stack((logits, logits), 2).view(40, 32)[:, ::2]
    for spec, given_TK in ((SPECS["softmax"], None), (SPECS["deepseek_v3"], None), (SPECS["softmax"], ids)):
        wanted = route(logits, spec, None, given_TK)
        for strided in (column_major, every_second):
            other = None if given_TK is None else given_TK.t().contiguous().t()
            ours = route(strided, spec, None, other)
            assert torch.equal(ours[1], wanted[1])
            torch.testing.assert_close(ours[0], wanted[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_experts", [1, 7, 96, 160, 1000])
def test_any_number_of_experts(num_experts, device):
    logits = values("normal", (37, num_experts), 4)
    for spec in (RoutingSpec(min(6, num_experts)), RoutingSpec(1, "sigmoid", num_experts, min(3, num_experts))):
        ours = route(logits.to(device), spec)
        oracle = moe_route_reference(logits, spec, dtype=torch.float32)
        assert_same(ours, oracle, rtol=1e-6 if device == "cpu" else 1e-5)


@pytest.mark.gpu
def test_no_host_sync_and_the_same_bits_on_every_run():
    logits, bias = with_ties(5000).cuda(), values("normal", (EXPERTS,), 1).cuda()
    first = route(logits, SPECS["deepseek_v3"], bias)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            again = route(logits, SPECS["deepseek_v3"], bias)
            double = route(logits.double(), SPECS["deepseek_v3"], bias)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(double[1], first[1])


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits():
    tokens = 2**31 // 1024 + 3
    logits = torch.zeros(tokens, 1024, dtype=torch.float16, device="cuda")
    logits[-1, 1000], logits[-2, 5] = 1.0, 2.0
    _, ids = route(logits, RoutingSpec(1))
    assert ids[-3:].flatten().tolist() == [0, 5, 1000]


# --- the generated kernel in Triton's interpreter --------------------------------------------------------------------

KERNEL_CASES = {
    **{name: (EXPERTS, spec) for name, spec in SPECS.items()},
    "odd": (7, RoutingSpec(7, "sqrtsoftplus", renorm=False)),
    "odd_groups": (15, RoutingSpec(5, "sigmoid", 3, 2)),
    "odd_groups_zero": (18, RoutingSpec(4, "softmax", 3, 1, "max", "0")),
    "groups_of_twenty": (160, RoutingSpec(6, "softmax", 8, 3, "max", "-inf", False, 0.0, 16.0)),
    "single": (1, RoutingSpec(1)),
}


def run_kernel(case, block=2):
    """Weights and ids of the generated kernel for the arguments as they reach it."""
    (tokens, columns), spec = case.logits.shape, RoutingSpec(*case.spec.op_args())
    weights = torch.full((tokens, spec.num_weights), -7.0)
    out = torch.full((tokens, spec.num_weights), -7, dtype=torch.int32)
    tensors = {"LOGITS": case.logits, "BIAS": case.bias, "EXPERT_SCALE": case.scale, "IDS_IN": case.ids}
    constants = MODULE.route_constants(
        spec,
        columns,
        logits=case.logits.dtype,
        bias=None if case.bias is None else case.bias.dtype,
        ids=case.ids is not None,
        per_expert_scale=case.scale is not None,
    )
    constants = tuple({**constants, "BLOCK_T": block}.items())
    kernel = standalone.render(route_text(), "moe_route", constants=constants, output_rank=2)
    arguments = kernel.arguments({**tensors, "IDS": out, "OUT": weights})
    after = interpreter().kernel(kernel.source, arguments, grid=(-(-tokens // block),), name=kernel.name)
    after = dict(zip((*kernel.pointers, "OUT"), after, strict=False))
    return after["OUT"], after["IDS"]


@given(routing_cases().filter(lambda case: len(case.logits)))
def test_every_option_of_the_kernel_in_the_interpreter(case):
    assert_alike(run_kernel(case), case)


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_kernel_in_the_interpreter(case):
    """Selection with and without bias, on normal logits and on ties; given ids; special values."""
    num_experts, spec = KERNEL_CASES[case]
    for seed, kind in enumerate(("normal", "grid", "special")):
        bias = values("special" if kind == "special" else "grid", (num_experts,), seed) / 4
        logits = values(kind, (5, num_experts), seed)
        ids = given_ids(5, spec.top_k, num_experts, seed, torch.int64 if seed else torch.int32)
        for biased, chosen in ((None, None), (bias, None), (None, ids)):
            ours = run_kernel(RoutingCase(spec, logits, biased, chosen))
            wanted = moe_route_reference(logits, spec, bias_E=biased, ids_TK=chosen, dtype=torch.float32)
            assert_same(ours, wanted, rtol=5e-6)


# --- gradients -------------------------------------------------------------------------------------------------------


def formula(logits, spec, ids, bias=None, scale=None):
    """The weights for ids [T, W] as differentiable aten; ids outside [0, C) weigh nothing."""
    z = logits.to(wide(logits.dtype))
    z = spec.softcap * torch.tanh(z / spec.softcap) if spec.softcap else z
    if spec.score == "softmax":
        scores = z.softmax(1)
    else:
        scores = z.sigmoid() if spec.score == "sigmoid" else torch.nn.functional.softplus(z).sqrt()
    valid, inside = (ids >= 0) & (ids < logits.shape[1]), ids.long().clamp(0, logits.shape[1] - 1)
    chosen = scores.gather(1, inside)
    if bias is not None and spec.bias_in_weights:
        chosen = chosen + torch.nn.functional.pad(bias.to(z.dtype), (0, spec.n_shared))[inside]
    chosen = torch.where(valid, chosen, 0.0)
    if spec.renorm:
        plain = spec.renorm == 1
        total = chosen.sum(1, True) if plain else torch.linalg.vector_norm(chosen, spec.renorm, 1, True)
        total = total + spec.eps if spec.eps_mode == "add" else total.clamp_min(spec.eps)
        chosen = chosen / torch.where(total == 0, 1.0, total)
    chosen = chosen * spec.scale
    return (
        chosen
        if scale is None
        else chosen * torch.nn.functional.pad(scale.to(z.dtype), (0, spec.n_shared), value=1)[inside]
    )


GRADIENT_CASES = [
    pytest.param(RoutingSpec(3, score, renorm=renorm, eps=eps, scale=1.7), ids, id=f"{score}-{name}-{ids}")
    for score in SCORES
    for name, renorm, eps in (("plain", False, 0.0), ("renorm", True, 0.0), ("eps", True, 0.3))
    for ids in ("selected", "given")
]


def ids_for(kind, tokens, num_experts):
    if kind == "selected":
        return None
    ids = given_ids(tokens, 3, num_experts, 2)
    ids[0], ids[1] = 4, num_experts  # one expert three times, and nobody
    return ids


@pytest.mark.parametrize(("spec", "kind"), GRADIENT_CASES)
def test_gradcheck(spec, kind):
    ids = ids_for(kind, 3, 6)
    logits = values("normal", (3, 6), 6, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: route(z, spec, None, ids)[0], (logits,))
    assert torch.autograd.gradgradcheck(lambda z: route(z, spec, None, ids)[0], (logits,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "kind"), GRADIENT_CASES)
def test_gradients_equal_those_of_the_formula(spec, kind, dtype, device):
    ids = ids_for(kind, 65, EXPERTS)
    ids = None if ids is None else ids.to(device)
    logits = with_ties(65, dtype).to(device).requires_grad_()
    weights, out = route(logits, spec, None, ids)
    assert not out.requires_grad
    grad = random_like(weights)

    def grad_of(function, leaf):
        return gradients(function, (leaf,), grad)[0]

    ours = grad_of(lambda z: route(z, spec, None, ids)[0], logits)
    eager = grad_of(lambda z: formula(z, spec, out), logits)
    double = logits.detach().double().requires_grad_()
    oracle = grad_of(lambda z: formula(z, spec, out), double)
    assert ours.dtype == dtype
    if dtype == torch.float64:
        assert_near_exact(ours, oracle)
    else:
        assert_oracle_ratio(ours, eager, oracle)
    again = grad_of(lambda z: route(z, spec, None, ids)[0], logits)
    assert torch.equal(ours, again)


OPTIONS = {
    "softcap_softmax": RoutingSpec(3, softcap=2.0),
    "softcap_sigmoid": RoutingSpec(3, "sigmoid", softcap=2.0, renorm=0.0),
    "two_norm": RoutingSpec(3, renorm=2.0, scale=1.5),
    "two_norm_eps": RoutingSpec(3, "sigmoid", renorm=2.0, eps=0.25),
    "half_norm": RoutingSpec(3, renorm=0.5),
    "norm_of_three": RoutingSpec(3, "sqrtsoftplus", renorm=3.0, eps=1e-3, eps_mode="clamp_min"),
    "clamped": RoutingSpec(3, eps=0.75, eps_mode="clamp_min"),
    "clamped_two_norm": RoutingSpec(3, "sigmoid", renorm=2.0, eps=1.0, eps_mode="clamp_min"),
    "shared_softmax": RoutingSpec(3, n_shared=2, renorm=0.0),
    "shared_sigmoid": RoutingSpec(3, "sigmoid", n_shared=2, scale=1.5),
    "bias_in_weights": RoutingSpec(3, renorm=0.0, bias_in_weights=True),
    "everything": RoutingSpec(
        *(3, "sigmoid", 1, 1, "max", "0", 2.0, 0.1, 2.5, 5.0, "float32", "logits", True, "clamp_min", 1)
    ),
}


@pytest.mark.parametrize("kind", ["selected", "given"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck_of_every_option(name, kind):
    """Logits, bias and the scale of each expert; the bias is positive, so that no sum vanishes."""
    spec, ids = OPTIONS[name], ids_for(kind, 3, 6)
    logits = values("normal", (3, 6 + spec.n_shared), 6, torch.float64).requires_grad_()
    bias, scale = (values("normal", (6,), seed, torch.float64).abs().requires_grad_() for seed in (7, 8))

    def weights(*leaves):
        z, b, s = leaves if spec.bias_in_weights else (leaves[0], bias.detach(), leaves[1])
        return moe_route(z, b, ids, *spec.op_args(), s)[0]

    leaves = (logits, bias, scale) if spec.bias_in_weights else (logits, scale)
    assert torch.autograd.gradcheck(weights, leaves)
    assert torch.autograd.gradgradcheck(weights, leaves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["selected", "given"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_every_option_equal_those_of_the_formula(name, kind, dtype, device):
    spec, ids = OPTIONS[name], ids_for(kind, 65, EXPERTS)
    ids = None if ids is None else ids.to(device)
    logits = values("normal", (65, EXPERTS + spec.n_shared), 6, dtype).to(device).requires_grad_()
    bias, scale = (values("normal", (EXPERTS,), seed, dtype).abs().to(device).requires_grad_() for seed in (7, 8))
    leaves = (logits, bias, scale)
    out = moe_route(logits, bias, ids, *spec.op_args(), scale)[1]
    grad = random_like(out.to(wide(dtype)))
    ours = gradients(lambda z, b, s: moe_route(z, b, ids, *spec.op_args(), s)[0], leaves, grad)
    eager = gradients(lambda z, b, s: formula(z, spec, out, b, s), leaves, grad)
    doubles = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    oracle = gradients(lambda z, b, s: formula(z, spec, out, b, s), doubles, grad)
    for place, leaf in enumerate(leaves):
        assert ours[place].dtype == dtype and ours[place].shape == leaf.shape
        assert_oracle_ratio(ours[place], eager[place], oracle[place], what=f"gradient {place}")
    assert spec.bias_in_weights == bool(ours[1].any())


def test_bias_and_ids_get_no_gradient():
    logits, bias = with_ties(4).requires_grad_(), torch.zeros(EXPERTS, requires_grad=True)
    weights, _ = route(logits, SPECS["sigmoid"], bias)
    assert torch.autograd.grad(weights.sum(), (logits, bias), allow_unused=True)[1] is None


def test_nan_stays_in_its_row_of_the_gradient():
    logits = with_ties(4)
    logits[2, 5] = math.nan
    logits.requires_grad_()
    for spec in (SPECS["softmax"], SPECS["sigmoid"]):
        (grad,) = torch.autograd.grad(route(logits, spec)[0].pow(2).sum(), logits)
        assert grad[2].isnan().any() and grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("renorm", [1.0, 0.5])
def test_the_slope_of_a_vanished_score_is_zero(renorm):
    logits = torch.tensor([[-200.0, 0.0, 1.0]], requires_grad=True)
    weights, _ = route(logits, RoutingSpec(3, "sqrtsoftplus", renorm=renorm))
    (grad,) = torch.autograd.grad(weights.pow(2).sum(), logits)
    assert grad.isfinite().all() and grad[0, 0] == 0


# --- tracing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "deepseek_v3", "sqrtsoftplus"])
@pytest.mark.parametrize("kind", ["selected", "given"])
def test_one_dynamic_training_graph(name, kind):
    spec = SPECS[name]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    options = spec.op_args()

    def loss(logits, ids):
        return moe_route(logits, None, ids, *options)[0].pow(2).sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for tokens in (5, 3, 64):
        logits = with_ties(tokens).requires_grad_()
        ids = None if kind == "selected" else given_ids(tokens, spec.top_k, EXPERTS)
        for tensor in (logits, ids):
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 0)
        (ours,) = torch.autograd.grad(compiled(logits, ids), logits)
        (wanted,) = torch.autograd.grad(loss(logits, ids), logits)
        torch.testing.assert_close(ours, wanted)
    assert counter.frame_count == 1


def test_compiled_training_with_every_option():
    """Forward and backward, rounded scores included, through Inductor."""
    options = RoutingSpec(
        *(3, "sigmoid", 1, 1, "max", "0", 2.0, 0.1, 2.5, 5.0, "bfloat16", "scores", True, "clamp_min", 2)
    ).op_args()

    def loss(logits, bias, scale):
        weights, ids = moe_route(logits * 2, bias, None, *options, scale)
        return (weights * ids).sum()

    leaves = [
        values("normal", shape, seed).abs().requires_grad_() for seed, shape in enumerate(((7, 18), (16,), (16,)))
    ]
    torch._dynamo.reset()
    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(*leaves), leaves))
    assert all(grad.any() for grad in ours)


def test_exports_with_a_dynamic_number_of_tokens():
    class Router(torch.nn.Module):
        def forward(self, logits):
            return route(logits, SPECS["deepseek_v3"])

    tokens = torch.export.Dim("tokens", min=0)
    program = torch.export.export(Router(), (with_ties(5),), dynamic_shapes=({0: tokens},))
    assert [n.target for n in program.graph.nodes if "moe_route" in str(n.target)] == [moe_route]
    for count in (0, 1, 9):
        logits = with_ties(count)
        ours, wanted = program.module()(logits), route(logits, SPECS["deepseek_v3"])
        assert torch.equal(ours[0], wanted[0]) and torch.equal(ours[1], wanted[1])


OPCHECKS = {
    **{f"{name}-{dtype}": (SPECS[name], dtype, False) for name in SPECS for dtype in (torch.float32, torch.bfloat16)},
    **{f"{name}-given": (SPECS[name], torch.float32, True) for name in ("softmax", "sigmoid", "sqrtsoftplus")},
    "double": (SPECS["deepseek_v3"], torch.float64, False),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case, grad, device):
    spec, dtype, given_too = OPCHECKS[case]
    logits = with_ties(6, dtype).to(device).requires_grad_(grad)
    bias = torch.linspace(-1, 1, EXPERTS, device=device)
    ids = given_ids(6, spec.top_k, EXPERTS).to(device) if given_too else None
    outcome = torch.library.opcheck(moe_route, (logits, bias, ids, *spec.op_args()), test_utils=UTILITIES)
    assert outcome == dict.fromkeys(UTILITIES, "SUCCESS")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("name", OPTIONS)
def test_opcheck_of_every_option(name, grad, device):
    spec = OPTIONS[name]
    logits = values("normal", (6, EXPERTS + spec.n_shared), 6, torch.float32).to(device).requires_grad_(grad)
    bias, scale = (torch.linspace(0.5, 1, EXPERTS, device=device).requires_grad_(grad) for _ in range(2))
    args = (logits, bias, None, *spec.op_args(), scale)
    assert torch.library.opcheck(moe_route, args, test_utils=UTILITIES) == dict.fromkeys(UTILITIES, "SUCCESS")


# --- refusals --------------------------------------------------------------------------------------------------------

GOOD = {
    "logits": torch.zeros(5, 8),
    "bias": None,
    "ids": None,
    **dict(zip(OP_OPTIONS, RoutingSpec(2).op_args(), strict=True)),
}
BAD = {
    "logits_rank": ({"logits": torch.zeros(1, 5, 8)}, MoEShapeError, "(1, 5, 8)"),
    "logits_dtype": ({"logits": torch.zeros(5, 8, dtype=torch.int32)}, MoEDtypeError, "torch.int32"),
    "k_above_E": ({"top_k": 9}, MoERangeError, "top_k=9"),
    "k_zero": ({"top_k": 0}, MoERangeError, "top_k=0"),
    "k_negative": ({"top_k": -1}, MoERangeError, "top_k=-1"),
    "score": ({"score": "relu"}, MoEOptionError, "'relu'"),
    "group_score": ({"group_score": "mean"}, MoEOptionError, "'mean'"),
    "group_fill": ({"group_fill": "1"}, MoEOptionError, "'1'"),
    "groups_do_not_divide": ({"n_group": 3}, MoERangeError, "n_group=3"),
    "no_group": ({"n_group": 0}, MoERangeError, "n_group=0"),
    "too_many_groups_kept": ({"n_group": 2, "topk_group": 3}, MoERangeError, "topk_group=3"),
    "bias_rank": ({"bias": torch.zeros(1, 8)}, MoEShapeError, "(1, 8)"),
    "bias_length": ({"bias": torch.zeros(7)}, MoEShapeError, "7"),
    "bias_dtype": ({"bias": torch.zeros(8, dtype=torch.int64)}, MoEDtypeError, "torch.int64"),
    "bias_device": ({"bias": torch.zeros(8, device="meta")}, MoEDeviceError, "meta"),
    "score_dtype": ({"score_dtype": "int8"}, MoEOptionError, "'int8'"),
    "select_on": ({"select_on": "probs"}, MoEOptionError, "'probs'"),
    "eps_mode": ({"eps_mode": "max"}, MoEOptionError, "'max'"),
    "renorm": ({"renorm": -1.0}, MoERangeError, "renorm=-1.0"),
    "renorm_nan": ({"renorm": math.nan}, MoERangeError, "renorm=nan"),
    "eps": ({"eps": math.inf}, MoERangeError, "eps=inf"),
    "softcap": ({"softcap": -30.0}, MoERangeError, "softcap=-30.0"),
    "shared": ({"n_shared": -1}, MoERangeError, "n_shared=-1"),
    "more_shared_than_columns": ({"n_shared": 8}, MoERangeError, "top_k=2"),
    "k_above_E_without_shared": ({"top_k": 7, "n_shared": 2}, MoERangeError, "top_k=7"),
    "bias_with_shared": ({"bias": torch.zeros(8), "n_shared": 2}, MoEShapeError, "8"),
    "scale_rank": ({"per_expert_scale": torch.zeros(1, 8)}, MoEShapeError, "(1, 8)"),
    "scale_length": ({"per_expert_scale": torch.zeros(7)}, MoEShapeError, "7"),
    "scale_dtype": ({"per_expert_scale": torch.zeros(8, dtype=torch.int64)}, MoEDtypeError, "torch.int64"),
    "scale_device": ({"per_expert_scale": torch.zeros(8, device="meta")}, MoEDeviceError, "meta"),
    "ids_rank": ({"ids": torch.zeros(10, dtype=torch.int32)}, MoEShapeError, "(10,)"),
    "ids_rows": ({"ids": torch.zeros(4, 2, dtype=torch.int32)}, MoEShapeError, "4"),
    "ids_columns": ({"ids": torch.zeros(5, 3, dtype=torch.int32)}, MoEShapeError, "3"),
    "ids_dtype": ({"ids": torch.zeros(5, 2)}, MoEDtypeError, "torch.float32"),
    "ids_device": ({"ids": torch.zeros(5, 2, dtype=torch.int32, device="meta")}, MoEDeviceError, "meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    changes, kind, got = BAD[case]
    assert_refused(moe_route, GOOD | changes, kind, got=got)


def test_accepts_what_the_refusals_change():
    moe_route(**GOOD)


def test_tiles_that_do_not_depend_on_the_number_of_tokens(monkeypatch):
    """The layout of a tile decides in which order its columns are summed."""
    asked = []
    monkeypatch.setattr(standalone, "launch", lambda *_, constants, **options: asked.append(constants["BLOCK_T"]))
    launched = sys.modules["lowering.ops.moe_route"]._cuda
    for tokens in (1, 64, 5000):
        launched(torch.randn(tokens, 8), None, None, 2)
    with batch_invariant():
        for tokens in (1, 64, 5000):
            launched(torch.randn(tokens, 8), None, None, 2)
    assert asked == [1, 16, 64, 16, 16, 16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given_too", [False, True], ids=["", "given"])
@pytest.mark.parametrize("name", [*SPECS, *OPTIONS])
def test_opcheck_of_column_major_logits(name, given_too, device):
    """What the op returns has rows one after the other, whatever the strides of what it reads: so says its fake."""
    spec = (SPECS | OPTIONS)[name]
    logits = values("normal", (EXPERTS + spec.n_shared, 6), 6, torch.float32).to(device).t()
    bias, scale = (torch.linspace(0.5, 1, EXPERTS, device=device) for _ in range(2))
    ids = given_ids(6, spec.top_k, EXPERTS).to(device).t().contiguous().t() if given_too else None
    assert all(out.is_contiguous() for out in moe_route(logits, bias, ids, *spec.op_args(), scale))
    args = (logits, bias, ids, *spec.op_args(), scale)
    assert torch.library.opcheck(moe_route, args, test_utils=UTILITIES) == dict.fromkeys(UTILITIES, "SUCCESS")
