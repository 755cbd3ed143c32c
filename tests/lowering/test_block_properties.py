"""Properties of a whole block, dispatch to combine: against the per-token oracle, and against itself.

The ops are put together as a model does it; examples are drawn by hypothesis, all in fp64 unless a test says otherwise.
"""

import math

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from lowering.activation import evaluate, is_gated, split_gate
from tests.support.inputs import DEVICES, FORMS, LOW_DTYPES, SENTINELS, WIDE_FORMS, BlockForm, make_block
from tests.support.oracle import assert_near_exact, assert_oracle_ratio, gradients, random_like
from tests.support.strategies import block_forms

forms = block_forms()


def through(block, function):
    """The block as a function of its floating tensors, and those tensors as leaves."""
    names, leaves = zip(*block.leaves().floats().items(), strict=True)
    return lambda *tensors: function(block.replace(**dict(zip(names, tensors, strict=True)))), leaves, names


def chain(block):
    return block.chain()


def permutation(size, seed):
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def rows(block, index):
    """The block of some of its tokens."""
    return block.replace(
        hidden_TH=block.hidden_TH[index], weights_TK=block.weights_TK[index], ids_TK=block.ids_TK[index]
    )


def dense_expert(block, expert):
    """One expert's MLP on every token, [T, H]."""
    bias, bias_2 = (None if b is None else b[expert] for b in (block.b13_EJ, block.b2_EH))
    pre = torch.nn.functional.linear(block.hidden_TH, block.w13_EJH[expert], bias)
    act = evaluate(block.act, *split_gate(pre, block.act, interleaved=block.interleaved))
    return torch.nn.functional.linear(act, block.w2_EHI[expert], bias_2)


# --- the chain of ops against the oracle ------------------------------------------------------------------------


@given(forms)
def test_equals_the_oracle(form):
    block = make_block(form)
    assert_near_exact(block.chain(), block.reference())


@given(forms)
def test_gradients_equal_those_of_the_oracle(form):
    block = make_block(form)
    ours, leaves, names = through(block, chain)
    oracle, _, _ = through(block, lambda b: b.reference())
    grad = random_like(block.hidden_TH)
    found, wanted = gradients(ours, leaves, grad), gradients(oracle, leaves, grad)
    for position, name in enumerate(names):
        assert_near_exact(found[position], wanted[position], what=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_named_forms_equal_the_oracle(form, device):
    block = make_block(form, device)
    assert_near_exact(block.chain(), block.reference())
    ours, leaves, names = through(block, chain)
    oracle, _, _ = through(block, lambda b: b.reference())
    grad = random_like(block.hidden_TH)
    found, wanted = gradients(ours, leaves, grad), gradients(oracle, leaves, grad)
    for position, name in enumerate(names):
        assert_near_exact(found[position], wanted[position], what=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("form", WIDE_FORMS.values(), ids=WIDE_FORMS)
def test_error_ratio(form, dtype, device):
    """Output and every gradient, against the error of one linear per expert in the same dtype."""
    block = make_block(form.replace(dtype=dtype), device)
    with torch.no_grad():
        assert_oracle_ratio(block.chain(), block.eager(), block.reference())
    grad = random_like(block.hidden_TH)
    results = []
    for source, function in ((block, chain), (block, lambda b: b.eager()), (block.double(), lambda b: b.reference())):
        call, leaves, names = through(source, function)
        results.append(gradients(call, leaves, grad))
    for position, name in enumerate(names):
        assert_oracle_ratio(*(result[position] for result in results), what=f"gradient of {name}")


@pytest.mark.parametrize("name", ["gpt_oss", "sentinels", "ungated_biased", "duplicates"])
def test_gradcheck(name):
    form = FORMS[name].replace(tokens=3, hidden=2, width=2, experts=3, top_k=2)
    call, leaves, _ = through(make_block(form), chain)
    assert torch.autograd.gradcheck(call, leaves)


def test_gradcheck_from_the_logits():
    """Router, dispatch, experts and combine, K = E so that no step changes the chosen experts."""
    block = make_block(BlockForm(tokens=3, top_k=3, experts=3, hidden=2, width=2, seed=3))
    logits = random_like(block.weights_TK)

    def from_logits(logits_TE, hidden_TH):
        weights_TK, ids_TK = torch.ops.diffulex.moe_route(logits_TE, None, None, 3)
        return block.replace(hidden_TH=hidden_TH, weights_TK=weights_TK, ids_TK=ids_TK).chain()

    assert torch.autograd.gradcheck(from_logits, (logits.requires_grad_(), block.hidden_TH.requires_grad_()))


# --- the chain against itself -----------------------------------------------------------------------------------


@given(forms, st.integers(0, 99))
def test_permuting_tokens_permutes_outputs(form, seed):
    block, index = make_block(form), permutation(form.tokens, seed)
    assert_near_exact(rows(block, index).chain(), block.chain()[index])


@given(forms, st.integers(0, 99))
def test_relabelling_experts_changes_nothing(form, seed):
    block, index = make_block(form), permutation(form.experts, seed)
    new_id = torch.argsort(index).int()  # expert index[j] becomes expert j
    valid = (block.ids_TK >= 0) & (block.ids_TK < form.experts)
    relabelled = block.replace(
        ids_TK=torch.where(valid, new_id[torch.where(valid, block.ids_TK, 0).long()], block.ids_TK),
        w13_EJH=block.w13_EJH[index],
        w2_EHI=block.w2_EHI[index],
        b13_EJ=None if block.b13_EJ is None else block.b13_EJ[index],
        b2_EH=None if block.b2_EH is None else block.b2_EH[index],
    )
    assert_near_exact(relabelled.chain(), block.chain())


@given(forms, st.data())
def test_splitting_the_batch_changes_nothing(form, data):
    block = make_block(form)
    cut = data.draw(st.integers(0, form.tokens))
    parts = [rows(block, slice(0, cut)).chain(), rows(block, slice(cut, None)).chain()]
    assert_near_exact(torch.cat(parts), block.chain())


@given(forms, st.integers(0, 99))
def test_order_of_a_tokens_experts_does_not_matter(form, seed):
    block, index = make_block(form), permutation(form.top_k, seed)
    swapped = block.replace(ids_TK=block.ids_TK[:, index], weights_TK=block.weights_TK[:, index])
    assert_near_exact(swapped.chain(), block.chain())


@given(forms, st.integers(0, 99), st.sampled_from(SENTINELS))
def test_weight_zero_is_the_same_as_a_dropped_id(form, seed, sentinel):
    block = make_block(form)
    dropped = torch.rand(block.ids_TK.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    zeroed = block.replace(weights_TK=block.weights_TK.masked_fill(dropped, 0.0))
    without = block.replace(ids_TK=block.ids_TK.masked_fill(dropped, sentinel))
    assert_near_exact(zeroed.chain(), without.chain())


@given(block_forms(ids="one"))
def test_one_expert_with_weight_one_is_its_dense_mlp(form):
    block = make_block(form)
    one_hot = torch.zeros_like(block.weights_TK)
    one_hot[:, form.seed % form.top_k] = 1.0
    assert_near_exact(block.replace(weights_TK=one_hot).chain(), dense_expert(block, form.experts // 2))


@given(block_forms(ids="distinct"), st.integers(0, 99))
def test_one_hot_routing_is_one_dense_mlp_a_token(form, seed):
    block = make_block(form)
    column = torch.randint(form.top_k, (form.tokens, 1), generator=torch.Generator().manual_seed(seed))
    one_hot = torch.zeros_like(block.weights_TK).scatter_(1, column, 1.0)
    chosen = block.ids_TK.gather(1, column)[:, 0].tolist()
    dense = [dense_expert(block, e) for e in range(form.experts)]
    wanted = torch.stack([dense[e][t] for t, e in enumerate(chosen)]) if chosen else block.hidden_TH
    assert_near_exact(block.replace(weights_TK=one_hot).chain(), wanted)


@given(block_forms(ids="distinct"))
def test_every_expert_with_equal_weights_is_the_dense_average(form):
    block = make_block(form.replace(top_k=form.experts))
    block = block.replace(weights_TK=torch.full_like(block.weights_TK, 1 / form.experts))
    dense = torch.stack([dense_expert(block, e) for e in range(form.experts)])
    assert_near_exact(block.chain(), dense.mean(0))


@given(forms, st.sampled_from([0.5, 2.0, -1.0, 1024.0]))
def test_scaling_the_weights_scales_the_output(form, factor):
    """By a power of two, so bitwise."""
    block = make_block(form)
    scaled = block.replace(weights_TK=block.weights_TK * factor)
    assert torch.equal(scaled.chain(), block.chain() * factor)


@given(forms)
def test_the_output_is_linear_in_the_weights(form):
    block = make_block(form)
    other = block.replace(weights_TK=random_like(block.weights_TK))
    both = block.replace(weights_TK=block.weights_TK + other.weights_TK)
    assert_near_exact(both.chain(), block.chain() + other.chain())


@given(forms, st.integers(1, 4), st.sampled_from([None, *SENTINELS]))
def test_rows_of_padding_change_nothing(form, padding, sentinel):
    """Padded tokens hold NaN; with ids outside [0, E) it must not reach the other rows, nor any gradient."""
    block = make_block(form)
    ids = torch.full((padding, form.top_k), form.experts if sentinel is None else sentinel, dtype=torch.int32)
    padded = block.replace(
        hidden_TH=torch.cat((block.hidden_TH, block.hidden_TH.new_full((padding, form.hidden), math.nan))),
        weights_TK=torch.cat((block.weights_TK, block.weights_TK.new_ones(padding, form.top_k))),
        ids_TK=torch.cat((block.ids_TK, ids)),
    )
    out, longer = block.chain(), padded.chain()
    assert_near_exact(longer[: form.tokens], out)  # SIMD remainders round otherwise, so not bitwise
    assert torch.equal(longer[form.tokens :], torch.zeros_like(longer[form.tokens :]))
    grads = []
    for source in (block, padded):
        call, leaves, names = through(source, chain)
        grads.append(dict(zip(names, gradients(call, leaves, torch.ones_like(source.hidden_TH)).values(), strict=True)))
    for name, grad in grads[1].items():
        wanted = grads[0][name]
        assert_near_exact(grad[: form.tokens] if name in ("hidden_TH", "weights_TK") else grad, wanted, what=name)


@given(block_forms(tokens=0))
def test_no_tokens(form):
    """No result, and gradients that are zeros and not what was in memory."""
    block = make_block(form)
    assert block.chain().shape == (0, form.hidden)
    call, leaves, names = through(block, chain)
    grads = gradients(call, leaves, torch.empty_like(block.hidden_TH))
    for position, name in enumerate(names):
        assert torch.equal(grads[position], torch.zeros_like(leaves[position])), name


@given(forms)
def test_choosing_an_expert_twice_adds_its_weights(form):
    block = make_block(form)
    twice = block.replace(
        ids_TK=torch.cat((block.ids_TK, block.ids_TK), 1),
        weights_TK=torch.cat((block.weights_TK * 0.25, block.weights_TK * 0.75), 1),
    )
    assert_near_exact(twice.chain(), block.chain())


@given(forms)
def test_storage_of_the_weights_does_not_matter(form):
    plain, transposed = (make_block(form.replace(transposed=flag)) for flag in (False, True))
    assert_near_exact(plain.chain(), transposed.chain())


@given(forms.filter(lambda form: is_gated(form.act)))
def test_interleaving_the_rows_is_a_layout(form):
    halves = make_block(form.replace(interleaved=False))
    order = torch.arange(2 * form.width).view(2, form.width).T.flatten()
    pairs = halves.replace(
        interleaved=True,
        w13_EJH=halves.w13_EJH[:, order],
        b13_EJ=None if halves.b13_EJ is None else halves.b13_EJ[:, order],
    )
    assert_near_exact(pairs.chain(), halves.chain())


@given(forms.filter(lambda form: form.tokens > 0), st.sampled_from([math.nan, math.inf]), st.data())
def test_a_bad_token_stays_alone(form, value, data):
    block = make_block(form)
    clean, token = block.chain(), data.draw(st.integers(0, form.tokens - 1))
    hidden = block.hidden_TH.clone()
    hidden[token, data.draw(st.integers(0, form.hidden - 1))] = value
    dirty = block.replace(hidden_TH=hidden).chain()
    rest = torch.arange(form.tokens) != token
    assert torch.equal(dirty[rest], clean[rest])
    valid = (block.ids_TK[token] >= 0) & (block.ids_TK[token] < form.experts)
    if math.isnan(value):
        assert bool(dirty[token].isnan().all()) is bool(valid.any())


@given(forms.filter(lambda form: form.tokens > 0), st.data())
def test_a_bad_weight_stays_in_its_token(form, data):
    block = make_block(form)
    clean, token = block.chain(), data.draw(st.integers(0, form.tokens - 1))
    weights = block.weights_TK.clone()
    weights[token] = math.nan
    dirty = block.replace(weights_TK=weights).chain()
    rest = torch.arange(form.tokens) != token
    assert torch.equal(dirty[rest], clean[rest])
    assert dirty[token].isnan().all()


@given(block_forms(bias=True), st.sampled_from(LOW_DTYPES))
def test_bitwise_repeatable(form, dtype):
    block = make_block(form.replace(dtype=dtype, tokens=form.tokens * 3))
    call, leaves, _ = through(block, chain)
    grad = random_like(block.hidden_TH)
    outs = [call(*leaves) for _ in range(2)]
    grads = [gradients(call, leaves, grad) for _ in range(2)]
    assert torch.equal(*outs)
    assert all(torch.equal(grads[0][i], grads[1][i]) for i in grads[0])


# --- capture ----------------------------------------------------------------------------------------------------

TOKENS = (0, 1, 2, 7, 64, 129, 512)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_compiles_whole_into_at_most_three_graphs(grad):
    """Through AOTAutograd with symbolic sizes, without code generation: no break, few graphs, right values."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    form = FORMS["gpt_oss"].replace(dtype=torch.float32)
    blocks = [make_block(form.replace(tokens=tokens)) for tokens in TOKENS]
    weights = blocks[0].leaves() if grad else blocks[0]

    def run(hidden_TH, weights_TK, ids_TK):
        return weights.replace(hidden_TH=hidden_TH, weights_TK=weights_TK, ids_TK=ids_TK).chain()

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    for block in blocks:
        args = block.hidden_TH, block.weights_TK, block.ids_TK
        torch.testing.assert_close(compiled(*args), run(*args))
        if grad:
            found, wanted = (torch.autograd.grad(f(*args).sum(), weights.w13_EJH)[0] for f in (compiled, run))
            torch.testing.assert_close(found, wanted)
    assert 1 <= len(graphs) <= (6 if grad else 3), f"{len(graphs)} graphs, forward and backward"


class Block(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_TH, weights_TK, ids_TK):
        return self.block.replace(hidden_TH=hidden_TH, weights_TK=weights_TK, ids_TK=ids_TK).chain()


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_exports_with_symbolic_tokens(strict):
    form = FORMS["sentinels"].replace(dtype=torch.float32)
    module = Block(make_block(form))
    tokens = torch.export.Dim("tokens", min=0, max=4096)
    example = make_block(form)
    args = example.hidden_TH, example.weights_TK, example.ids_TK
    program = torch.export.export(module, args, dynamic_shapes=({0: tokens},) * 3, strict=strict)
    names = {str(node.target) for node in program.graph.nodes if "diffulex" in str(node.target)}
    stages = ("moe_dispatch", "moe_expert_up", "moe_expert_down", "moe_combine")
    assert names == {f"diffulex.{stage}.default" for stage in stages}
    for size in (0, 1, 2, 7, 33):
        block = make_block(form.replace(tokens=size))
        args = block.hidden_TH, block.weights_TK, block.ids_TK
        torch.testing.assert_close(program.module()(*args), module(*args))
