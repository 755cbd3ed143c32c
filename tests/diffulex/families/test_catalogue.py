"""The catalogue of families against transformers' source: nothing is missing, and everything can be built."""

import re
from pathlib import Path

import pytest
import torch
import transformers

import diffulex
from diffulex.explanation import find_experts
from diffulex.families import FAMILIES
from diffulex.families.build import build_model, inputs_of, is_installed, options_of, output_of
from diffulex.families.catalogue import VOCABULARY

MODELS = Path(transformers.__file__).parent / "models"
# experts of transformers' interface, and those outside it
EXPERTS = re.compile(r"^@use_experts_implementation|^class \w*(Experts|NaiveMoe|CDMoE)\(nn\.", re.MULTILINE)
FIELD = re.compile(r"^    (num_experts|num_local_experts|n_routed_experts|moe_num_experts)\b.*=", re.MULTILINE)
BUILT = ("jetmoe", "ernie4_5_vl_moe", "nemotron_h", "switch_transformers", "vitpose_backbone", "openai_privacy_filter")


def folders(pattern: str, text: re.Pattern) -> set[str]:
    return {path.parent.name for path in MODELS.glob(pattern) if text.search(path.read_text(encoding="utf-8"))}


def installed() -> set[str]:
    return {family.name for family in FAMILIES if is_installed(family)}


def test_every_family_with_experts_is_in_the_catalogue():
    assert folders("*/modeling_*.py", EXPERTS) == installed()
    assert folders("*/configuration_*.py", FIELD) <= installed()


def test_every_family_has_one_row_for_each_part():
    assert len({str(family) for family in FAMILIES}) == len(FAMILIES)
    assert [str(family) for family in FAMILIES] == sorted(str(family) for family in FAMILIES)
    assert len({family.name for family in FAMILIES if not family.newer}) == 64
    missing = {family.name for family in FAMILIES if not is_installed(family)}
    assert missing <= {family.name for family in FAMILIES if family.newer}


@pytest.mark.parametrize("name", BUILT)
def test_a_family_is_built_tiny_and_runs(name):
    (family,) = [family for family in FAMILIES if family.name == name]
    model = build_model(family)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    layers = find_experts(model) if not family.adapt else diffulex.adapt(model).layers
    assert len(layers) == family.layers
    with torch.no_grad():
        out = output_of(model(**inputs_of(family, model, count=5)))
    assert out.isfinite().all()
    assert out.std() > 0


def test_options_of_a_model_type_are_those_of_its_family():
    gemma = transformers.AutoConfig.for_model("gemma4_text")
    assert options_of("gemma4_text", gemma)["enable_moe_block"]
    llama = options_of("llama", transformers.AutoConfig.for_model("llama"))
    assert llama["vocab_size"] == VOCABULARY and "num_experts" not in llama


def test_weights_and_inputs_are_the_same_each_time():
    family = next(family for family in FAMILIES if family.name == "mixtral")
    one, other = build_model(family), build_model(family)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    first, second = (inputs_of(family, one, count=9)["input_ids"] for _ in range(2))
    assert torch.equal(first, second) and first.shape == (1, 9)
