"""Cases by name and from a model's config.json."""

import json

import pytest
from transformers import AutoConfig

from diffulex.benching.shapes import CPU_SHAPES, MORE_SHAPES, SHAPES, Shape, case_of_config, case_of_shape
from lowering.errors import MoEConfigError, MoEOptionError


def written(folder, model_type, **fields):
    folder.mkdir()
    config = AutoConfig.for_model(model_type, **fields)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return folder


@pytest.mark.parametrize("name", [*SHAPES, *MORE_SHAPES, *CPU_SHAPES])
def test_a_shape_by_name(name):
    case = case_of_shape(name)
    assert (case.spec.num_experts, case.spec.hidden_size) == (case.shape.num_experts, case.shape.hidden)
    assert case.spec.intermediate_size == case.shape.intermediate
    assert case.name == name and case.spec.act == "silu(g) * u" and not case.spec.bias


def test_a_config_given_as_its_folder_or_as_the_file(tmp_path):
    sizes = {"num_experts": 16, "num_experts_per_tok": 4, "hidden_size": 32, "moe_intermediate_size": 24}
    folder = written(tmp_path / "Some-Model", "qwen3_moe", **sizes)
    for path in (folder, folder / "config.json"):
        case = case_of_config(path)
        assert case.name == "Some-Model" and case.shape == Shape(16, 4, 32, 24)
    (folder / "config.json").rename(folder / "other.json")
    assert case_of_config(folder / "other.json").name == "other"


def test_the_form_of_the_experts_is_read_too(tmp_path):
    spec = case_of_config(written(tmp_path / "oss", "gpt_oss")).spec
    assert spec.bias and spec.interleaved and spec.transposed and "1.702" in spec.act


def test_a_model_that_transformers_does_not_know(tmp_path):
    fields = {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 16, "moe_intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such", "hidden_act": "silu", **fields}))
    assert case_of_config(tmp_path).shape == Shape(8, 2, 16, 8)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, MoEOptionError, "a config.json or the folder that holds one"),
        ("{", MoEConfigError, "expected JSON"),
        ("[]", MoEConfigError, "expected a JSON object, got list"),
        ('{"model_type": "llama", "hidden_size": 8}', MoEConfigError, "the number of experts"),
    ],
)
def test_a_config_that_cannot_be_read(content, kind, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(kind, match=message):
        case_of_config(tmp_path)
