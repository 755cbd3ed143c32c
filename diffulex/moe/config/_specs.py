"""Shared experts, routing spec and expert spec of one layer, from its facts and the row of its family."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from lowering.activation import IDENTITY
from lowering.spec import SCORES, ExpertSpec, RoutingSpec

from ._families import DENSE_WIDTH, GENERIC, GROUPS, SHARED_COUNT, SHARED_WIDTH, WIDTH, Shared
from ._read import MISSING, Facts
from ._routers import GENERIC_ROUTER, ROUTERS, Router

GATES = ("none", "sigmoid", "router")
COMBINES = ("sum", "average")
# transformers' names of activations -> formula of g
_ACTS = {
    "silu": "silu(g)",
    "swish": "silu(g)",
    "gelu": "gelu(g)",
    "gelu_pytorch_tanh": "gelu_tanh(g)",
    "gelu_new": "gelu_tanh(g)",
    "gelu_fast": "gelu_tanh(g)",
    "quick_gelu": "g * sigmoid(g * 1.702)",
    "relu": "relu(g)",
    "relu2": "square(relu(g))",
    "sigmoid": "sigmoid(g)",
    "tanh": "tanh(g)",
    "linear": IDENTITY,
}


@dataclasses.dataclass(frozen=True)
class SharedExpertSpec:
    """Experts every token passes through: `count` of them, each `width` wide, as one MLP or several.

    gate     "none": added as they are; "sigmoid": times the sigmoid of a linear gate (Qwen2-MoE);
             "router": times a weight from the router (Inkling)
    combine  "sum": of the routed and the shared experts; "average": half of it (Cohere 2)
    """

    count: int
    width: int
    gate: str = "none"
    combine: str = "sum"

    @property
    def total_width(self) -> int:
        """Width of all of them as one MLP."""
        return self.count * self.width


def expert_width(facts: Facts) -> int:
    """Width I of one routed expert. `intermediate_size` counts only where no name of its own exists for experts."""
    width = facts.family.width
    if isinstance(width, int):
        return width
    what = "the width of an expert"
    if width:
        return facts.number(width, what=what)
    names = WIDTH if facts.get(WIDTH) is not MISSING else (*WIDTH, *DENSE_WIDTH)
    return facts.number(names, what=what)


def top_k(facts: Facts) -> int:
    """Experts per token K."""
    names = facts.family.top_k
    return names if isinstance(names, int) else facts.number(names, what="the number of experts per token")


def num_experts(facts: Facts) -> int:
    """Routed experts E."""
    return facts.number(facts.family.count, what="the number of experts")


def _score(facts: Facts) -> str:
    score = facts.family.score
    if score in SCORES:
        return score
    names = (score,) if score else ("scoring_func", "score_function", "moe_router_score_function")
    found = facts.need(names, what="the score function of the router")
    if found not in SCORES:
        raise facts.error(f"{names[0]} of {SCORES}", got=repr(found), hint="Other scores are not supported.")
    return found


def norm_topk_prob(facts: Facts) -> bool:
    """Whether the weights of the chosen experts are divided by their sum, or by another norm of them."""
    return bool(_norm(facts)) and (facts.family.norm != "k>1" or top_k(facts) > 1)


def _norm(facts: Facts) -> float:
    """The p of the norm that the weights are divided by, 0 for none."""
    norm: Any = facts.family.norm
    if isinstance(norm, Mapping):
        norm = norm[_score(facts)]
    if isinstance(norm, bool) or norm == "k>1":
        return 1.0 if norm else 0.0
    value = facts.get(norm)
    power = "." in norm[0]  # DBRX gives the p of a p-norm, None for no norm
    if value is None and power:
        return 0.0
    value = facts.need(norm, what="whether weights are renormalised")
    if isinstance(value, int | float) and (0 <= value < math.inf if power else value in (0, 1)):
        return float(value)
    hint = "Only finite norms are supported." if power else "Only p = 1 is a renormalisation."
    raise facts.error(f"{norm[0]} of {'a number' if power else 'True or False'}", got=repr(value), hint=hint)


def shared_experts(facts: Facts) -> SharedExpertSpec | None:
    """The shared experts, or None."""
    rule = facts.family.shared
    if rule is None:
        return None
    if not isinstance(rule, Shared):
        rule = _generic_shared(facts)
    count = rule.count if isinstance(rule.count, int) else facts.get(rule.count)
    if count in (MISSING, None, 0):
        return None
    width = facts.get(rule.width) if rule.width else expert_width(facts)
    if width in (MISSING, None, 0):
        return None
    count, width = (facts.of_layer(value, what="shared experts") for value in (count, width))
    combine = facts.get((rule.combine,)) if rule.combine else "sum"
    if combine not in COMBINES:
        raise facts.error(f"{rule.combine} in {COMBINES}", got=repr(combine), hint="Correct it.")
    return SharedExpertSpec(count, width, rule.gate, combine)


def shared_expert_act(facts: Facts) -> str:
    """Activation of the shared experts: that of the routed ones, unless the family clamps them differently."""
    rule = facts.family.shared
    if not isinstance(rule, Shared):
        return _formula(facts)
    biased = bool(rule.bias) and facts.get((rule.bias,)) not in (MISSING, None, False)
    _refuse(facts, "biases on shared experts" if biased else "", spec="SharedExpertSpec")
    clamp = facts.family.clamp if rule.clamp is None else rule.clamp
    family = dataclasses.replace(facts.family, clamp=clamp, limit=rule.limit or facts.family.limit)
    return _formula(dataclasses.replace(facts, family=family))


def _generic_shared(facts: Facts) -> Shared:
    stated = facts.get(SHARED_WIDTH)
    if stated in (MISSING, None, 0):
        return Shared()
    if facts.get(SHARED_COUNT) in (MISSING, None, 0):
        wanted = f"a model type known to say whether {', '.join(SHARED_WIDTH)} is one gated MLP"
    else:
        wanted = f"a model type known to say whether {', '.join(SHARED_WIDTH)} is for one shared expert or for all"
    raise facts.error(wanted, got=repr(stated), hint="Add a row for the model type.")


def _refuse(facts: Facts, reason: str, *, spec: str) -> None:
    if reason:
        raise facts.error(f"a model that {spec} can express", got=reason, hint="It needs the model's own code.")


def _groups(facts: Facts) -> dict[str, Any]:
    family = facts.family
    limited = family.group_if is None or facts.get((family.group_if[0],)) == family.group_if[1]
    count = facts.get(GROUPS)
    if not limited or count in (MISSING, None, 1) or (family is not GENERIC and not family.group):
        return {}
    if not family.group:
        raise facts.error("a model type known to say how groups are scored", got=f"n_group={count}", hint="Add a row.")
    score, fill = family.group.split()
    kept = facts.number(("topk_group",), what="the number of groups kept")
    return {"n_group": count, "topk_group": kept, "group_score": score, "group_fill": fill}


def _number(facts: Facts, name: str, default: float = 0.0) -> float:
    """An attribute of a router's row as a number, the default where there is no name or the config has no value."""
    value = facts.get((name,)) if name else None
    return default if value in (MISSING, None) else float(value)


def _flag(facts: Facts, value: bool | str) -> bool:
    return bool(_number(facts, value)) if isinstance(value, str) else value


_AS_IN_THE_ROW = (
    *("select_on", "score_dtype", "logits_dtype", "weight_dtype", "null"),
    *("per_expert_scale", "global_scale", "logits_given", "apply_weight_on"),
)


def _around(facts: Facts, router: Router, score: str) -> dict[str, Any]:
    """The fields of `RoutingSpec` that a row of `ROUTERS` gives."""
    select_bias = score == "sigmoid" if router.select_bias is None else _flag(facts, router.select_bias)
    kinds = facts.get(("mlp_layer_types",)) if router.hash_type else None
    hashed = bool(kinds) and facts.of_layer(kinds, what="the kind of an MLP") == router.hash_type
    null = router.num_null
    return {
        **{name: getattr(router, name) for name in _AS_IN_THE_ROW},
        "select_bias": select_bias and not hashed,
        "ids_given": hashed,
        "bias_in_weights": bool(router.bias_in_weights) and _flag(facts, router.bias_in_weights),
        "logits_bias": _flag(facts, router.logits_bias),
        "softcap": _number(facts, router.softcap),
        "n_shared": int(_number(facts, router.n_shared)),
        "num_null": int(_number(facts, null)) if isinstance(null, str) else null,
        "input_norm_eps": _number(facts, router.input_norm_eps) if router.input_norm_eps else None,
        "logits_scale": _number(facts, router.logits_scale, 1.0),
        "jitter": _number(facts, router.jitter),
    }


def routing_spec(facts: Facts) -> RoutingSpec:
    """The router behind its logits, or `MoEConfigError` naming what `RoutingSpec` cannot express."""
    family = facts.family
    _refuse(facts, family.routing, spec="RoutingSpec")
    router = ROUTERS.get(facts.model_type, GENERIC_ROUTER)
    renorm = _norm(facts)
    scale = facts.get(family.scale)
    score = _score(facts)
    eps = family.eps or (1e-20 if family.score is None and score == "sigmoid" else 0.0)
    eps = _number(facts, router.clamp_min) if router.clamp_min else eps
    return RoutingSpec(
        top_k=top_k(facts),
        score=score,
        renorm=renorm,
        renorm_if_k1=family.norm != "k>1",
        eps=eps if renorm else 0.0,
        eps_mode="clamp_min" if router.clamp_min else "add",
        scale=1.0 if scale in (MISSING, None) else float(scale),
        **_groups(facts),
        **_around(facts, router, score),
    )


def _formula(facts: Facts) -> str:
    family = facts.family
    name = family.act if isinstance(family.act, str) else facts.need(family.act, what="the activation")
    if name not in _ACTS:
        raise facts.error(f"an activation of {tuple(_ACTS)}", got=repr(name), hint="Other activations are refused.")
    act = _ACTS[name]
    if not family.gated:
        return "g" if act == IDENTITY else act
    act = "g" if act == IDENTITY else act
    if family.clamp == "tanh":
        caps = [float(facts.need((f"mlp_{half}_softcap",), what=f"the soft cap of {half}")) for half in ("gate", "up")]
        gate, up = (f"{cap!r} * tanh({half} / {cap!r})" for half, cap in zip("gu", caps, strict=True))
        return f"{gate} * sigmoid(g) * ({up})"
    limit = _limit(facts)
    if family.clamp == "oai":
        alpha = facts.get(("swiglu_alpha",))
        alpha = 1.702 if alpha in (MISSING, None) else float(alpha)
        limit = 7.0 if limit is None else limit
        gate = f"min(g, {limit!r})"
        return f"(max(min(u, {limit!r}), {-limit!r}) + 1.0) * ({gate} * sigmoid({gate} * {alpha!r}))"
    if limit is None:
        return f"{act} * u"
    up = f"max(min(u, {limit!r}), {-limit!r})"
    if family.clamp == "after":
        return f"min({act}, {limit!r}) * {up}"
    return f"{re.sub(r'(?<![a-z_])g(?![a-z_])', f'min(g, {limit!r})', act)} * {up}"


def _limit(facts: Facts) -> float | None:
    if not facts.family.clamp:
        return None
    limit = facts.get((facts.family.limit,))
    limit = None if limit is MISSING else facts.of_layer(limit, what="the limit of the activation")
    return float(limit) if limit else None


def expert_spec(facts: Facts) -> ExpertSpec:
    """The MLP of one routed expert, or `MoEConfigError` naming what `ExpertSpec` cannot express."""
    family = facts.family
    _refuse(facts, family.experts, spec="ExpertSpec")
    dtype = facts.get(("dtype", "torch_dtype"))
    latent = int(_number(facts, family.latent)) or None
    stated: dict[str, Any] = {} if dtype in (MISSING, None) else {"dtype": str(dtype).removeprefix("torch.")}
    return ExpertSpec(
        num_experts=num_experts(facts),
        hidden_size=latent or facts.number(family.hidden, what="the hidden size"),
        latent_size=latent,
        intermediate_size=expert_width(facts),
        act=_formula(facts),
        gated=family.gated,
        bias=family.bias,
        output_bias=family.output_bias,
        interleaved=family.interleaved,
        transposed=family.transposed,
        **stated,
    )
