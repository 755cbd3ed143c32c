"""Blocks of real layers: what is read off a layer, and that a loaded layer computes what the model's block computes."""

from __future__ import annotations

import pytest
import torch

from diffulex.checkpoint import Block, LoadOptions, SaveOptions, block_of, load_checkpoint, save_checkpoint
from diffulex.checkpoint.block import stored_tensors
from diffulex.checkpoint.schemes import scheme_of
from diffulex.moe import MoESpec, NaiveFusedMoE, SharedExpertSpec, build_moe_block
from lowering.errors import MoEConfigError
from lowering.spec import ExpertSpec, RoutingSpec
from tests.support.catalogue import raises_catalogue
from tests.support.checkpoints import BY_FAMILY, CASES, EXPERTS, HIDDEN, WIDTH, tiny_model


def experts(act="silu(g) * u", width=WIDTH, **changes):
    return ExpertSpec(EXPERTS, changes.pop("hidden", HIDDEN), width, act, **changes)


# Written by hand: a layer that was read off the config could share a mistake with the checkpoint's names.
SPECS = {
    "mixtral": MoESpec(HIDDEN, RoutingSpec(2), experts()),
    "qwen2_moe": MoESpec(HIDDEN, RoutingSpec(2, renorm=0.0), experts(), SharedExpertSpec(1, 8, "sigmoid")),
    "deepseek_v3": MoESpec(
        HIDDEN,
        RoutingSpec(2, "sigmoid", n_group=2, topk_group=1, eps=1e-20, scale=2.5, select_bias=True),
        experts(),
        SharedExpertSpec(2, WIDTH),
    ),
    "gpt_oss": MoESpec(
        HIDDEN, RoutingSpec(2, logits_bias=True), experts("swiglu_oai", bias=True, interleaved=True, transposed=True)
    ),
    "granitemoeshared": MoESpec(HIDDEN, RoutingSpec(2), experts(), SharedExpertSpec(1, 8)),
    "dbrx": MoESpec(HIDDEN, RoutingSpec(2), experts()),
    "llama4_text": MoESpec(
        HIDDEN, RoutingSpec(2, "sigmoid", renorm=0.0, apply_weight_on="input"), experts(), SharedExpertSpec(1, WIDTH)
    ),
    "jamba": MoESpec(HIDDEN, RoutingSpec(2, renorm=0.0), experts()),
    "nemotron_h": MoESpec(
        HIDDEN,
        RoutingSpec(2, "sigmoid", n_group=2, topk_group=1, eps=1e-20, select_bias=True),
        experts("square(relu(g))", hidden=10, gated=False, latent_size=10),
        SharedExpertSpec(1, 8),
    ),
    "gemma4_text": MoESpec(
        HIDDEN,
        RoutingSpec(2, per_expert_scale=True, input_norm_eps=1e-6),
        experts("gelu_tanh(g) * u"),
    ),
}
# An error of a layout is of the size of the result; routers of the models round to fp32 in between.
SAME = 1e-4


def _theirs(case, layer, hidden_TH):
    """What the model's block returns for hidden [T, H], beside it the shared MLP where that is the decoder layer's."""
    if case.family == "gemma4_text":
        _, weights_TK, ids_TK = layer.router(hidden_TH)
        return layer.experts(hidden_TH, ids_TK, weights_TK)
    path = case.all_paths["gate.weight"][0].split(".")[0]
    out = layer.get_submodule(path)(hidden_TH.unsqueeze(0))
    out_TH = (out[0] if isinstance(out, tuple) else out).reshape(hidden_TH.shape)
    return out_TH + layer.shared_mlp(hidden_TH) if hasattr(layer, "shared_mlp") else out_TH


def _saved_model(case, folder, *, original):
    """The model in fp64, saved; its own loop over experts, as grouped products have no fp64."""
    model = tiny_model(case, dtype=torch.float64).eval()
    model.set_experts_implementation("eager")
    model.save_pretrained(folder, save_original_format=original)
    return model


def _assert_same_results(case, model, layer):
    hidden_TH = torch.randn(9, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected_TH = _theirs(case, model.get_submodule(case.layers)[1], hidden_TH)
    found_TH, _ = layer(hidden_TH)
    assert expected_TH.norm() > 0
    assert (found_TH - expected_TH).norm() <= SAME * expected_TH.norm()


@pytest.mark.parametrize("original", [False, True], ids=["v5", "v4"])
@pytest.mark.parametrize("family", SPECS)
@torch.no_grad()
def test_a_loaded_layer_computes_what_the_models_block_does(family, original, tmp_path):
    case = BY_FAMILY[family]
    model = _saved_model(case, tmp_path, original=original)
    layer = NaiveFusedMoE(SPECS[family], dtype=torch.float64)
    load_checkpoint({1: layer}, tmp_path, model_type=family)
    _assert_same_results(case, model, layer)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
@torch.no_grad()
def test_config_and_checkpoint_make_a_layer_for_every_family(case, tmp_path):
    """Nothing by hand: the layer from the config, the weights from the file in its original format."""
    model = _saved_model(case, tmp_path, original=True)
    if case.family == "phimoe":
        with raises_catalogue(MoEConfigError, got="sparsemixer"):
            build_moe_block("naive", model.config, 1)
        return
    layer = build_moe_block("naive", model.config, 1, dtype=torch.float64)
    load_checkpoint({1: layer}, tmp_path, model_type=model.config.model_type)
    _assert_same_results(case, model, layer)


@pytest.mark.parametrize("form", ["v5", "v4"])
@pytest.mark.parametrize("family", SPECS)
def test_layers_are_saved_and_loaded_again(family, form, tmp_path):
    """Bitwise, the fp32 bias of a bf16 layer among them."""
    if form not in scheme_of(family).forms:
        pytest.skip("the family has one form")
    layers = {index: NaiveFusedMoE(SPECS[family], dtype=torch.bfloat16) for index in range(2)}
    for layer in layers.values():
        if layer.router.correction_bias is not None:
            layer.router.correction_bias.copy_(torch.randn(EXPERTS))
    save_checkpoint(layers, tmp_path, model_type=family, options=SaveOptions(form=form))
    again = {index: NaiveFusedMoE(SPECS[family], dtype=torch.bfloat16) for index in range(2)}
    assert load_checkpoint(again, tmp_path, model_type=family) == []
    for index, layer in layers.items():
        found = again[index].state_dict()
        assert found.keys() == layer.state_dict().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in layer.state_dict().items())


def test_parameters_stay_parameters(tmp_path):
    """Loading writes in place: optimizers and tied references keep what they hold, and no gradient is recorded."""
    layer = NaiveFusedMoE(SPECS["mixtral"])
    held = dict(layer.named_parameters())
    save_checkpoint({0: NaiveFusedMoE(SPECS["mixtral"])}, tmp_path, model_type="mixtral")
    load_checkpoint({0: layer}, tmp_path, model_type="mixtral")
    for name, parameter in layer.named_parameters():
        assert parameter is held[name] and parameter.requires_grad and parameter.grad_fn is None


def test_a_compiled_layer_is_the_layer_in_it():
    layer = NaiveFusedMoE(SPECS["mixtral"])
    assert block_of(torch.compile(layer)).params.keys() == block_of(layer).params.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["v5", "v4"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "nemotron_h"])
def test_layers_on_a_card(family, form, tmp_path):
    """Both ways, bitwise: the files do not know where the layers were."""
    if form not in scheme_of(family).forms:
        pytest.skip("the family has one form")
    layer, again = (NaiveFusedMoE(SPECS[family], device=device, dtype=torch.bfloat16) for device in ("cpu", "cuda"))
    save_checkpoint({0: layer}, tmp_path / "cpu", model_type=family, options=SaveOptions(form=form))
    load_checkpoint({0: again}, tmp_path / "cpu", model_type=family)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(again.state_dict()[name].cpu(), tensor), name
    save_checkpoint({0: again}, tmp_path / "cuda", model_type=family, options=SaveOptions(form=form))
    files = [(tmp_path / device / "model.safetensors").read_bytes() for device in ("cpu", "cuda")]
    assert files[0] == files[1]


def test_facts_of_a_layer():
    block = block_of(NaiveFusedMoE(SPECS["gpt_oss"]))
    assert block.interleaved and block.total == EXPERTS and block.experts == tuple(range(EXPERTS))
    assert {*block.params} == {"gate.weight", "gate.bias", "w13", "w2", "b13", "b2"}
    assert block_of(NaiveFusedMoE(SPECS["deepseek_v3"])).num_shared == 2


def test_owned_experts_by_number_and_by_predicate():
    block = Block({"w2": torch.zeros(3, 2, 2)}, num_experts=6)
    assert block_of(block, owned=range(3, 6)).experts == (3, 4, 5)
    assert block_of(block, owned=lambda e: e % 2 == 1).experts == (1, 3, 5)
    assert block_of(block_of(block, owned=[4])).experts == (4,)


def test_a_layer_of_one_rank(tmp_path):
    """The layer has rows for its experts alone; the router is that of all."""
    whole = NaiveFusedMoE(SPECS["deepseek_v3"])
    save_checkpoint({0: whole}, tmp_path, model_type="deepseek_v3", options=SaveOptions(form="v4"))
    part = NaiveFusedMoE(SPECS["deepseek_v3"])
    for name in ("w13", "w2"):
        setattr(part, name, torch.nn.Parameter(torch.zeros_like(getattr(part, name)[:2])))
    load_checkpoint({0: part}, tmp_path, model_type="deepseek_v3", options=LoadOptions(owned=range(2, 4)))
    assert torch.equal(part.w13, whole.w13[2:4]) and torch.equal(part.w2, whole.w2[2:4])
    assert torch.equal(part.gate.weight, whole.gate.weight)


def test_every_part_of_a_tensor_is_described_once():
    """Parts are what is written one after the other, so they cover a tensor from its first row to its last."""
    for family, spec in SPECS.items():
        block = block_of(NaiveFusedMoE(spec))
        for rules in scheme_of(family).forms.values():
            for tensor in stored_tensors(block, rules, prefix="layers.0."):
                ends = [0, *(part.stop for part in tensor.parts)]
                assert [part.start for part in tensor.parts] == ends[:-1] and ends[-1] == tensor.shape[0], tensor.key
