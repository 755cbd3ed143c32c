"""The factories must make what their names say, or the tests that use them prove nothing."""

import pytest
import torch

from lowering.ops import ALL_OPS
from tests.support.inputs import FORMS, SAMPLES, WIDE_FORMS, BlockForm, make_block, make_ids, sort_slots
from tests.support.strategies import ACTS, IDS


def ids_of(form):
    return make_ids(form, torch.Generator().manual_seed(form.seed)), form.experts


def inside(form):
    ids, experts = ids_of(form)
    return (ids >= 0) & (ids < experts)


def test_kinds_of_ids():
    wide = BlockForm(tokens=40, top_k=3, experts=6)
    ids, _ = ids_of(wide)
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert any(len(set(row)) < 3 for row in ids_of(wide.replace(ids="duplicates"))[0].tolist())
    assert inside(wide).all()
    assert not inside(wide.replace(ids="none")).any()
    assert set(ids_of(wide.replace(ids="one"))[0].flatten().tolist()) == {3}
    assert set(ids_of(wide.replace(ids="sparse"))[0].flatten().tolist()) == {0, 2, 4}
    sentinels, experts = ids_of(wide.replace(ids="sentinels"))
    outside = set(sentinels[~inside(wide.replace(ids="sentinels"))].tolist())
    assert outside == {-1, experts, 2**31 - 1, -(2**31)}


@pytest.mark.parametrize("name", ["sentinels"])
def test_forms_with_sentinels_have_both_kinds_of_slots(name):
    for form in (FORMS[name], WIDE_FORMS[name]):
        assert 0 < inside(form).sum() < inside(form).numel()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_same_form_gives_the_same_values(form):
    first, second = make_block(form), make_block(form)
    assert all(torch.equal(first.floats()[name], tensor) for name, tensor in second.floats().items())
    assert torch.equal(first.ids_TK, second.ids_TK)


def test_storage_and_values_of_transposed_weights():
    plain, transposed = make_block(FORMS["plain"]), make_block(FORMS["transposed"])
    assert torch.equal(plain.w13_EJH, transposed.w13_EJH)
    assert plain.w13_EJH.is_contiguous()
    assert transposed.w13_EJH.mT.is_contiguous()
    assert transposed.w2_EHI.mT.is_contiguous()
    assert make_block(FORMS["transposed"]).leaves().w2_EHI.mT.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_exact_in_the_dtype(dtype):
    block = make_block(BlockForm(dtype=dtype))
    assert block.weights_TK.dtype == torch.float32
    assert torch.equal(block.weights_TK.to(dtype).float(), block.weights_TK)


def test_slots_are_sorted_stably():
    slots = sort_slots(torch.tensor([[2, 0], [7, 0], [-1, 2]]), 3)
    assert slots.order_N.tolist() == [1, 3, 0, 5, 2, 4]
    assert slots.token_N.tolist() == [0, 1, 0, 2, 1, 2]
    assert slots.offsets_E1.tolist() == [0, 2, 2, 4]
    assert slots.valid == 4
    assert {t.dtype for t in (slots.order_N, slots.token_N, slots.offsets_E1)} == {torch.int32}


def test_forms_cover_the_strategies():
    assert {form.ids for form in FORMS.values()} == set(IDS)
    assert {"relu2", "gelu", "geglu", "geglu_tanh", "swiglu", "swiglu_oai"} <= set(ACTS)


@pytest.mark.parametrize("op", ALL_OPS, ids=lambda op: op._schema.name)
def test_samples_fit_the_schema_and_are_not_all_alike(op):
    shapes = set()
    for make in SAMPLES[op._schema.name.removeprefix("diffulex::")].values():
        args = make(torch.device("cpu"))
        assert len(args) <= len(op._schema.arguments)
        shapes.add(tuple(args[0].shape))
    assert any(0 in shape for shape in shapes), "a sample without tokens"
    assert len(shapes) > 1
