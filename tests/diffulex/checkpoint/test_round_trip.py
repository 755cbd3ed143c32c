"""Checkpoints that transformers wrote, in both forms, through the parameters of blocks and back, bitwise."""

from __future__ import annotations

import pytest
import torch

from diffulex.checkpoint import LoadOptions, SaveOptions, load_checkpoint, save_checkpoint, scheme_of
from tests.support.checkpoints import (
    BY_FAMILY,
    CASES,
    EXPERTS,
    assert_same,
    block_truth,
    empty_blocks,
    stored,
    tiny_model,
)


def _prefix(case, model, folder):
    """Where the layers of a checkpoint are; not always where the model has them."""
    return next(name.partition(".0.")[0] + "." for name in sorted(stored(folder)) if ".0." in name)


@pytest.mark.parametrize("original", [False, True], ids=["v5", "v4"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_a_checkpoint_of_transformers_loads_and_is_written_back(case, original, tmp_path):
    """`save_original_format` is transformers' word for v4 names: both files come from transformers itself."""
    model = tiny_model(case)
    truth = block_truth(case, model)
    model.save_pretrained(tmp_path / "theirs", save_original_format=original)
    theirs = stored(tmp_path / "theirs")
    blocks = empty_blocks(case, truth)

    rest = load_checkpoint(blocks, tmp_path / "theirs", model_type=case.family)

    assert_same(blocks, truth)
    form = "v4" if original and "v4" in scheme_of(case.family).forms else "v5"
    options = SaveOptions(
        form=form,
        prefix=_prefix(case, model, tmp_path / "theirs"),
        rest={name: theirs[name] for name in rest},
        max_shard_size="8KB",
    )
    save_checkpoint(blocks, tmp_path / "ours", model_type=case.family, options=options)
    ours = stored(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("form", ["v5", "v4"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "jamba", "phimoe"])
def test_transformers_loads_what_was_saved(family, form, tmp_path):
    case = BY_FAMILY[family]
    if form not in scheme_of(family).forms:
        pytest.skip("the family has one form")
    model = tiny_model(case)
    model.save_pretrained(tmp_path / "theirs")
    theirs = stored(tmp_path / "theirs")
    blocks = empty_blocks(case, block_truth(case, model))
    rest = load_checkpoint(blocks, tmp_path / "theirs", model_type=family)
    others = {name: theirs[name] for name in rest}
    options = SaveOptions(form=form, rest=others, max_shard_size="8KB")
    save_checkpoint(blocks, tmp_path / "ours", model_type=family, options=options)
    model.config.save_pretrained(tmp_path / "ours")

    again, info = type(model).from_pretrained(tmp_path / "ours", dtype=torch.bfloat16, output_loading_info=True)

    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("owned", [range(2, 4), lambda expert: expert % 3 == 1, (5, 0)], ids=["range", "every", "pick"])
@pytest.mark.parametrize("form", ["v5", "v4"])
@pytest.mark.parametrize("family", ["mixtral", "dbrx", "gpt_oss", "nemotron_h"])
def test_a_rank_gets_its_experts(family, form, owned, tmp_path):
    case = BY_FAMILY[family]
    model = tiny_model(case)
    truth = block_truth(case, model)
    model.save_pretrained(tmp_path, save_original_format=form == "v4")
    mine = [e for e in range(EXPERTS) if owned(e)] if callable(owned) else list(owned)
    for params in truth.values():
        for name in ("w13", "w2", "b13", "b2"):
            if name in params:
                params[name] = params[name][mine].clone()
    blocks = empty_blocks(case, truth, num_experts=EXPERTS)
    everything = empty_blocks(case, block_truth(case, model))

    rest = load_checkpoint(blocks, tmp_path, model_type=family, options=LoadOptions(owned=owned))

    assert_same(blocks, truth)
    assert rest == load_checkpoint(everything, tmp_path, model_type=family)
