"""What `save_checkpoint` writes beside the blocks, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from diffulex.checkpoint import Block, LoadOptions, MoECheckpointError, SaveOptions, load_checkpoint, save_checkpoint
from lowering.errors import MoEDeviceError, MoEOptionError, MoEUnsupportedError
from tests.support.catalogue import raises_catalogue

EXPERTS, WIDTH, HIDDEN = 3, 2, 4


def block(**options):
    sizes = {"gate.weight": (EXPERTS, HIDDEN), "w13": (EXPERTS, 2 * WIDTH, HIDDEN), "w2": (EXPERTS, HIDDEN, WIDTH)}
    return Block({name: torch.randn(size) for name, size in sizes.items()}, **options)


def test_names_of_both_forms(tmp_path):
    blocks = {3: block()}
    rest = {"lm_head.weight": torch.ones(2)}
    save_checkpoint(blocks, tmp_path / "v5", model_type="mixtral", options=SaveOptions(rest=rest))
    assert load_file(tmp_path / "v5" / "model.safetensors").keys() == {
        "lm_head.weight",
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.mlp.experts.gate_up_proj",
        "model.layers.3.mlp.experts.down_proj",
    }
    save_checkpoint(blocks, tmp_path / "v4", model_type="mixtral", options=SaveOptions(form="v4", prefix="layers."))
    found = load_file(tmp_path / "v4" / "model.safetensors")
    assert found.keys() == {
        "layers.3.block_sparse_moe.gate.weight",
        *(f"layers.3.block_sparse_moe.experts.{e}.w{i}.weight" for e in range(EXPERTS) for i in (1, 2, 3)),
    }
    w13 = blocks[3].params["w13"]
    assert torch.equal(found["layers.3.block_sparse_moe.experts.1.w3.weight"], w13[1, WIDTH:])


def test_alternating_rows_are_put_in_order(tmp_path):
    blocks = {0: block(interleaved=True)}
    save_checkpoint(blocks, tmp_path, model_type="mixtral")
    found = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"]
    w13 = blocks[0].params["w13"]
    assert torch.equal(found, torch.cat([w13[:, 0::2], w13[:, 1::2]], dim=1))


def test_null_experts_are_written_as_zeros_and_read_past(tmp_path):
    """LongCat's fused tensor has rows for them too; the checkpoints with one tensor per expert do not."""
    nulls = 2
    params = dict(block().params)
    params["gate.weight"] = torch.randn(EXPERTS + nulls, HIDDEN)
    save_checkpoint({0: Block(params)}, tmp_path, model_type="longcat_flash")
    found = load_file(tmp_path / "model.safetensors")
    assert found["model.layers.0.mlp.experts.gate_up_proj"].shape == (EXPERTS + nulls, 2 * WIDTH, HIDDEN)
    assert not found["model.layers.0.mlp.experts.gate_up_proj"][EXPERTS:].any()
    assert found["model.layers.0.mlp.experts.down_proj"].shape == (EXPERTS, HIDDEN, WIDTH)
    again = Block({name: torch.zeros_like(tensor) for name, tensor in params.items()})
    load_checkpoint({0: again}, tmp_path, model_type="longcat_flash")
    assert all(torch.equal(again.params[name], tensor) for name, tensor in params.items())


@pytest.mark.parametrize("form", ["v5", "v4"])
def test_shared_experts_one_by_one(form, tmp_path):
    """Inkling: each has a tensor of its own in the file, in the block they are one wide MLP."""
    count, width = 3, 2
    params = dict(block().params)
    params["gate.weight"] = torch.randn(EXPERTS + count, HIDDEN)
    params["router.global_scale"] = torch.randn(1)
    gates, ups = torch.randn(2 * count, width, HIDDEN).split(count)
    downs = torch.randn(count, HIDDEN, width)
    params["shared_experts.gate_up_proj.weight"] = torch.cat([*gates, *ups])
    params["shared_experts.down_proj.weight"] = torch.cat([*downs], dim=1)
    blocks = {0: Block(params, num_shared=count)}
    save_checkpoint(blocks, tmp_path, model_type="inkling_text", options=SaveOptions(form=form))
    found = load_file(tmp_path / "model.safetensors")
    at = "model.layers.0.mlp.shared_experts."
    if form == "v5":
        assert torch.equal(found[at + "gate_proj"], gates) and torch.equal(found[at + "up_proj"], ups)
        assert torch.equal(found[at + "down_proj"], downs)
    else:
        both = found[at + "shared_w13_weight"]
        assert torch.equal(both[:, 0::2], gates) and torch.equal(both[:, 1::2], ups)
        assert torch.equal(found[at + "shared_w2_weight"], downs)
        w13 = found["model.layers.0.mlp.experts.w13_weight"]
        assert torch.equal(w13[:, 0::2], params["w13"][:, :WIDTH])
    again = Block({name: torch.zeros_like(tensor) for name, tensor in params.items()}, num_shared=count)
    load_checkpoint({0: again}, tmp_path, model_type="inkling_text")
    assert all(torch.equal(again.params[name], tensor) for name, tensor in params.items())


def test_many_shards_load_again(tmp_path):
    blocks = {layer: block() for layer in range(3)}
    options = SaveOptions(form="v4", max_shard_size="200B")
    save_checkpoint(blocks, tmp_path, model_type="qwen3_moe", options=options)
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) == 3 * (1 + 9)
    again = {layer: block() for layer in range(3)}
    load_checkpoint(again, tmp_path, model_type="qwen3_moe", options=LoadOptions(form="v4"))
    for layer, one in blocks.items():
        assert all(torch.equal(again[layer].params[name], tensor) for name, tensor in one.params.items())


def test_a_model_without_experts(tmp_path):
    params = {"gate.weight": torch.zeros(0, 4), "w13": torch.zeros(0, 4, 4), "w2": torch.zeros(0, 4, 2)}
    save_checkpoint({0: Block(params)}, tmp_path, model_type="mixtral")
    load_checkpoint({0: Block(params)}, tmp_path, model_type="mixtral")


def test_a_form_the_model_type_does_not_have(tmp_path):
    with raises_catalogue(MoEOptionError, expected="a form of v5", got="'v4'"):
        save_checkpoint({0: block()}, tmp_path, model_type="gpt_oss", options=SaveOptions(form="v4"))


def test_a_rank_alone_cannot_save(tmp_path):
    part = block(num_experts=8, owned=(0, 1, 2))
    with raises_catalogue(MoEUnsupportedError, expected="all 8 experts", got="[0, 1, 2]"):
        save_checkpoint({0: part}, tmp_path, model_type="mixtral")
    with raises_catalogue(MoEUnsupportedError, expected="all 3 experts, in order", got="[2, 1, 0]"):
        save_checkpoint({0: block(owned=(2, 1, 0))}, tmp_path, model_type="mixtral")


def test_a_rest_that_is_not_one(tmp_path):
    rest = {"model.layers.0.mlp.gate.weight": torch.zeros(1)}
    with raises_catalogue(MoECheckpointError, expected="a rest without", got="model.layers.0.mlp.gate.weight"):
        save_checkpoint({0: block()}, tmp_path, model_type="mixtral", options=SaveOptions(rest=rest))
    assert not [*tmp_path.iterdir()]


def test_weights_that_are_not_there(tmp_path):
    nothing = Block({name: tensor.to("meta") for name, tensor in block().params.items()})
    with raises_catalogue(MoEDeviceError, got="meta tensors"):
        save_checkpoint({0: nothing}, tmp_path, model_type="mixtral")
