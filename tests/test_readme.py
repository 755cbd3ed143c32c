"""What the README shows is what happens."""

import functools
import re
from pathlib import Path

import pytest
import torch
from torch import distributed
from transformers import AutoConfig

import diffulex

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def example(part):
    """The one Python example with `part` in it."""
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if part in block]
    return found


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_the_stock_model_is_compiled_without_diffulex(monkeypatch):
    seen = []

    def backend(graph, _inputs):
        seen.append(diffulex.is_enabled())
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    given = {"torch": torch, "diffulex": diffulex, "model": torch.nn.Linear(2, 2), "inputs": (torch.ones(1, 2),)}
    exec(example("diffulex.disabled()"), given)
    given["stock"](*given["inputs"])  # outside the block it is a model like any other
    assert seen == [False, True]


def test_the_model_is_compiled_for_each_mode():
    seen = []

    def backend(graph, _inputs):
        seen.append(diffulex.is_batch_invariant())
        return graph.forward

    given = {"diffulex": diffulex, "model": torch.compile(torch.nn.Linear(2, 2), backend=backend)}
    given["inputs"] = (torch.ones(1, 2),)
    for _ in range(2):
        exec(example("diffulex.batch_invariant()"), given)
        given["model"](*given["inputs"])
    assert seen == [True, False]


@pytest.fixture
def one_rank(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("part", ["build_mlp_or_moe", "init_device_mesh"])
def test_layers_are_built_and_loaded(part, one_rank, monkeypatch):
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=8, moe_intermediate_size=4, num_experts=4, num_experts_per_tok=2
    )
    loaded = []
    monkeypatch.setattr(
        "diffulex.checkpoint.load_checkpoint", lambda blocks, folder, *, model_type: loaded.append((blocks, model_type))
    )
    hidden = torch.zeros(1, 3, 8)
    given = {"config": config, "layer_idx": 0, "dense_mlp": None, "hidden_states": hidden, "folder": "folder"}
    given |= {"num_ranks": 1}
    exec(example(part), given)
    assert given["hidden_states"].shape == hidden.shape and given["router_logits"].shape == (3, 4)
    assert loaded == [({0: given["layer"]}, "qwen3_moe")]
    assert part == "init_device_mesh" or given["get_num_experts"](config) == 4
