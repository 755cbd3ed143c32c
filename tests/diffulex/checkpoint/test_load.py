"""What `load_checkpoint` finds, converts, leaves alone and refuses; nothing is written unless everything fits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from diffulex.checkpoint import Block, LoadOptions, MoECheckpointError, load_checkpoint
from diffulex.checkpoint.reader import CheckpointReader
from lowering.errors import MoEDeviceError, MoEOptionError, MoERangeError
from tests.support.catalogue import raises_catalogue

EXPERTS, WIDTH, HIDDEN, LAYERS = 3, 4, 6, 2


def weights(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"gate.weight": (EXPERTS, HIDDEN), "w13": (EXPERTS, 2 * WIDTH, HIDDEN), "w2": (EXPERTS, HIDDEN, WIDTH)}
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}


TRUTH = {layer: weights(layer) for layer in range(LAYERS)}


def v4(prefix="model.layers."):
    """The truth under Mixtral's v4 names, written by hand."""
    tensors = {"model.embed_tokens.weight": torch.ones(2, HIDDEN)}
    for layer, params in TRUTH.items():
        at = f"{prefix}{layer}.block_sparse_moe"
        tensors[f"{at}.gate.weight"] = params["gate.weight"]
        tensors[f"{prefix}{layer}.input_layernorm.weight"] = torch.ones(HIDDEN)
        for e in range(EXPERTS):
            tensors[f"{at}.experts.{e}.w1.weight"] = params["w13"][e, :WIDTH].contiguous()
            tensors[f"{at}.experts.{e}.w3.weight"] = params["w13"][e, WIDTH:].contiguous()
            tensors[f"{at}.experts.{e}.w2.weight"] = params["w2"][e].contiguous()
    return tensors


def v5():
    tensors = {}
    for layer, params in TRUTH.items():
        at = f"model.layers.{layer}.mlp"
        names = {"gate.weight": "gate.weight", "w13": "experts.gate_up_proj", "w2": "experts.down_proj"}
        tensors |= {f"{at}.{key}": params[name].clone() for name, key in names.items()}
    return tensors


def empty(dtype=torch.float32, **options):
    return {
        layer: Block({name: torch.full_like(t, 77.0, dtype=dtype) for name, t in params.items()}, **options)
        for layer, params in TRUTH.items()
    }


def write(folder, tensors):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(tmp_path, tensors, blocks=None, **options):
    blocks = empty() if blocks is None else blocks
    given = LoadOptions(**options)
    rest = load_checkpoint(blocks, write(tmp_path / "c", tensors), model_type="mixtral", options=given)
    for layer, block in blocks.items():
        for name, value in TRUTH[layer].items():
            assert torch.equal(block.params[name], value.to(block.params[name].dtype)), (layer, name)
    return rest


def refused(tmp_path, tensors, blocks=None, **options):
    """The error, after a look that nothing was written."""
    blocks = empty() if blocks is None else blocks
    with pytest.raises(MoECheckpointError) as caught:
        load_checkpoint(blocks, write(tmp_path / "c", tensors), model_type="mixtral", options=LoadOptions(**options))
    assert all((tensor == 77).all() for block in blocks.values() for tensor in block.params.values())
    assert str(caught.value).startswith("[MOE008] checkpoint")
    return caught.value


def test_the_names_of_other_tensors_come_back(tmp_path):
    norms = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(LAYERS)]
    assert load(tmp_path, v4()) == ["model.embed_tokens.weight", *norms]
    assert load(tmp_path, v5()) == []


def test_layers_that_were_not_asked_for_are_left_alone(tmp_path):
    rest = load(tmp_path, v4(), {1: empty()[1]})
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in rest
    assert not any(name.startswith("model.layers.1.block") for name in rest)
    assert len(load(tmp_path, v5(), {})) == 3 * LAYERS


def test_floats_are_converted(tmp_path):
    load(tmp_path, v4(), empty(torch.bfloat16))
    load(tmp_path, {name: tensor.double() for name, tensor in v5().items()})


def test_strides_of_the_parameters_do_not_matter(tmp_path):
    blocks = empty()
    for block in blocks.values():
        block.params["w13"] = block.params["w13"].mT.contiguous().mT
        block.params["w2"] = torch.stack([block.params["w2"]] * 2, dim=-1)[..., 1]
    load(tmp_path, v4(), blocks)


def test_a_block_that_alternates_gate_and_up_rows(tmp_path):
    blocks = empty(interleaved=True)
    load_checkpoint(blocks, write(tmp_path / "c", v4()), model_type="mixtral")
    assert torch.equal(blocks[0].params["w13"][:, 0::2], TRUTH[0]["w13"][:, :WIDTH])
    assert torch.equal(blocks[0].params["w13"][:, 1::2], TRUTH[0]["w13"][:, WIDTH:])


def test_shards_behind_an_index(tmp_path):
    tensors = v4()
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + i % 3:05d}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        blocks = empty()
        load_checkpoint(blocks, path, model_type="mixtral")
        assert torch.equal(blocks[1].params["w2"], TRUTH[1]["w2"])


@pytest.mark.parametrize("prefix", ["model.language_model.layers.", "layers.", ""])
def test_the_prefix_is_found(prefix, tmp_path):
    load(tmp_path, v4(prefix))


def test_two_models_in_one_checkpoint_need_a_prefix(tmp_path):
    both = v4("thinker.layers.") | {name: t.clone() for name, t in v4("talker.layers.").items()}
    error = refused(tmp_path, both)
    assert "talker.layers., thinker.layers." in str(error) and "prefix=" in str(error)
    load(tmp_path, both, prefix="talker.layers.")
    load(tmp_path, v4(""), prefix="")
    assert refused(tmp_path, v4(), prefix="").missing


def test_a_form_can_be_asked_for(tmp_path):
    load(tmp_path, v4(), form="v4")
    error = refused(tmp_path, v4(), form="v5")
    assert error.missing and error.unexpected
    with raises_catalogue(MoEOptionError, expected="v5, v4", got="'v3'"):
        load(tmp_path, v4(), form="v3")


def test_shapes_tell_forms_of_the_same_names_apart(tmp_path):
    """Qwen3-VL: the same two names, both tensors transposed; where one of them is square, the other is not."""
    width, hidden = 4, 8
    for turned in (False, True):
        w13, w2 = torch.randn(EXPERTS, 2 * width, hidden), torch.randn(EXPERTS, hidden, width)
        layout = (lambda t: t.mT.contiguous()) if turned else (lambda t: t)
        at = "model.layers.0.mlp"
        tensors = {f"{at}.experts.gate_up_proj": layout(w13), f"{at}.experts.down_proj": layout(w2)}
        tensors[f"{at}.gate.weight"] = torch.randn(EXPERTS, hidden)
        block = Block({"gate.weight": torch.zeros(EXPERTS, hidden), "w13": w13 * 0, "w2": w2 * 0})
        load_checkpoint({0: block}, write(tmp_path / "c", tensors), model_type="qwen3_vl_moe")
        assert torch.equal(block.params["w13"], w13) and torch.equal(block.params["w2"], w2)


def test_everything_wrong_is_in_one_error(tmp_path):
    tensors = v4()
    at = "model.layers.1.block_sparse_moe"
    del tensors[f"{at}.experts.2.w2.weight"], tensors[f"{at}.gate.weight"]
    tensors[f"{at}.experts.0.w1.weight"] = torch.zeros(WIDTH, HIDDEN + 1)
    tensors[f"{at}.experts.1.w3.weight"] = torch.zeros(WIDTH, HIDDEN, dtype=torch.int32)
    tensors[f"{at}.experts.3.w1.weight"] = torch.zeros(WIDTH, HIDDEN)
    tensors["model.layers.0.block_sparse_moe.experts.0.w1.bias"] = torch.zeros(WIDTH)
    error = refused(tmp_path, tensors)
    assert error.missing == (f"{at}.experts.2.w2.weight", f"{at}.gate.weight")
    assert error.unexpected == (
        "model.layers.0.block_sparse_moe.experts.0.w1.bias",
        f"{at}.experts.3.w1.weight",
    )
    assert {*error.misshapen} == {
        f"{at}.experts.0.w1.weight [4, 7] instead of [4, 6]",
        f"{at}.experts.1.w3.weight I32 instead of torch.float32",
    }
    for part in (*error.missing, *error.unexpected, *error.misshapen):
        assert part in str(error)


def test_many_names_are_told_once_a_kind(tmp_path):
    tensors = {name: tensor for name, tensor in v4().items() if "w2" not in name}
    error = refused(tmp_path, tensors)
    assert len(error.missing) == LAYERS * EXPERTS
    assert "6 missing: model.layers.0.block_sparse_moe.experts.0.w2.weight (and 5 like it)" in str(error)


def test_a_quantised_checkpoint_is_named_as_such(tmp_path):
    extra = {"model.layers.0.block_sparse_moe.experts.0.w1.weight_scale_inv": torch.ones(1)}
    assert "quantised" in str(refused(tmp_path, v4() | extra))
    eight = {n: t.to(torch.float8_e4m3fn) if "experts" in n else t for n, t in v4().items()}
    assert "F8_E4M3 instead of torch.float32" in str(refused(tmp_path, eight))


def test_fused_tensors_of_another_number_of_experts(tmp_path):
    tensors = v5()
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(EXPERTS + 1, HIDDEN, WIDTH)
    assert refused(tmp_path, tensors).misshapen == (
        "model.layers.0.mlp.experts.down_proj [4, 6, 4] instead of [3, 6, 4]",
    )


def test_a_checkpoint_of_another_model(tmp_path):
    error = refused(tmp_path, {"transformer.h.0.mlp.c_fc.weight": torch.zeros(2, 2)})
    assert len(error.missing) == 3 * LAYERS
    assert "The checkpoint has transformer.h.0.mlp.c_fc.weight; check the model type." in str(error)


def test_a_parameter_without_a_name(tmp_path):
    blocks = empty()
    blocks[0].params["b13"] = torch.full((EXPERTS, 2 * WIDTH), 77.0)
    assert "b13" in str(refused(tmp_path, v4(), blocks))


def test_a_layer_that_has_no_memory_yet(tmp_path):
    blocks = {0: Block({name: tensor.to("meta") for name, tensor in TRUTH[0].items()})}
    with raises_catalogue(MoEDeviceError, got="gate.weight, w13, w2"):
        load_checkpoint(blocks, write(tmp_path / "c", v4()), model_type="mixtral")


def test_no_block_at_all(tmp_path):
    with raises_catalogue(MoECheckpointError, expected="w2 [E, H, I]", got="gate.weight"):
        load_checkpoint({0: Block({"gate.weight": torch.zeros(2, 2)})}, tmp_path, model_type="mixtral")


@pytest.mark.parametrize("owned", [(0, 1), (0, 1, 1), (0, 1, 3), (-1, 0, 1)])
def test_rows_are_the_owned_experts(owned, tmp_path):
    with raises_catalogue(MoERangeError, expected="3 different experts of 3"):
        load_checkpoint(empty(), write(tmp_path / "c", v4()), model_type="mixtral", options=LoadOptions(owned=owned))


def _rank(owned):
    params = {name: torch.full_like(TRUTH[0][name][: len(owned)], 77.0) for name in ("w13", "w2")}
    gate = {"gate.weight": torch.full_like(TRUTH[0]["gate.weight"], 77.0)}
    return {0: Block(params | gate, num_experts=EXPERTS, owned=owned)}


@pytest.mark.parametrize("tensors", [v4(), v5()], ids=["v4", "v5"])
def test_a_rank_reads_its_experts_alone(tensors, tmp_path, monkeypatch):
    """Bytes that are read: those of the rank's parameters, whatever the form."""
    read = []
    original = CheckpointReader.read

    def counted(self, name, **rows):
        read.append(original(self, name, **rows))
        return read[-1]

    monkeypatch.setattr(CheckpointReader, "read", counted)
    blocks = _rank((2,))
    load_checkpoint(blocks, write(tmp_path / "c", tensors), model_type="mixtral")
    assert torch.equal(blocks[0].params["w2"][0], TRUTH[0]["w2"][2])
    assert sum(rows.nbytes for rows in read) == sum(t.nbytes for t in blocks[0].params.values())


def test_a_rank_opens_no_file_of_other_ranks(tmp_path):
    """The shards of other experts need not even be readable."""
    tensors = v4()
    mine = {name: t for name, t in tensors.items() if "experts" not in name or ".experts.1." in name}
    save_file(mine, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"never read")
    weight_map = {name: "a.safetensors" if name in mine else "b.safetensors" for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    blocks = _rank((1,))
    load_checkpoint(blocks, tmp_path, model_type="mixtral")
    assert torch.equal(blocks[0].params["w13"][0], TRUTH[0]["w13"][1])


def test_the_rank_still_sees_what_belongs_to_nobody(tmp_path):
    extra = {"model.layers.0.block_sparse_moe.experts.7.w1.weight": torch.zeros(1)}
    with pytest.raises(MoECheckpointError) as caught:
        load_checkpoint(_rank((1,)), write(tmp_path / "c", v4() | extra), model_type="mixtral")
    assert caught.value.unexpected == (*extra,) and not caught.value.missing


DIFFUSION = {
    "llada2_moe": ("mlp.gate.expert_bias", "mlp.shared_experts"),
    "llada_moe": ("mlp.expert_bias", "shared_expert"),
    "sdar_moe": (None, None),
}


@pytest.mark.parametrize(("model_type", "names"), DIFFUSION.items(), ids=DIFFUSION)
def test_diffusion_models_that_transformers_has_no_class_for(model_type, names, tmp_path):
    """Their checkpoints name one linear layer per expert and projection."""
    bias, shared = names
    params = dict(weights(5))
    at = "model.layers.0"
    tensors = {f"{at}.mlp.gate.weight": params["gate.weight"]}
    for e in range(EXPERTS):
        gate, up = params["w13"][e].clone().chunk(2)
        expert = {"gate_proj": gate.clone(), "up_proj": up.clone(), "down_proj": params["w2"][e].clone()}
        tensors |= {f"{at}.mlp.experts.{e}.{name}.weight": tensor for name, tensor in expert.items()}
    if bias:
        params["router.correction_bias"] = tensors[f"{at}.{bias}"] = torch.randn(EXPERTS)
        gate, up, down = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN), torch.randn(HIDDEN, 3)
        mlp = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        tensors |= {f"{at}.{shared}.{name}.weight": tensor for name, tensor in mlp.items()}
        params["shared_experts.gate_up_proj.weight"] = torch.cat([gate, up])
        params["shared_experts.down_proj.weight"] = down
    block = Block({name: torch.full_like(tensor, 77.0) for name, tensor in params.items()})
    assert load_checkpoint({0: block}, write(tmp_path / "c", tensors), model_type=model_type) == []
    for name, tensor in params.items():
        assert torch.equal(block.params[name], tensor), name
