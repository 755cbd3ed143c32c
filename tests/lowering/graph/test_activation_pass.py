"""Gates between the two expert stages: those that are formulas are folded and compute the same, others stay, with a
reason.
"""

import pytest
import torch
from torch._dynamo import mark_dynamic
from torch.nn import functional

from lowering.activation import evaluate
from lowering.errors import ReasonCode
from lowering.graph.activation_pass import activation_pass
from lowering.graph.dataflow import arguments
from tests.support.graphs import applied, backend_with, calls, trace
from tests.support.inputs import BlockForm, make_block, sort_slots
from tests.support.oracle import assert_oracle_ratio, random_like

moe = torch.ops.diffulex
UP, DOWN = moe.moe_expert_up.default, moe.moe_expert_down.default
FORM = BlockForm(tokens=6, top_k=2, experts=4, hidden=16, width=10, bias=True, ids="sentinels", dtype=torch.float32)
N, J = FORM.tokens * FORM.top_k, 2 * FORM.width


def inputs(dtype=torch.float32, *, seed=0):
    block = make_block(FORM.replace(dtype=dtype, seed=seed))
    slots = sort_slots(block.ids_TK, FORM.experts)
    return block.hidden_TH, block.w13_EJH, block.b13_EJ, block.w2_EHI, slots.order_N, slots.offsets_E1


def stages(gate):
    """The two expert stages with `gate` between them; an ungated gate, which keeps J columns, gets a wider weight."""

    def run(hidden, w13, b13, w2, order, offsets):
        act = gate(moe.moe_expert_up(hidden, w13, b13, order, offsets, FORM.top_k))
        act, *others = act if isinstance(act, tuple) else (act,)
        weight = w2 if act.shape[1] == FORM.width else torch.cat((w2, w2), 2)
        out = moe.moe_expert_down(act.to(hidden.dtype), weight, None, order, offsets)
        return (out, *others)

    return run


def folded(gate, args):
    """The graph after the pass, what was recorded, and what the graph computed before."""
    records, module = [], trace(stages(gate), *args)
    before = module(*args)
    return applied(lambda graph: activation_pass(graph, record=records.append), module), records, before


def swiglu(gate, up):
    return functional.silu(gate) * up


def with_sum(value, function):
    return function(value), value.sum()


def chunked(function):
    return lambda pre: function(*pre.chunk(2, -1))


def interleaved(function):
    return lambda pre: function(pre[..., ::2], pre[..., 1::2])


def widened(function):
    """As models write it that compute the gate in fp32."""
    return lambda pre: function(*(half.float() for half in pre.chunk(2, -1))).to(pre.dtype)


def gpt_oss(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def polynomial(gate, up):
    return 0.5 * gate * (1 + torch.tanh(0.7978845608 * (gate + 0.044715 * torch.pow(gate, 3)))) * up


# gate -> formula it is folded to
FOLDED = {
    "swiglu": (chunked(swiglu), "silu(g) * u"),
    "swiglu_swapped": (chunked(lambda g, u: g * functional.silu(u)), "g * silu(u)"),
    "swiglu_interleaved": (interleaved(swiglu), "silu(g) * u"),
    "swiglu_of_slices": (lambda pre: functional.silu(pre[:, : J // 2]) * pre[:, J // 2 :], "silu(g) * u"),
    "swiglu_of_split": (
        lambda pre: swiglu(*pre.split([J // 2, J // 2], dim=1)),
        "silu(g) * u",
    ),
    "swiglu_by_sigmoid": (chunked(lambda g, u: g * torch.sigmoid(g) * u), "silu(g) * u"),
    "swiglu_in_fp32": (widened(swiglu), "silu(g) * u"),
    "gpt_oss": (interleaved(gpt_oss), None),
    "geglu": (chunked(lambda g, u: functional.gelu(g) * u), None),
    "geglu_tanh": (chunked(lambda g, u: functional.gelu(g, approximate="tanh") * u), None),
    "geglu_polynomial": (chunked(polynomial), None),
    "reglu": (chunked(lambda g, u: functional.relu(g) * u), "relu(g) * u"),
    "up_alone": (chunked(lambda g, u: functional.silu(u)), "silu(u)"),
    "up_as_it_is": (lambda pre: pre[:, J // 2 :].clone(), "u"),
    "relu2": (lambda pre: functional.relu(pre).square(), "square(relu(g))"),
    "silu": (functional.silu, "silu(g)"),
    "tanh": (torch.tanh, "tanh(g)"),
    "hardtanh": (lambda pre: functional.hardtanh(pre, -0.5, 1.5), "min(max(g, -0.5), 1.5)"),
    "relu6": (functional.relu6, "min(max(g, 0.0), 6.0)"),
    "clamp_by_tensors": (lambda pre: torch.maximum(pre.clamp_min(-1.0), torch.tanh(pre)), "max(max(g, -1.0), tanh(g))"),
    "minimum": (chunked(torch.minimum), "min(g, u)"),
    "cube": (lambda pre: pre.pow(3) - pre.pow(2), None),
    "reversed": (chunked(lambda g, u: (1.0 - torch.sigmoid(g)) * -u + 2.0), None),
    "subtracted_from": (chunked(lambda g, u: torch.rsub(g, u)), "u - g"),
    "exponentials": (chunked(lambda g, u: torch.log(1.0 + torch.exp(-g.abs())) * u), None),
    "roots": (chunked(lambda g, u: torch.sqrt(g.square() + 1.0).reciprocal() * torch.erf(u) / 3.0), None),
    "log1p": (lambda pre: torch.log1p(pre.square()), None),
    "tensor_constant": (chunked(lambda g, u: g * u + torch.full_like(u, 0.25)), "g * u + 0.25"),
    "copied": (chunked(lambda g, u: (g.contiguous() * u.clone()).contiguous()), "g * u"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FOLDED)
def test_a_gate_is_folded_and_computes_the_same(name, dtype):
    gate, formula = FOLDED[name]
    args = inputs(dtype)
    module, (record,), before = folded(gate, args)
    assert record.reason is None
    assert formula is None or record.formula == formula
    (up,) = calls(module.graph, UP)
    (down,) = calls(module.graph, DOWN)
    assert arguments(up)["act"] == record.formula
    assert arguments(up)["interleaved"] == (name in ("swiglu_interleaved", "gpt_oss"))
    assert arguments(down)["act"] is up
    exact = stages(gate)(*(t.double() if t.is_floating_point() else t for t in args))
    assert_oracle_ratio(module(*args)[0], before[0], exact[0])


@pytest.mark.parametrize("name", FOLDED)
def test_the_formula_is_the_gate(name):
    """On values no GEMM makes: infinities, NaN and zeros of both signs, in fp64."""
    gate, _ = FOLDED[name]
    _, (record,), _ = folded(gate, inputs())
    special = torch.tensor(
        [0.0, -0.0, 1.0, -3.0, 8.0, -1e4, 1e4, torch.inf, -torch.inf, torch.nan], dtype=torch.float64
    )
    g, u = (grid.reshape(-1, 1).expand(-1, FORM.width) for grid in torch.meshgrid(special, special, indexing="ij"))
    alternating = name in ("swiglu_interleaved", "gpt_oss")
    pre = torch.stack((g, u), 2).reshape(-1, J) if alternating else torch.cat((g, u), 1)
    wanted = gate(pre)
    ours = evaluate(record.formula, *((g, u) if wanted.shape[1] == FORM.width else (pre, pre)))
    torch.testing.assert_close(ours, wanted, equal_nan=True, rtol=1e-6, atol=1e-12)


def tower(pre):
    for _ in range(150):
        pre = torch.tanh(pre)
    return pre


def doubled(pre):
    """Read twice at each of 40 steps: spelled out, a text of 2**40 letters."""
    for _ in range(40):
        pre = (pre + pre) * 0.5
    return pre


# gate -> code and a part of the detail
REFUSED = {
    "none": (lambda pre: pre, ReasonCode.NOT_POINTWISE, "no activation"),
    "softmax": (lambda pre: pre.softmax(-1), ReasonCode.NOT_POINTWISE, "amax"),
    "sum_of_row": (lambda pre: pre / pre.sum(-1, keepdim=True), ReasonCode.NOT_POINTWISE, "sum"),
    "running_sum": (lambda pre: pre.cumsum(0), ReasonCode.NOT_POINTWISE, "cumsum"),
    "where": (lambda pre: torch.where(pre > 0, pre, 0.1 * pre), ReasonCode.NOT_POINTWISE, "where"),
    "rows_flipped": (lambda pre: functional.silu(pre).flip(0), ReasonCode.NOT_POINTWISE, "rev"),
    "vector": (lambda pre: pre * torch.arange(float(J)), ReasonCode.NOT_POINTWISE, "not a pointwise operation"),
    "to_integers": (lambda pre: torch.tanh(pre).int().float(), ReasonCode.NOT_POINTWISE, "convert_element_type"),
    "rounded_division": (
        lambda pre: torch.div(pre, 0.5, rounding_mode="floor"),
        ReasonCode.NOT_POINTWISE,
        "not a pointwise operation",
    ),
    "fourth_power": (lambda pre: pre.pow(4), ReasonCode.NOT_POINTWISE, "pow"),
    "power_of_two": (lambda pre: torch.pow(2.0, pre), ReasonCode.NOT_POINTWISE, "pow"),
    "infinite_bound": (lambda pre: pre.clamp(0.0, torch.inf), ReasonCode.NOT_POINTWISE, "is not a formula"),
    "too_deep": (tower, ReasonCode.NOT_POINTWISE, "is not a formula"),
    "too_long": (doubled, ReasonCode.NOT_POINTWISE, "too long"),
    "two_layouts": (
        lambda pre: functional.silu(pre[:, ::2]) * pre[:, J // 2 :],
        ReasonCode.STRUCTURE,
        "split in 2 ways",
    ),
    "half_and_whole": (
        lambda pre: functional.silu(pre) * pre[:, : J // 2].repeat(1, 2),
        ReasonCode.NOT_POINTWISE,
        "repeat",
    ),
    "broadcast_half": (lambda pre: torch.tanh(pre[:, :1]) * pre, ReasonCode.NOT_POINTWISE, "slice"),
    "gate_alone": (chunked(lambda g, u: functional.silu(g)), ReasonCode.NOT_POINTWISE, "not both used"),
    "uneven_halves": (
        lambda pre: functional.silu(pre[:, : J // 2]) * pre[:, J // 2 - 1 : J - 1],
        ReasonCode.NOT_POINTWISE,
        "slice",
    ),
    "split_of_a_vector": (
        lambda pre: chunked(swiglu)(pre) * torch.ones(J).split(J // 2)[0],
        ReasonCode.NOT_POINTWISE,
        "getitem",
    ),
    "every_third": (
        lambda pre: functional.silu(pre[:, : J // 2]) * pre[:, : J - 1 : 2],
        ReasonCode.NOT_POINTWISE,
        "slice",
    ),
    "pre_read_elsewhere": (
        lambda pre: (chunked(swiglu)(pre), pre),
        ReasonCode.SHARED_USE,
        "output",
    ),
    "half_read_elsewhere": (
        lambda pre: (functional.silu(pre[:, : J // 2]) * pre[:, J // 2 :], pre[:, : J // 2] * 2.0),
        ReasonCode.SHARED_USE,
        "also read by",
    ),
    "inner_value_read_elsewhere": (
        lambda pre: with_sum(functional.relu(pre), torch.tanh),
        ReasonCode.SHARED_USE,
        "sum",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_gate_stays(name):
    gate, code, detail = REFUSED[name]
    args = inputs()
    module, (record,), before = folded(gate, args)
    assert (record.formula, record.reason.code) == (None, code), record.reason
    assert detail in record.reason.detail
    assert arguments(calls(module.graph, UP)[0])["act"] == "identity"
    for ours, wanted in zip(module(*args), before, strict=True):
        assert torch.equal(ours, wanted)


def test_the_dtype_must_stay():
    def narrowed(hidden, w13, b13, w2, order, offsets):
        act = functional.relu(moe.moe_expert_up(hidden, w13, b13, order, offsets, FORM.top_k)).bfloat16()
        return moe.moe_expert_down(act, torch.cat((w2, w2), 2).bfloat16(), None, order, offsets)

    records = []
    applied(lambda graph: activation_pass(graph, record=records.append), trace(narrowed, *inputs()))
    assert "dtype" in records[0].reason.detail


def test_the_width_must_stay():
    """One column, spread over several by a constant."""

    def spread(hidden, w13, b13, w2, order, offsets):
        act = moe.moe_expert_up(hidden, w13[:, :1], None, order, offsets, FORM.top_k) + torch.ones(N, FORM.width)
        return moe.moe_expert_down(act, w2, None, order, offsets)

    records = []
    applied(lambda graph: activation_pass(graph, record=records.append), trace(spread, *inputs()))
    assert "width" in records[0].reason.detail


def test_a_result_that_is_read_twice_is_folded():
    """The result may be read elsewhere: it is replaced, not left out."""
    args = inputs()
    module, (record,), before = folded(lambda pre: with_sum(functional.relu(pre), lambda value: value), args)
    assert record.formula == "relu(g)"
    for ours, eager in zip(module(*args), before, strict=True):
        torch.testing.assert_close(ours, eager)


def test_an_up_stage_that_has_its_activation_is_not_looked_at():
    def run(hidden, w13, b13, w2, order, offsets):
        act = moe.moe_expert_up(hidden, w13, b13, order, offsets, FORM.top_k, "silu(g) * u")
        return moe.moe_expert_down(torch.tanh(act), w2, None, order, offsets)

    records, module = [], trace(run, *inputs())
    applied(lambda graph: activation_pass(graph, record=records.append), module)
    assert records == []
    assert len(calls(module.graph, torch.ops.aten.tanh.default)) == 1


def test_each_layer_is_folded_by_itself():
    """The second gate is scaled by the first layer's result: the first is folded, the second says why it is not."""

    def run(hidden, w13, b13, w2, order, offsets):
        order_2, offsets_2 = order.clone() + 0, offsets.clone() + 0
        first = functional.silu(moe.moe_expert_up(hidden, w13, b13, order, offsets, FORM.top_k))
        scale = first.amax()
        second = functional.silu(moe.moe_expert_up(hidden, w13, b13, order_2, offsets_2, FORM.top_k)) * scale
        weight = torch.cat((w2, w2), 2)
        return (
            moe.moe_expert_down(first, weight, None, order, offsets),
            moe.moe_expert_down(second, weight, None, order_2, offsets_2),
        )

    args = inputs()
    records, module = [], trace(run, *args)
    before = module(*args)
    applied(lambda graph: activation_pass(graph, record=records.append), module)
    assert records[0].formula == "silu(g)"
    assert records[1].reason.code is ReasonCode.NOT_POINTWISE
    for ours, eager in zip(module(*args), before, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_graphs_of_symbolic_length(train):
    """Folded for inference; in training the backward reads the pre-activation, so the gate stays; gradients hold."""
    records = []
    backend = backend_with(lambda graph: activation_pass(graph, record=records.append))
    function = stages(chunked(swiglu))
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    hidden, w13, b13, w2, order, offsets = inputs()
    for tensor in (hidden, order):
        mark_dynamic(tensor, 0)

    def outcome(run, hidden, w13):
        hidden, w13 = (t.detach().requires_grad_(train) for t in (hidden, w13))
        out = run(hidden, w13, b13.to(w13.dtype), w2.to(w13.dtype), order, offsets)[0]
        return (out, *torch.autograd.grad(out, (hidden, w13), random_like(out))) if train else (out,)

    def with_marks(hidden, *args):
        mark_dynamic(hidden, 0)
        return compiled(hidden, *args)

    ours, eager = outcome(with_marks, hidden, w13), outcome(function, hidden, w13)
    for value, wanted, exact in zip(ours, eager, outcome(function, hidden.double(), w13.double()), strict=True):
        assert_oracle_ratio(value.detach(), wanted.detach(), exact.detach())
    record, *of_backward = records
    assert record.formula == (None if train else "silu(g) * u")
    assert train == (record.reason is not None and record.reason.code is ReasonCode.SHARED_USE)
    assert len(of_backward) == train  # the gradient of the up stage goes through a down stage
    assert all(record.reason for record in of_backward)
