"""The table of naming schemes: whole, unambiguous, and what the installed transformers calls its tensors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from diffulex.checkpoint.block import Block, stored_tensors
from diffulex.checkpoint.rules import EXPERT_PARAMETERS, FORMS, PARTS, Rule
from diffulex.checkpoint.schemes import SCHEMES, Scheme, scheme_of
from diffulex.moe.config._families import FAMILIES
from lowering.errors import MoEOptionError
from tests.support.catalogue import raises_catalogue
from tests.support.families import FamilyCase, build_config, build_meta_model, found_blocks, installed_cases

PARAMETERS = {
    *EXPERT_PARAMETERS,
    *("gate.weight", "gate.bias", "gate.input_scale"),
    *("router.correction_bias", "router.per_expert_scale", "router.global_scale"),
    *("latent_in.weight", "latent_out.weight", "out_bias"),
    *(f"shared_experts.{name}.weight" for name in ("gate_up_proj", "down_proj", "gate")),
}
FORM_ROWS = [(scheme, form) for scheme in SCHEMES for form in scheme.forms]
# Families without a row, and why.
WITHOUT = {
    "doge": "experts are rows of two embeddings",
    "ernie4_5_vl_moe_text": "two banks of experts in a layer",
    "muse_spark_text": "a norm on the output of each expert",
    "nllb-moe": "experts that drop tokens",
    "switch_transformers": "experts that drop tokens",
    "vitpose_backbone": "no router",
}
# What transformers writes back as the original format and no checkpoint on the hub has: a renaming that is right for
# loading catches too much when it is turned around.
NOT_REVERSIBLE = {
    "hy_v4": "`.linear_gate` -> `.gate_proj` is for attention, and turned around renames the shared experts",
    "longcat_flash": "the rows of null experts are written as experts of their own",
    "kimi_linear": "`.block_sparse_moe.` -> `.mlp.` turned around renames dense layers too",
}
# Model types whose names are converted where their wrapper is loaded.
WRAPPERS = {
    "deepseek_ocr2_text": "deepseek_ocr2",
    "glm4v_moe_text": "glm4v_moe",
    "inkling_text": "inkling_mm_model",
    "minimax_m3_vl_text": "minimax_m3_vl",
    "step3p5": "step3p7",
}
# A row they share with others has a v4 form, but transformers does not go back to it, in one version at least.
WRITTEN_AS_THEY_ARE = {
    "glm5_next_text",
    "granitemoe_swa",
    "mistral4",
    "qwen3_omni_moe_talker_text",
    "qwen3_omni_moe_text",
    "qwen3_vl_moe_text",
}


def _id(value: Any) -> str:
    return value.types[0] if isinstance(value, Scheme) else str(getattr(value, "model_type", value))


@pytest.mark.parametrize(("scheme", "form"), FORM_ROWS, ids=_id)
def test_every_form_names_every_row_of_a_parameter_once(scheme, form):
    rules = scheme.forms[form]
    keys = [rule.key for rule in rules]
    assert len({*keys}) == len(keys)
    assert {rule.param for rule in rules} - {""} <= PARAMETERS
    assert all({*rule.form.split()} <= {*FORMS} and rule.part in ("", *PARTS) for rule in rules)
    parts: dict[str, list[str]] = {}
    for rule in rules:
        parts.setdefault(rule.param, []).append(rule.part)
    assert all(sorted(found) in ([""], ["gate", "up"]) for param, found in parts.items() if param), parts
    assert {"w13", "w2"} <= parts.keys()


def test_a_model_type_has_one_scheme():
    types = [name for scheme in SCHEMES for name in scheme.types]
    assert len({*types}) == len(types)
    assert all(scheme_of(name) is scheme for scheme in SCHEMES for name in scheme.types)


def test_every_family_that_configs_are_read_for_has_a_row():
    known = {name for scheme in SCHEMES for name in scheme.types}
    assert {*FAMILIES} - known == {*WITHOUT}


def test_wrappers_are_called_like_the_models_in_them():
    """A config's own model type will do, whether it is the language model's or the one around it."""
    from transformers import CONFIG_MAPPING

    known = {name for scheme in SCHEMES for name in scheme.types}
    for name, kind in CONFIG_MAPPING.items():
        inner = {getattr(sub, "model_type", "") for sub in (kind.sub_configs or {}).values()} & known
        assert not inner or name in known, (name, inner)


def test_an_unknown_model_type_is_refused_with_the_known_ones():
    with raises_catalogue(MoEOptionError, expected="mixtral", got="'resnet'"):
        scheme_of("resnet")


def _moe_layer(case: FamilyCase, model: Any) -> tuple[str, Any]:
    """Prefix of a MoE layer, and the block found in its modules."""
    blocks = found_blocks(model)
    layer = min(blocks)
    names = (re.match(rf"(?:.*?\.)?(?:layers|blocks)\.{layer}\.", name) for name in model.state_dict())
    return next(match[0] for match in names if match), blocks[layer]


def _plain_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a parameter that is not of experts, of which the stored tensor is all or half."""
    if rule.has("row"):
        shape = shape[1:]
    if rule.has("bank"):
        down = "down" in rule.param
        shape = (shape[1], shape[0] * shape[2]) if down else (shape[0] * shape[1], shape[2])
    return (2 * shape[0], *shape[1:]) if rule.part else shape


def _meta_block(rules: tuple[Rule, ...], state: dict[str, Tensor], found: Any, *, hidden: int, shared: int) -> Block:
    """The block whose tensors are named in `state`, its expert parameters sized by what the modules say."""
    present = [rule for rule in rules if rule.param and rule.key in state]
    shapes = {r.param: _plain_shape(r, tuple(state[r.key].shape)) for r in present if not r.of_experts}
    gated = 1 if any("up_proj" in rule.key and "gate" not in rule.key and not rule.part for rule in present) else 2
    sizes = {
        "w13": (found.num_experts, gated * found.width, hidden),
        "w2": (found.num_experts, hidden, found.width),
        "b13": (found.num_experts, gated * found.width),
        "b2": (found.num_experts, hidden),
    }
    shapes |= {rule.param: sizes[rule.param] for rule in present if rule.of_experts}
    return Block({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, num_shared=shared)


def _under(state: dict[str, Tensor], prefix: str, rules: tuple[Rule, ...]) -> dict[str, tuple[int, ...]]:
    roots = tuple({prefix + rule.key.partition(".")[0] + "." for rule in rules})
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(roots)}


def _expected(block: Block, rules: tuple[Rule, ...], prefix: str) -> dict[str, tuple[int, ...]]:
    return {tensor.key: tensor.shape for tensor in stored_tensors(block, rules, prefix=prefix)}


def _foreign(rules: tuple[Rule, ...], prefix: str) -> set[str]:
    return {prefix + rule.key for rule in rules if not rule.param}


def _reverted(case: FamilyCase, model: Any) -> dict[str, Tensor]:
    """The state dict under the names that transformers gives checkpoints in the original format."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    if case.model_type in WRAPPERS:
        model._weight_conversions = get_checkpoint_conversion_mapping(WRAPPERS[case.model_type])
    else:
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    return revert_weight_conversion(model, model.state_dict())


@pytest.mark.parametrize("case", installed_cases(), ids=_id)
def test_names_are_those_of_transformers(case):
    """Both forms, names and shapes, against the modules and against transformers' own conversion of them."""
    if case.model_type in WITHOUT:
        with pytest.raises(MoEOptionError):
            scheme_of(case.model_type)
        return
    config = build_config(case)
    model = build_meta_model(case, config)
    scheme, state = scheme_of(case.model_type), dict(model.state_dict())
    prefix, found = _moe_layer(case, model)
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    form = max(scheme.forms, key=lambda name: (sum(r.key in inner for r in scheme.forms[name]), name == "v5"))
    rules = scheme.forms[form]
    down = next(rule for rule in rules if rule.param == "w2")
    hidden = inner[down.key].shape[2 if down.form == "transposed" else 1]
    shared = getattr(config, "n_shared_experts", 1) if any(r.has("bank") for r in rules) else 1
    block = _meta_block(rules, inner, found, hidden=hidden, shared=shared)
    theirs = _under(state, prefix, rules)
    assert _expected(block, rules, prefix) == {k: v for k, v in theirs.items() if k not in _foreign(rules, prefix)}
    if case.model_type in NOT_REVERSIBLE:
        return
    original = _reverted(case, model)
    if _under(original, prefix, rules) == theirs:  # nothing is renamed
        assert form == "v4" or "v4" not in scheme.forms or case.model_type in WRITTEN_AS_THEY_ARE
        return
    older = scheme.forms["v4"]
    theirs = _under(original, prefix, older)
    assert _expected(block, older, prefix) == {k: v for k, v in theirs.items() if k not in _foreign(older, prefix)}


def test_qwen3_vl_checkpoints_are_transposed():
    """The same names in another layout: transformers turns both tensors on loading, and never back."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    turned = {
        transform.source_patterns[0]: [type(op).__name__ for op in transform.operations]
        for transform in get_checkpoint_conversion_mapping("qwen3_vl_moe")
    }
    assert turned == {"mlp.experts.gate_up_proj": ["Transpose"], "mlp.experts.down_proj": ["Transpose"]}
    forms = scheme_of("qwen3_vl_moe").forms
    assert [rule.key for rule in forms["v4"]] == [rule.key for rule in forms["v5"]]
    assert {rule.key for rule in forms["v4"] if rule.form == "transposed"} == {*turned}
