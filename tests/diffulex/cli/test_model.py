"""The demo's model: shapes, the round trip through safetensors, training."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffulex.cli import model as demo_model
from diffulex.cli import text
from diffulex.cli import train as train_module

CPU = torch.device("cpu")
SMALL = dataclasses.replace(demo_model.PRESETS["tiny"], hidden=32, width=16, head_dim=8, experts=4, rows=2, length=16)


@pytest.fixture
def model():
    return demo_model.build_model(demo_model.build_config(SMALL, 2), seed=0, device=CPU)


def test_the_large_preset_has_the_shapes_of_the_real_model():
    config = demo_model.build_config(demo_model.PRESETS["qwen3-30b-a3b"], 48)
    with torch.device("meta"):
        block = demo_model.moe_block(demo_model.build_model(config, seed=0, device=torch.device("meta")))
    assert block.experts.gate_up_proj.shape == (128, 2 * 768, 2048)
    assert block.experts.down_proj.shape == (128, 2048, 768)
    attention = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert (*attention, config.num_experts_per_tok, config.norm_topk_prob) == (32, 4, 128, 8, True)


def test_the_round_trip_keeps_every_tensor(model, tmp_path):
    loaded = demo_model.save_and_load(model, tmp_path)
    assert loaded.different == () and loaded.tensors == len(model.state_dict())
    assert loaded.bytes > 4 * sum(p.numel() for p in model.parameters())
    assert loaded.model is not model and (tmp_path / "model.safetensors").is_file()


def test_a_tensor_that_changes_on_the_way_is_named(model, tmp_path, monkeypatch):
    stock = type(model).from_pretrained.__func__

    def damaged(cls, *args, **kwargs):
        loaded = stock(cls, *args, **kwargs)
        nn.init.zeros_(loaded.lm_head.weight)
        return loaded

    monkeypatch.setattr(type(model), "from_pretrained", classmethod(damaged))
    assert demo_model.save_and_load(model, tmp_path).different == ("lm_head.weight",)


def test_training_learns_and_leaves_the_model_in_eval_mode(model, monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count(0, 0.1).__next__)  # a step takes 0.1 s on any machine
    monkeypatch.setattr(train_module, "time", clock)
    training = train_module.train(model, text.load_ids(), preset=SMALL, seconds=3, seed=0)
    assert training.steps == 30 and training.last_loss < training.first_loss - 0.5
    assert not model.training and "loss" in str(training)


def test_training_for_no_time_does_nothing(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert str(train_module.train(model, text.load_ids(), preset=SMALL, seconds=0, seed=0)) == "none"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
