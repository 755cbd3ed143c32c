"""Inputs at the edge, of a block of ops and of a layer: `tests/support/promises.py` says where each has its test."""

import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.support.inputs import DEVICES, FORMS, BlockForm, make_block
from tests.support.moe_layers import SPECS, make_inputs, make_layer
from tests.support.oracle import CountOps, assert_near_exact, random_like

BAD = (math.nan, math.inf, -math.inf)
FORM = BlockForm(tokens=9, top_k=2, experts=5, hidden=8, width=6, bias=True)
BIAS = ("w13_EJH", "w2_EHI", "b13_EJ", "b2_EH")


def through(block):
    """The chain as a function of its floating tensors, these as leaves, and their names."""
    names, leaves = zip(*block.leaves().floats().items(), strict=True)
    return lambda *tensors: block.replace(**dict(zip(names, tensors, strict=True))).chain(), leaves, names


def with_gradients(block, grad=None):
    """The output and every gradient, by name."""
    call, leaves, names = through(block)
    out = call(*leaves)
    grad = random_like(block.hidden_TH) if grad is None else grad
    found = torch.autograd.grad(out, leaves, grad)
    return {"out": out.detach()} | dict(zip(names, found, strict=True))


def from_logits(logits_TE, block):
    weights_TK, ids_TK = torch.ops.diffulex.moe_route(logits_TE, None, None, block.ids_TK.shape[1])
    return block.replace(weights_TK=weights_TK, ids_TK=ids_TK).chain()


# --- NaN and infinities stay where they are ---------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", BAD)
def test_bad_logits_stay_in_their_token(value, device):
    """Also in the backward. It may choose other experts, so their products have other rows: not bitwise."""
    block = make_block(FORM, device)
    logits = random_like(torch.empty(FORM.tokens, FORM.experts, dtype=torch.float64)).to(device)
    found = []
    for bad in (False, True):
        given = logits.clone()
        if bad:
            given[3, 2] = value
        leaves = given.requires_grad_(), block.hidden_TH.clone().requires_grad_()
        out = from_logits(leaves[0], block.replace(hidden_TH=leaves[1]))
        found.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    rest = torch.arange(FORM.tokens, device=device) != 3
    for clean, dirty in zip(*found, strict=True):
        assert_near_exact(dirty[rest], clean[rest])
    assert not torch.equal(found[0][0][3], found[1][0][3])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", BIAS)
def test_a_bad_expert_reaches_its_own_tokens_alone(name, value, device):
    block, expert = make_block(FORM, device), 2
    clean = with_gradients(block)
    weight = getattr(block, name).clone()
    weight[expert].view(-1)[0] = value
    dirty = with_gradients(block.replace(**{name: weight}))
    spared = (block.ids_TK != expert).all(1)
    assert spared.any() and not spared.all()
    for key in ("out", "hidden_TH", "weights_TK"):
        assert torch.equal(dirty[key][spared], clean[key][spared]), key
    assert not dirty["out"][~spared].isfinite().all()
    others = torch.arange(FORM.experts, device=device) != expert
    for key in BIAS:
        assert torch.equal(dirty[key][others], clean[key][others]), key


# --- rows of padding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_stale_ids_in_padded_rows(value, device):
    """Rows of another batch behind those of this one, as a replayed graph has them: their ids are experts."""
    block, padding = make_block(FORM, device), 7
    old = make_block(FORM.replace(tokens=padding, seed=5), device)
    longer = block.replace(
        hidden_TH=torch.cat((block.hidden_TH, old.hidden_TH * value)),
        weights_TK=torch.cat((block.weights_TK, old.weights_TK)),
        ids_TK=torch.cat((block.ids_TK, old.ids_TK)),
    )
    out = longer.chain()[: FORM.tokens]
    assert out.isfinite().all()
    assert_near_exact(out, block.chain())


# --- strides ----------------------------------------------------------------------------------------------------------


def repeated(tensor, dim=0):
    """The first slice along a dimension, in the place of all: stride 0."""
    return tensor.narrow(dim, 0, 1).expand(tensor.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["hidden_TH", "weights_TK", "w13_EJH", "w2_EHI", "b13_EJ", "b2_EH", "ids_TK"])
def test_rows_that_lie_on_one_another(name, device):
    """Stride 0: values and gradients are those of a copy."""
    block = make_block(FORM, device)
    expanded = block.replace(**{name: repeated(getattr(block, name))})
    copied = block.replace(**{name: repeated(getattr(block, name)).contiguous()})
    found, wanted = with_gradients(expanded), with_gradients(copied)
    for key, value in wanted.items():
        assert_near_exact(found[key], value, what=key)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)], ids=str)
def test_gradients_of_stride_zero(dims, device):
    """As `sum()` and `mean()` leave them."""
    block = make_block(FORM, device)
    grad = random_like(block.hidden_TH)
    for dim in dims:
        grad = repeated(grad, dim)
    found, wanted = with_gradients(block, grad), with_gradients(block, grad.contiguous())
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", ["columns", "every_second_row", "transposed", "backwards"])
def test_views_of_larger_tensors(view, device):
    block = make_block(FORM, device)
    hidden = block.hidden_TH
    views = {
        "columns": torch.cat((hidden, hidden + 1), 1)[:, : FORM.hidden],
        "every_second_row": torch.stack((hidden, hidden + 1), 1).flatten(0, 1)[::2],
        "transposed": hidden.T.contiguous().T,
        "backwards": torch.cat((hidden.new_zeros(3), hidden.reshape(-1)))[3:].view(hidden.shape),
    }
    given = views[view]
    assert torch.equal(given, hidden) and given.data_ptr() != hidden.data_ptr()
    assert_near_exact(block.replace(hidden_TH=given).chain(), block.chain())


# --- who asks for gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_any_of_the_inputs_may_need_no_gradient(device):
    """All subsets: what is asked for is as if all were, and no weight gradient is computed that nobody asked for."""
    block = make_block(FORM, device)
    names, values = zip(*block.floats().items(), strict=True)
    wanted = with_gradients(block)
    for chosen in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, len(names) + 1)):
        tensors = {n: v.detach().requires_grad_(n in chosen) for n, v in zip(names, values, strict=True)}
        with CountOps() as ops:
            out = block.replace(**tensors).chain()
            found = torch.autograd.grad(out, [tensors[name] for name in chosen], random_like(block.hidden_TH))
        for name, grad in zip(chosen, found, strict=True):
            assert torch.equal(grad, wanted[name]), (name, chosen)
        assert ops.calls["moe_expert_grad_weight"] == len(set(chosen) & set(BIAS)), chosen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["plain", "gpt_oss", "sentinels", "no_tokens"])
def test_inference_tensors(name, device):
    """Made and used in inference mode, and used outside of it, where autograd may not save them."""
    with torch.inference_mode():
        block = make_block(FORMS[name], device)
        inside = block.chain()
    assert inside.is_inference() and block.hidden_TH.is_inference()
    with torch.no_grad():
        assert torch.equal(block.chain(), inside)
    assert_near_exact(inside.clone(), make_block(FORMS[name], device).chain())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral", "gpt_oss", "longcat"])
def test_recomputing_routes_alike(name, reentrant, device):
    """Activation checkpointing: each token's experts and weights have the same bits the second time."""
    layer, hidden = make_layer(SPECS[name]).to(device).train(), make_inputs(SPECS[name], 17).hidden_TH.to(device)
    routed = []
    layer.router.register_forward_hook(lambda module, args, out: routed.append(out))
    out = checkpoint(lambda x: layer(x)[0], hidden.requires_grad_(), use_reentrant=reentrant)
    out.sum().backward()
    first, again = routed
    assert torch.equal(first.ids, again.ids) and torch.equal(first.weights, again.weights)


# --- what has no rows, and what has two uses --------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_experts_without_rows_have_no_gradient(device):
    """Zeros, whatever was in the memory that they are written to."""
    form = FORMS["empty_experts"]
    block = make_block(form, device)
    torch.full((1 << 16,), math.nan, dtype=torch.float64, device=device)  # what the allocator may give out again
    found = with_gradients(block)
    empty = [e for e in range(form.experts) if not (block.ids_TK == e).any()]
    assert empty
    for name in BIAS:
        assert torch.equal(found[name][empty], torch.zeros_like(found[name][empty])), name


def test_gradients_are_summed_over_uses():
    """A weight that two blocks share gets the sum of what each gives it alone."""
    block, other = make_block(FORM), make_block(FORM.replace(seed=3))
    shared = block.leaves()
    both = other.replace(w13_EJH=shared.w13_EJH, w2_EHI=shared.w2_EHI)
    leaves = (shared.w13_EJH, shared.w2_EHI)
    together = torch.autograd.grad(shared.chain().sum() + both.chain().sum(), leaves)
    apart = [torch.autograd.grad(one.chain().sum(), leaves) for one in (shared, both)]
    for index, grad in enumerate(together):
        assert_near_exact(grad, apart[0][index] + apart[1][index])
