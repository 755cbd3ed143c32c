"""The MoE layer, by the ops and by the naive loop, against a loop over tokens written from its spec."""

import copy
import dataclasses
import functools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from diffulex.moe import MoESpec, NaiveFusedMoE, SharedExpertMLP, SharedExpertSpec, TopKOutput, metadata
from diffulex.moe.layer.experts import WeightOnInput
from lowering.errors import (
    MoEConfigError,
    MoEDtypeError,
    MoEOptionError,
    MoERangeError,
    MoEShapeError,
    MoEUnsupportedError,
)
from lowering.settings import Settings
from lowering.spec import RoutingSpec
from tests.support.inputs import DEVICES, LOW_DTYPES, BlockInputs
from tests.support.moe_layers import SPECS, layer_oracle, make_inputs, make_layer, moe_specs, swiglu_experts, widened
from tests.support.oracle import assert_near_exact, assert_oracle_ratio, random_like

GIVEN = st.sets(st.sampled_from(["router_input", "router_logits", "topk_ids"])).map(lambda names: tuple(sorted(names)))


def gradients_of(layer, result_TH, leaves):
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad} | leaves
    if not result_TH.requires_grad:  # no id is an expert
        return {name: torch.zeros_like(tensor) for name, tensor in named.items()}
    grads = torch.autograd.grad(result_TH, list(named.values()), random_like(result_TH), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(named.items(), grads, strict=True)}


def with_leaves(inputs):
    return dataclasses.replace(inputs, hidden_TH=inputs.hidden_TH.clone().requires_grad_())


@given(moe_specs(), st.integers(0, 5), GIVEN, st.sampled_from(["triton", "naive"]), st.integers(0, 99))
def test_equals_the_oracle(spec, tokens, names, impl, seed):
    layer, inputs = make_layer(spec, impl, seed=seed), make_inputs(spec, tokens, seed=seed, given=names)
    with torch.no_grad():
        out_TH, logits_TC = layer(inputs.hidden_TH, **inputs.given)
        wanted_TH, wanted_TC = layer_oracle(layer, inputs)
    assert_near_exact(out_TH, wanted_TH)
    assert_near_exact(logits_TC, wanted_TC, what="logits")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_activation_checkpointing_changes_no_gradient(name, reentrant):
    """Bitwise; recomputing lets a backward read what it saved once, and no more."""
    layer, made = make_layer(SPECS[name]), make_inputs(SPECS[name], 5)
    found = []

    def run(hidden_TH):
        return layer(hidden_TH, **made.given)[0]

    for way in (run, functools.partial(checkpoint, run, use_reentrant=reentrant)):
        layer.zero_grad()
        inputs = with_leaves(made)
        out_TH = way(inputs.hidden_TH)
        (out_TH * random_like(out_TH)).sum().backward()
        found.append({"hidden": inputs.hidden_TH.grad, **{n: p.grad for n, p in layer.named_parameters()}})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert (value is None and found[1][key] is None) or torch.equal(value, found[1][key]), key


@given(moe_specs(), st.integers(1, 4), GIVEN, st.sampled_from(["triton", "naive"]), st.integers(0, 99))
def test_gradients_equal_those_of_the_oracle(spec, tokens, names, impl, seed):
    layer = make_layer(spec, impl, seed=seed)
    inputs = with_leaves(make_inputs(spec, tokens, seed=seed, given=names))
    leaves = {"hidden": inputs.hidden_TH}
    found = gradients_of(layer, layer(inputs.hidden_TH, **inputs.given)[0], leaves)
    wanted = gradients_of(layer, layer_oracle(layer, inputs)[0], leaves)
    # side by side: a gradient that is zero but for rounding is measured by the others
    together, oracle = (torch.cat([grads[name].flatten() for name in found]) for grads in (found, wanted))
    assert_near_exact(together, oracle, what=", ".join(found))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["triton", "naive"])
@pytest.mark.parametrize("name", SPECS)
def test_named_forms_equal_the_oracle(name, impl, device):
    layer = make_layer(SPECS[name], impl).to(device)
    for tokens in (0, 1, 9):
        inputs = make_inputs(SPECS[name], tokens).to(device)
        with torch.no_grad():
            assert_near_exact(layer(inputs.hidden_TH, **inputs.given)[0].cpu(), layer_oracle(layer, inputs)[0])


def eager_experts(hidden_TH, weights_TK, ids_TK, *, experts):
    """The experts as stock models write them, in the dtype of the model."""
    block = BlockInputs(hidden_TH, weights_TK, ids_TK, *vars(experts).values())
    return block.eager()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_error_ratio(name, dtype, device):
    """Ids and logits are given, so that a near tie does not send a token elsewhere in the fp64 copy."""
    spec = widened(SPECS[name])
    layer = make_layer(spec, dtype=dtype).to(device)
    inputs = make_inputs(spec, 33).to(dtype).to(device)
    with torch.no_grad():
        logits, ids = (inputs.given.get(name) for name in ("router_logits", "topk_ids"))
        chosen = layer.route(inputs.hidden_TH, logits=logits, ids=ids)
        ids = chosen.ids[:, : spec.routing.top_k].contiguous()
        inputs = dataclasses.replace(inputs, given={"router_logits": chosen.router_logits, "topk_ids": ids})
        ours = layer(inputs.hidden_TH, **inputs.given)[0]
        on_input = spec.routing.apply_weight_on == "input"
        stock = copy.copy(layer)
        stock._run = WeightOnInput(eager_experts) if on_input else eager_experts
        eager = stock(inputs.hidden_TH, **inputs.given)[0]
        oracle = layer_oracle(layer, inputs.to(torch.float64))[0]
    assert ours.dtype == dtype
    assert_oracle_ratio(ours.cpu(), eager.cpu(), oracle)


def test_logits_in_fp32_where_the_spec_says_so():
    layer = make_layer(SPECS["deepseek_v3"], dtype=torch.bfloat16)
    hidden = make_inputs(SPECS["deepseek_v3"], 5).hidden_TH.bfloat16()
    logits = layer(hidden)[1]
    assert logits.dtype == torch.float32
    assert torch.equal(logits, torch.nn.functional.linear(hidden.float(), layer.gate.weight.float()))
    assert make_layer(SPECS["mixtral"], dtype=torch.bfloat16)(hidden)[1].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["deepseek_v3", "nemotron_h", "gpt_oss"])
def test_autocast(name):
    """Parameters in fp32, products in bf16: the router asked for fp32 stays there, and the result is the caller's."""
    layer, inputs = make_layer(SPECS[name], dtype=torch.float32), make_inputs(SPECS[name], 5).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, logits = layer(inputs.hidden_TH)
        assert layer(inputs.hidden_TH.bfloat16())[0].dtype == torch.bfloat16
    assert out.dtype == torch.float32
    assert logits.dtype == (torch.float32 if name == "deepseek_v3" else torch.bfloat16)
    out.sum().backward()
    assert layer.w13.grad.dtype == torch.float32


def test_any_leading_dimensions():
    layer = make_layer(SPECS["qwen2_moe"])
    hidden = make_inputs(SPECS["qwen2_moe"], 12).hidden_TH
    flat, logits = layer(hidden)
    for shape in ((12, 8), (3, 4, 8), (2, 3, 2, 8), (12, 1, 8)):
        out, other = layer(hidden.view(shape))
        assert out.shape == shape and torch.equal(out.view(12, 8), flat) and torch.equal(other, logits)
    out, logits = layer(hidden[0])
    assert out.shape == (8,) and logits.shape == (1, 8)
    assert layer(hidden.new_zeros(2, 0, 8))[0].shape == (2, 0, 8)


def test_router_arguments_of_any_leading_dimensions():
    layer, hidden = make_layer(SPECS["mixtral"]), make_inputs(SPECS["mixtral"], 6).hidden_TH.view(2, 3, 8)
    out, logits = layer(hidden)
    ids = layer.route(hidden).ids
    again = layer(hidden, router_input=hidden * 2, router_logits=logits.view(2, 3, 8), topk_ids=ids.view(2, 3, 2))
    assert torch.equal(again[0], out)


def test_strided_hidden_states():
    layer, hidden = make_layer(SPECS["mixtral"]), make_inputs(SPECS["mixtral"], 8).hidden_TH
    assert torch.equal(layer(hidden.T.contiguous().T)[0], layer(hidden)[0])


def test_jitter_is_for_training_and_multiplies_what_router_and_experts_read():
    layer, hidden = make_layer(SPECS["dbrx"]), make_inputs(SPECS["dbrx"], 9).hidden_TH
    torch.manual_seed(0)
    noise = torch.empty_like(hidden).uniform_(0.9, 1.1)
    clean, wanted = layer(hidden), layer(hidden * noise)
    torch.manual_seed(0)
    assert all(map(torch.equal, layer.train()(hidden), wanted))
    torch.manual_seed(0)
    assert all(
        map(
            torch.equal,
            layer(hidden / 2, router_input=hidden),
            layer.eval()(hidden / 2 * noise, router_input=hidden * noise),
        )
    )
    assert all(map(torch.equal, layer(hidden), clean))
    assert not torch.equal(clean[1], wanted[1])


@pytest.mark.parametrize("impl", ["triton", "naive"])
@pytest.mark.parametrize("name", ["mixtral", "longcat", "weight_on_input"])
def test_ids_outside_contribute_nothing_whatever_their_weight(name, impl):
    """As expert parallelism leaves them: the router of another rank weighed them."""
    layer, hidden = make_layer(SPECS[name], impl), make_inputs(SPECS[name], 3).hidden_TH
    ids = torch.tensor([-1, layer.router.num_candidates, 2**31 - 1]).int().unsqueeze(1).expand(3, layer.top_k)
    nothing = layer.mix(hidden, TopKOutput(torch.ones(3, layer.top_k).double(), ids.contiguous(), hidden))
    assert torch.equal(nothing, torch.zeros_like(hidden))


def test_debug_mode_accepts_what_the_layer_makes(monkeypatch):
    monkeypatch.setattr(metadata, "SETTINGS", Settings(debug=True))
    for tokens in (0, 3):
        make_layer(SPECS["mixtral"])(make_inputs(SPECS["mixtral"], tokens).hidden_TH)


@pytest.mark.parametrize("impl", ["triton", "naive"])
@pytest.mark.parametrize("name", ["deepseek_v3", "llama4"])
def test_copies(name, impl):
    layer, hidden = make_layer(SPECS[name], impl), make_inputs(SPECS[name], 5).hidden_TH
    out = layer(hidden)[0]
    assert torch.equal(copy.deepcopy(layer)(hidden)[0], out)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(hidden)[0], out)


def test_new_layers_are_usable():
    torch.manual_seed(0)
    for spec in SPECS.values():
        layer, inputs = NaiveFusedMoE(spec), make_inputs(spec, 5).to(torch.float32)
        assert layer(inputs.hidden_TH, **inputs.given)[0].isfinite().all()
        assert {p.device.type for p in NaiveFusedMoE(spec, device="meta").parameters()} == {"meta"}
        dtypes = {n: p.dtype for n, p in NaiveFusedMoE(spec, dtype=torch.bfloat16).named_parameters()}
        assert {d for n, d in dtypes.items() if n != "router.correction_bias"} == {torch.bfloat16}


NAMES = {
    "mixtral": {"gate.weight": (8, 8), "w13": (8, 12, 8), "w2": (8, 8, 6)},
    "deepseek_v3": {
        "gate.weight": (8, 8),
        "router.correction_bias": (8,),
        "w13": (8, 12, 8),
        "w2": (8, 8, 6),
        "shared_experts.gate_up_proj.weight": (24, 8),
        "shared_experts.down_proj.weight": (8, 12),
    },
    "qwen2_moe": {
        "gate.weight": (8, 8),
        "w13": (8, 12, 8),
        "w2": (8, 8, 6),
        "shared_experts.gate_up_proj.weight": (20, 8),
        "shared_experts.down_proj.weight": (8, 10),
        "shared_experts.gate.weight": (1, 8),
    },
    "inkling": {
        "gate.weight": (11, 8),
        "router.correction_bias": (8,),
        "router.global_scale": (1,),
        "w13": (8, 12, 8),
        "w2": (8, 8, 6),
        "shared_experts.gate_up_proj.weight": (24, 8),
        "shared_experts.down_proj.weight": (8, 12),
    },
    "longcat": {"gate.weight": (12, 8), "router.correction_bias": (12,), "w13": (8, 12, 8), "w2": (8, 8, 6)},
    "zaya": {"w13": (8, 12, 8), "w2": (8, 8, 6)},
    "gemma4": {
        "gate.weight": (8, 8),
        "gate.input_scale": (8,),
        "router.per_expert_scale": (8,),
        "w13": (8, 12, 8),
        "w2": (8, 8, 6),
    },
    "nemotron_h": {
        "gate.weight": (8, 8),
        "router.correction_bias": (8,),
        "latent_in.weight": (5, 8),
        "latent_out.weight": (8, 5),
        "w13": (8, 6, 5),
        "w2": (8, 5, 6),
        "shared_experts.gate_up_proj.weight": (7, 8),
        "shared_experts.down_proj.weight": (8, 7),
    },
    "gpt_oss": {
        "gate.weight": (8, 8),
        "gate.bias": (8,),
        "w13": (8, 12, 8),
        "w2": (8, 8, 6),
        "b13": (8, 12),
        "b2": (8, 8),
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_state_dict(name):
    found = {key: tuple(value.shape) for key, value in make_layer(SPECS[name]).state_dict().items()}
    assert found == NAMES[name]


# --- errors ----------------------------------------------------------------------------------------------------------

PLAIN = SPECS["mixtral"]


def changed(part, **changes):
    return dataclasses.replace(PLAIN, **{part: dataclasses.replace(getattr(PLAIN, part), **changes)})


SHARED_BY_ROUTER = dataclasses.replace(PLAIN, shared=SharedExpertSpec(2, 6, "router"))
WRONG_SPECS = [
    (dataclasses.replace(PLAIN, moe_gemm_impl="cutlass"), MoEOptionError, "moe_gemm_impl in .*got 'cutlass'"),
    (changed("experts", act="relu2"), MoEOptionError, "an activation with u, as gated=True, got 'relu2'"),
    (changed("experts", act="siluu(g) * u"), MoEOptionError, "siluu"),
    (changed("experts", hidden_size=4), MoEConfigError, "experts.hidden_size=8.*got 4"),
    (changed("experts", latent_size=4), MoEConfigError, "experts.hidden_size=4.*got 8"),
    (changed("routing", top_k=9), MoERangeError, "top_k"),
    (changed("routing", n_shared=1), MoEConfigError, "routing.n_shared=0.*got n_shared=1"),
    (SHARED_BY_ROUTER, MoEConfigError, "routing.n_shared=2.*got n_shared=0"),
    (dataclasses.replace(PLAIN, shared=SharedExpertSpec(1, 6, "tanh")), MoEOptionError, "a gate of .*got 'tanh'"),
    (
        MoESpec(8, RoutingSpec(2, num_null=1), swiglu_experts(8, 4, latent_size=4)),
        MoEUnsupportedError,
        "null experts between latent projections",
    ),
]


@pytest.mark.parametrize(("spec", "error", "text"), WRONG_SPECS)
def test_specs_that_do_not_fit(spec, error, text):
    with pytest.raises(error, match=text):
        NaiveFusedMoE(spec)


def hidden(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


WRONG_CALLS = [
    ("mixtral", {"hidden_states": hidden(3, 7)}, MoEShapeError, r"hidden_states \[\.\.\., 8\], got shape \(3, 7\)"),
    ("mixtral", {"router_input": hidden(3, 7)}, MoEShapeError, r"router_input \[\.\.\., 8\], got shape \(3, 7\)"),
    ("mixtral", {"router_input": hidden(4, 8)}, MoEShapeError, "T"),
    ("mixtral", {"router_logits": hidden(3, 7)}, MoEShapeError, r"router_logits \[T, 8\]"),
    ("mixtral", {"router_logits": hidden(4, 8)}, MoEShapeError, "T"),
    ("mixtral", {"topk_ids": torch.zeros(3, 3).int()}, MoEShapeError, "columns of ids = top_k = 2"),
    ("mixtral", {"topk_ids": torch.zeros(4, 2).int()}, MoEShapeError, "rows of ids = T"),
    ("mixtral", {"topk_ids": torch.zeros(3, 2)}, MoEDtypeError, "ids in int32 or int64"),
    ("zaya", {}, MoEOptionError, "router_logits, as this model computes them"),
    ("deepseek_v4_hash", {}, MoEOptionError, "topk_ids, as a table of this model holds them"),
]


@pytest.mark.parametrize(("name", "arguments", "error", "text"), WRONG_CALLS)
def test_arguments_that_do_not_fit(name, arguments, error, text):
    with pytest.raises(error, match=text):
        make_layer(SPECS[name])(**{"hidden_states": hidden(3, 8), **arguments})


def test_weights_go_with_the_gate_router_alone():
    weighted = SharedExpertMLP(SharedExpertSpec(2, 6, "router"), 8)
    plain = SharedExpertMLP(SharedExpertSpec(2, 6), 8)
    inputs = torch.zeros(3, 8)
    for mlp, weights, text in (
        (weighted, None, r"weights \[T, 2\] of the router, got none"),
        (weighted, torch.zeros(3, 1), r"weights \[T, 2\] of the router, got shape \(3, 1\)"),
        (plain, torch.zeros(3, 2), r"no weights, got shape \(3, 2\)"),
    ):
        with pytest.raises(MoEShapeError, match=text):
            mlp(inputs, weights)
