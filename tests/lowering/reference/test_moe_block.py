"""The oracle itself, against a dense formulation without a loop, and against transformers' own expert modules."""

import pytest
import torch

from lowering.activation import evaluate, split_gate
from lowering.reference.moe_block import ExpertWeights, moe_block_reference
from tests.support.inputs import FORMS, BlockForm, make_block
from tests.support.oracle import assert_near_exact, gradients, random_like
from tests.support.strategies import ACTS


def dense(block):
    """Every expert on every token, then a weight [T, E] that is zero where the expert was not chosen."""
    experts = torch.arange(block.w13_EJH.shape[0])
    weight_TE = ((block.ids_TK[:, :, None] == experts) * block.weights_TK[:, :, None]).sum(1)
    pre_TEJ = torch.einsum("th,ejh->tej", block.hidden_TH, block.w13_EJH)
    if block.b13_EJ is not None:
        pre_TEJ = pre_TEJ + block.b13_EJ
    flat = split_gate(pre_TEJ.flatten(0, 1), block.act, interleaved=block.interleaved)
    act_TEI = evaluate(block.act, *flat).view(*pre_TEJ.shape[:2], block.w2_EHI.shape[2])
    out_TEH = torch.einsum("tei,ehi->teh", act_TEI, block.w2_EHI)
    if block.b2_EH is not None:
        out_TEH = out_TEH + block.b2_EH
    return torch.einsum("te,teh->th", weight_TE, out_TEH)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_the_dense_form(form):
    block = make_block(form)
    assert_near_exact(block.reference(), dense(block))


@pytest.mark.parametrize("act", ACTS)
def test_equals_the_dense_form_for_every_activation(act):
    block = make_block(FORMS["biased"].replace(act=act))
    assert_near_exact(block.reference(), dense(block))


@pytest.mark.parametrize("name", ["plain", "gpt_oss", "sentinels", "duplicates", "ungated_biased"])
def test_gradients_equal_those_of_the_dense_form(name):
    block = make_block(FORMS[name])
    names, leaves = zip(*block.leaves().floats().items(), strict=True)

    def through(function):
        call = lambda *tensors: function(block.replace(**dict(zip(names, tensors, strict=True))))  # noqa: E731
        return gradients(call, leaves, random_like(block.hidden_TH))

    ours, wanted = through(lambda b: b.reference()), through(dense)
    for position, what in enumerate(names):
        assert_near_exact(ours[position], wanted[position], what=what)


@pytest.mark.parametrize("name", ["plain", "gpt_oss", "sentinels", "ungated_biased", "duplicates", "no_tokens"])
def test_the_eager_form_is_the_same_block(name):
    """What sets the scale of errors in low precision must itself be right."""
    block = make_block(FORMS[name])
    assert_near_exact(block.eager(), block.reference())


def test_a_block_by_hand():
    """One token, two experts of one unit: 0.5 * relu(2 * 3 + 1) * 10 + 0.25 * (relu(-2) * 5 + 8)."""
    out = moe_block_reference(
        torch.tensor([[2.0]]),
        torch.tensor([[0.5, 0.25, 100.0]]),
        torch.tensor([[0, 1, 2]]),
        experts=ExpertWeights(
            torch.tensor([[[3.0]], [[-1.0]]]),
            torch.tensor([[[10.0]], [[5.0]]]),
            b13_EJ=torch.tensor([[1.0], [0.0]]),
            b2_EH=torch.tensor([[0.0], [8.0]]),
            act="relu",
        ),
    )
    assert out.tolist() == [[0.5 * 70 + 0.25 * 8]]
    assert out.dtype == torch.float64


@pytest.mark.parametrize("tokens", [0, 2])
def test_what_no_token_uses_has_gradients_of_zero(tokens):
    """Of every argument, and without its values: those that are not finite stay out of the result."""
    hidden, weights = torch.full((tokens, 3), torch.inf), torch.full((tokens, 1), torch.nan)
    shapes = {"w13_EJH": (2, 4, 3), "w2_EHI": (2, 3, 2), "b13_EJ": (2, 4), "b2_EH": (2, 3)}
    of_experts = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    leaves = [tensor.requires_grad_() for tensor in (hidden, weights, *of_experts.values())]
    nobody = torch.full((tokens, 1), -1)
    out = moe_block_reference(hidden, weights, nobody, experts=ExpertWeights(**of_experts))
    assert out.shape == (tokens, 3) and not out.any()
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), leaves))


def test_layout_of_gate_and_up():
    """silu(g) * u with g = h and u = 2 h, one after the other for two units, then alternating."""
    hidden, one = torch.tensor([[3.0]], dtype=torch.float64), torch.ones(1, 1)
    gate = torch.nn.functional.silu(hidden).item()
    ids, w2 = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([[[1.0, 10.0]]])
    for interleaved, rows in ((False, [1.0, 1.0, 2.0, 0.0]), (True, [1.0, 2.0, 1.0, 0.0])):
        w13 = torch.tensor(rows)[None, :, None]
        experts = ExpertWeights(w13, w2, act="swiglu", interleaved=interleaved)
        out = moe_block_reference(hidden, one, ids, experts=experts)
        assert out.item() == pytest.approx(gate * 6.0, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_of_the_computation(dtype):
    block = make_block(FORMS["biased"].replace(dtype=torch.bfloat16))
    assert block.reference(dtype).dtype == dtype
    assert block.replace(ids_TK=block.ids_TK[:0], hidden_TH=block.hidden_TH[:0]).reference(dtype).dtype == dtype


def test_gradcheck():
    block = make_block(BlockForm(tokens=2, hidden=2, width=2, experts=3, bias=True)).leaves()
    names, leaves = zip(*block.floats().items(), strict=True)
    assert torch.autograd.gradcheck(lambda *t: block.replace(**dict(zip(names, t, strict=True))).reference(), leaves)


def load(module, **tensors):
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(module, name).copy_(tensor)
    return module


def test_equals_the_experts_of_qwen3_moe():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    form = FORMS["plain"]
    block = make_block(form)
    config = Qwen3MoeConfig(num_experts=form.experts, hidden_size=form.hidden, moe_intermediate_size=form.width)
    config._experts_implementation = "eager"
    module = load(Qwen3MoeExperts(config).double(), gate_up_proj=block.w13_EJH, down_proj=block.w2_EHI)
    with torch.no_grad():
        assert_near_exact(module(block.hidden_TH, block.ids_TK.long(), block.weights_TK), block.reference())


def test_equals_the_experts_of_gpt_oss():
    """Interleaved, transposed and biased."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    form = FORMS["gpt_oss"].replace(tokens=12)
    block = make_block(form)
    block = block.replace(hidden_TH=block.hidden_TH * 20)  # far enough to be clamped
    config = GptOssConfig(num_local_experts=form.experts, hidden_size=form.hidden, intermediate_size=form.width)
    config._experts_implementation = "eager"
    module = load(
        GptOssExperts(config).double(),
        gate_up_proj=block.w13_EJH.mT,
        gate_up_proj_bias=block.b13_EJ,
        down_proj=block.w2_EHI.mT,
        down_proj_bias=block.b2_EH,
    )
    with torch.no_grad():
        assert_near_exact(module(block.hidden_TH, block.ids_TK.long(), block.weights_TK), block.reference())
