"""Specs of whole MoE layers for Hypothesis, layers with weights that matter, and their oracle: a loop over tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from diffulex.moe import FusedMoE, MoESpec, NaiveFusedMoE, SharedExpertSpec
from lowering.activation import evaluate, is_gated, split_gate
from lowering.reference.moe_route import moe_route_reference
from lowering.spec import ExpertSpec, RoutingSpec

GATED = ("swiglu", "geglu", "geglu_tanh", "swiglu_oai", "silu(min(g, 1.5)) * max(min(u, 1.5), -1.5)", "relu(g) * u")
UNGATED = ("relu2", "silu", "gelu")


def swiglu_experts(num_experts: int = 5, hidden: int = 8, width: int = 6, **changes: Any) -> ExpertSpec:
    """The experts of most models, small."""
    return ExpertSpec(num_experts, hidden, width, "silu(g) * u", **changes)


# Every form of models by name; H 8, E 8 unless said.
_E8 = swiglu_experts(8)
SPECS: dict[str, MoESpec] = {
    "qwen3": MoESpec(8, RoutingSpec(2, weight_dtype=None), _E8),
    "mixtral": MoESpec(8, RoutingSpec(2), _E8),
    "deepseek_v3": MoESpec(
        8,
        RoutingSpec(
            2, "sigmoid", n_group=4, topk_group=2, eps=1e-20, scale=2.5, select_bias=True, logits_dtype="float32"
        ),
        _E8,
        SharedExpertSpec(2, 6),
    ),
    "qwen2_moe": MoESpec(8, RoutingSpec(3, renorm=0.0), _E8, SharedExpertSpec(1, 10, "sigmoid")),
    "inkling": MoESpec(
        8,
        RoutingSpec(2, "sigmoid", n_shared=3, scale=1.5, select_bias=True, global_scale=True, weight_dtype=None),
        _E8,
        SharedExpertSpec(3, 4, "router"),
    ),
    "llama4": MoESpec(8, RoutingSpec(1, "sigmoid", renorm=0.0, apply_weight_on="input"), _E8, SharedExpertSpec(1, 6)),
    "weight_on_input": MoESpec(8, RoutingSpec(3, "sigmoid", apply_weight_on="input"), _E8),
    "longcat": MoESpec(8, RoutingSpec(4, renorm=0.0, scale=3.0, num_null=4, select_bias=True), _E8),
    "zaya": MoESpec(8, RoutingSpec(1, renorm=0.0, num_null=1, null="skip", logits_given=True), _E8),
    "deepseek_v4_hash": MoESpec(8, RoutingSpec(2, "sqrtsoftplus", eps=1e-20, ids_given=True), _E8),
    "gemma4": MoESpec(
        8,
        RoutingSpec(2, per_expert_scale=True, input_norm_eps=1e-6),
        dataclasses.replace(_E8, act="gelu_tanh(g) * u"),
    ),
    "nemotron_h": MoESpec(
        8,
        RoutingSpec(2, "sigmoid", select_bias=True),
        ExpertSpec(8, 5, 6, "square(relu(g))", gated=False, latent_size=5),
        SharedExpertSpec(1, 7),
    ),
    "gpt_oss": MoESpec(
        8,
        RoutingSpec(2, logits_bias=True, weight_dtype=None),
        dataclasses.replace(_E8, act="swiglu_oai", bias=True, interleaved=True),
    ),
    "cohere2": MoESpec(8, RoutingSpec(2, "sigmoid", renorm=0.0), _E8, SharedExpertSpec(2, 6, "none", "average")),
    "dbrx": MoESpec(8, RoutingSpec(3, renorm=2.0, jitter=0.1), _E8),
    "llada_moe": MoESpec(8, RoutingSpec(2, renorm=0.0, select_bias=True, bias_in_weights=True), _E8),
    "llada2": MoESpec(
        8,
        RoutingSpec(1, "sigmoid", n_group=4, topk_group=2, scale=2.5, renorm_if_k1=False, select_bias=True),
        _E8,
        SharedExpertSpec(1, 6),
    ),
    "laguna": MoESpec(8, RoutingSpec(2, "sigmoid", softcap=2.0, select_bias=True), _E8),
    "ernie": MoESpec(8, RoutingSpec(2, eps=0.5, eps_mode="clamp_min", select_bias=True), _E8),
    "step3p7": MoESpec(8, RoutingSpec(2, "sigmoid"), _E8, SharedExpertSpec(1, 6), "min(silu(g), 0.5) * u"),
    "jetmoe": MoESpec(8, RoutingSpec(2, weight_dtype=None), dataclasses.replace(_E8, output_bias=True)),
    "one_expert": MoESpec(8, RoutingSpec(1), swiglu_experts(1)),
    "every_expert": MoESpec(8, RoutingSpec(8, "sqrtsoftplus"), _E8),
}


def widened(spec: MoESpec, *, hidden: int = 64, width: int = 40) -> MoESpec:
    """The layer with sizes for which the two norms of the ratio rule mean something; latent experts stay small."""
    if spec.experts.latent_size is not None:
        return spec
    experts = dataclasses.replace(spec.experts, hidden_size=hidden, intermediate_size=width)
    shared = spec.shared and dataclasses.replace(spec.shared, width=width)
    return dataclasses.replace(spec, hidden_size=hidden, experts=experts, shared=shared)


@st.composite
def routing_specs(draw: st.DrawFn, num_experts: int) -> RoutingSpec:
    """Routers of every kind for `num_experts`, weights of joint shared experts left out."""
    num_null = draw(st.sampled_from([0, 0, 1, 3]))
    candidates = num_experts + num_null
    n_group = draw(st.sampled_from([n for n in range(1, candidates + 1) if candidates % n == 0]))
    score = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]))
    return RoutingSpec(
        draw(st.integers(1, candidates)),
        score,
        n_group=n_group,
        topk_group=draw(st.integers(1, n_group)),
        group_score=draw(st.sampled_from(["max", "top2_sum"])),
        group_fill=draw(st.sampled_from(["-inf", "0"])),
        renorm=draw(st.sampled_from([0.0, 1.0, 2.0])),
        eps=draw(st.sampled_from([0.0, 1e-6, 0.3])),
        eps_mode=draw(st.sampled_from(["add", "clamp_min"])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        select_on=draw(st.sampled_from(["scores", "logits"])),
        renorm_if_k1=draw(st.booleans()),
        num_null=num_null,
        null=draw(st.sampled_from(["identity", "skip"])),
        select_bias=draw(st.booleans()),
        per_expert_scale=draw(st.booleans()),
        logits_bias=draw(st.booleans()),
        global_scale=draw(st.booleans()),
        logits_dtype=draw(st.sampled_from([None, "float32"])),
        logits_scale=draw(st.sampled_from([1.0, 0.5])),
        logits_given=draw(st.booleans()),
        ids_given=draw(st.booleans()),
        weight_dtype=draw(st.sampled_from([None, "float32"])),
        input_norm_eps=draw(st.sampled_from([None, 1e-6])),
        jitter=draw(st.sampled_from([0.0, 0.1])),
        apply_weight_on=draw(st.sampled_from(["output", "input"])),
    )


@st.composite
def moe_specs(draw: st.DrawFn) -> MoESpec:
    """Layers of every kind: router, experts and shared experts drawn apart; E 1..6, H and I 1..5."""
    hidden, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    routing = draw(routing_specs(num_experts))
    latent = draw(st.sampled_from([None, None, 3]))
    if latent is not None:
        routing = dataclasses.replace(routing, null="skip")
    act = draw(st.sampled_from([*GATED, *UNGATED]))
    experts = ExpertSpec(
        num_experts,
        latent or hidden,
        draw(st.integers(1, 5)),
        act,
        gated=is_gated(act),
        bias=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        latent_size=latent,
        output_bias=draw(st.booleans()),
    )
    shared = shared_act = None
    if draw(st.booleans()):
        gate = draw(st.sampled_from(["none", "sigmoid", "router"]))
        shared = SharedExpertSpec(
            draw(st.integers(1, 3)), draw(st.integers(1, 4)), gate, draw(st.sampled_from(["sum", "average"]))
        )
        shared_act = draw(st.sampled_from([None, "relu2", "silu(g) * u"]))
        if gate == "router":
            routing = dataclasses.replace(routing, n_shared=shared.count)
    return MoESpec(hidden, routing, experts, shared, shared_act)


def make_layer(
    spec: MoESpec, impl: str = "triton", *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> NaiveFusedMoE:
    """The layer in eval mode with seeded weights of the size of their inputs, biases and scales that show."""
    layer = NaiveFusedMoE(dataclasses.replace(spec, moe_gemm_impl=impl))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(layer.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        scale = "scale" in name
        parameter.data.copy_(
            1 + 0.3 * noise if scale else noise * (0.3 if noise.dim() < 2 else noise.shape[-1] ** -0.5)
        )
    return layer.to(dtype).eval()


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """Arguments of a layer: hidden [T, H], and where drawn router_input [T, H], router_logits [T, C], ids [T, K]."""

    hidden_TH: Tensor
    given: dict[str, Tensor]

    def to(self, where: torch.dtype | str) -> LayerInputs:
        """The same values in a floating dtype, where ids stay as they are, or on a device."""
        integers_stay = isinstance(where, torch.dtype)
        given = {n: t if integers_stay and not t.is_floating_point() else t.to(where) for n, t in self.given.items()}
        return LayerInputs(self.hidden_TH.to(where), given)


def make_inputs(spec: MoESpec, tokens: int, *, seed: int = 0, given: tuple[str, ...] = ()) -> LayerInputs:
    """Seeded fp64 inputs; logits and ids are always given where the spec says that the model makes them."""
    generator = torch.Generator().manual_seed(seed + 1)
    num_experts = spec.experts.num_experts
    made = {
        "router_input": torch.randn(tokens, spec.hidden_size, generator=generator),
        "router_logits": torch.randn(tokens, spec.routing.num_logits(num_experts), generator=generator),
        "topk_ids": torch.randint(-1, num_experts + 2, (tokens, spec.routing.top_k), generator=generator),
    }
    needed = {"router_logits": spec.routing.logits_given, "topk_ids": spec.routing.ids_given}
    names = {*given, *(name for name, is_needed in needed.items() if is_needed)}
    hidden_TH = torch.randn(tokens, spec.hidden_size, generator=generator)
    chosen = {name: made[name] for name in made if name in names}
    return LayerInputs(hidden_TH, chosen).to(torch.float64)


def layer_oracle(layer: FusedMoE, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
    """Result [T, H] and logits [T, C] in fp64 of a layer in eval mode, written from its spec: one token at a time.

    On the CPU, wherever the layer is.
    """
    spec, routing = layer.spec, layer.spec.routing
    p = {name: tensor.cpu().double() for name, tensor in layer.named_parameters()}
    inputs = inputs.to("cpu")
    hidden_TH = inputs.hidden_TH.double()
    logits_TC = inputs.given.get("router_logits")
    if logits_TC is None:
        logits_TC = _oracle_logits(spec, p, inputs.given.get("router_input", hidden_TH).double())
    weights_TW, ids_TW = moe_route_reference(
        logits_TC.double(),
        RoutingSpec(*routing.op_args()),
        bias_E=p.get("router.correction_bias"),
        ids_TK=inputs.given.get("topk_ids"),
        per_expert_scale_E=p.get("router.per_expert_scale"),
    )
    weights_TW = weights_TW * p.get("router.global_scale", torch.ones(1))
    rows = []
    for token, hidden_H in enumerate(hidden_TH):
        weights_W, ids = weights_TW[token], ids_TW[token].tolist()
        row_H = _oracle_experts(spec, p, hidden_H, weights_W[: routing.top_k], ids[: routing.top_k])
        row_H = row_H + p.get("out_bias", torch.zeros(1))
        if spec.shared is not None:
            row_H = row_H + _oracle_shared(spec, p, hidden_H, weights_W[routing.top_k :])
            row_H = row_H / 2 if spec.shared.combine == "average" else row_H
        rows.append(row_H)
    return torch.stack(rows) if rows else hidden_TH, logits_TC


def _oracle_logits(spec: MoESpec, p: dict[str, Tensor], inputs_TH: Tensor) -> Tensor:
    if "gate.input_scale" in p:
        norm_T1 = (inputs_TH.square().mean(1, keepdim=True) + spec.routing.input_norm_eps).sqrt()
        inputs_TH = inputs_TH / norm_T1 * p["gate.input_scale"] / spec.hidden_size**0.5
    logits_TC = inputs_TH @ p["gate.weight"].T
    if "gate.bias" in p:
        logits_TC = logits_TC + p["gate.bias"]
    return logits_TC * spec.routing.logits_scale


def _activated(act: str, pre_J: Tensor, *, interleaved: bool) -> Tensor:
    return evaluate(act, *split_gate(pre_J[None], act, interleaved=interleaved))[0]


def _oracle_experts(spec: MoESpec, p: dict[str, Tensor], hidden_H: Tensor, weights_K: Tensor, ids: list[int]) -> Tensor:
    experts, routing = spec.experts, spec.routing
    inner_H = hidden_H if "latent_in.weight" not in p else p["latent_in.weight"] @ hidden_H
    total_H, null_H = torch.zeros_like(inner_H), torch.zeros_like(hidden_H)
    for weight, expert in zip(weights_K, ids, strict=True):
        if experts.num_experts <= expert < experts.num_experts + routing.num_null and routing.null == "identity":
            null_H = null_H + weight * hidden_H
        if not 0 <= expert < experts.num_experts:
            continue
        into, onto = (weight, 1.0) if routing.apply_weight_on == "input" else (1.0, weight)
        pre_J = p["w13"][expert] @ (into * inner_H) + (p["b13"][expert] if experts.bias else 0)
        act_I = _activated(experts.act, pre_J, interleaved=experts.interleaved)
        total_H = total_H + onto * (p["w2"][expert] @ act_I + (p["b2"][expert] if experts.bias else 0))
    return (total_H if "latent_out.weight" not in p else p["latent_out.weight"] @ total_H) + null_H


def _oracle_shared(spec: MoESpec, p: dict[str, Tensor], hidden_H: Tensor, weights_S: Tensor) -> Tensor:
    shared, act = spec.shared, spec.shared_act or spec.experts.act
    assert shared is not None
    up, down = p["shared_experts.gate_up_proj.weight"], p["shared_experts.down_proj.weight"]
    halves = up.view(2 if is_gated(act) else 1, shared.count, shared.width, -1)
    total_H = torch.zeros_like(hidden_H)
    for number in range(shared.count):
        pre_J = halves[:, number].flatten(0, 1) @ hidden_H
        columns = slice(number * shared.width, (number + 1) * shared.width)
        out_H = down[:, columns] @ _activated(act, pre_J, interleaved=False)
        total_H = total_H + (weights_S[number] * out_H if shared.gate == "router" else out_H)
    if shared.gate == "sigmoid":
        total_H = total_H * torch.sigmoid(p["shared_experts.gate.weight"] @ hidden_H)
    return total_H
