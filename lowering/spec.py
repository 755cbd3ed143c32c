"""Frozen descriptions of what a MoE block computes. Leaf module: torch-free, shared by every stage.

Shape legend of the whole tree: T tokens, K experts per token, N = T*K slots (slot n belongs to token n // K),
E experts, H hidden, I expert width, J = 2I for gated experts and I otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from .errors import MoEOptionError, MoERangeError

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("max", "top2_sum")
GROUP_FILLS = ("-inf", "0")
SCORE_DTYPES = ("float32", "bfloat16", "float16", "logits")
EPS_MODES = ("add", "clamp_min")
SELECTS = ("scores", "logits")
NULLS = ("identity", "skip")
WEIGHT_PLACES = ("output", "input")
DTYPES = (None, "float32", "bfloat16", "float16", "float64")
_FLOATS = ("renorm", "eps", "scale", "softcap", "logits_scale", "input_norm_eps", "jitter")


@dataclasses.dataclass(frozen=True)
class RoutingSpec:
    """How logits become expert ids and weights, for every router but sparsemixer, capacities and product keys.

    The op `diffulex::moe_route` computes, in this order:

    softcap      z = softcap * tanh(logits / softcap); 0 for none
    score        s = softmax(z) | sigmoid(z) | sqrt(softplus(z)), in fp32
    score_dtype  s is rounded to it ("logits": their dtype), s + bias and the sums of groups to the wider of it and the
                 dtype of the bias; "float32" rounds nothing
    select_on    experts are chosen by "scores" s + bias, or by "logits" z + bias in fp32
    n_group      experts are split into this many groups; 1 means no groups (DeepSeek-V2/V3)
    topk_group   groups kept; the others get `group_fill` before the selection
    group_score  score of a group: "max" (DeepSeek-V2) or "top2_sum" (DeepSeek-V3)
    top_k        experts chosen; their weight is w = s, s + bias with `bias_in_weights`
    n_shared     so many columns behind the experts' are weighted with every choice, without bias (Inkling): weights
                 [T, K + n_shared], ids E, E + 1, ... in those columns
    renorm       p: w is divided by its p-norm over a token's experts; 1 means the plain sum, 0 no division
    eps          "add" (`eps_mode`): to the norm; "clamp_min": the norm is at least this; 0 is neither
    scale        factor on the final weights (routed_scaling_factor)

    `renorm_if_k1` False leaves the division out where top_k = 1. Resolved in `op_args`.

    The layer around the op does the rest:

    num_null       so many candidates behind the E experts have no weights (LongCat, Zaya): ids E, E + 1, ...
    null           what they do: "identity" returns the token times its weight, "skip" nothing
    select_bias, per_expert_scale, logits_bias, global_scale
                   the router owns a bias of the choice [E + num_null], a factor on the weight of each of these, a bias
                   of all logits, one factor on all weights [1]
    logits_dtype   the router's product is computed in it; None means the dtype of the model
    logits_scale   factor on that product
    logits_given   the model computes the logits with code of its own and hands them over (Zaya)
    ids_given      a table by token id chooses the experts, the router only weighs them (DeepSeek-V4)
    weight_dtype   the weights reach the experts in it; None means the dtype of the model
    input_norm_eps eps of an RMS norm in front of the router, without weight, then a factor [H] and H ** -0.5 (Gemma 4)
    jitter         in training, what the router and the experts read is multiplied by uniform noise around 1,
                   from 1 - jitter to 1 + jitter
    apply_weight_on  the weight multiplies the experts' "output" or their "input" (Llama 4)
    """

    top_k: int
    score: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2_sum"
    group_fill: str = "-inf"
    renorm: float = 1.0
    eps: float = 0.0
    scale: float = 1.0
    softcap: float = 0.0
    score_dtype: str = "float32"
    select_on: str = "scores"
    bias_in_weights: bool = False
    eps_mode: str = "add"
    n_shared: int = 0
    _: dataclasses.KW_ONLY
    renorm_if_k1: bool = True
    num_null: int = 0
    null: str = "identity"
    select_bias: bool = False
    per_expert_scale: bool = False
    logits_bias: bool = False
    global_scale: bool = False
    logits_dtype: str | None = None
    logits_scale: float = 1.0
    logits_given: bool = False
    ids_given: bool = False
    weight_dtype: str | None = "float32"
    input_norm_eps: float | None = None
    jitter: float = 0.0
    apply_weight_on: str = "output"
    _texts: ClassVar[Mapping[str, str]] = {}  # of each spec its own, but for pickles that are older

    def __post_init__(self) -> None:
        told = ((name, getattr(self, name)) for name in _FLOATS)
        texts = {name: value.hex() for name, value in told if isinstance(value, float)}
        object.__setattr__(self, "_texts", texts)

    def number(self, name: str) -> Any:
        """The option `name` as a constant for code that is compiled.

        Dynamo takes floats that an object holds for inputs of the graph with `dynamic=True`, and compiles a second time
        where code or an op needs their values; what a text says is a constant.
        """
        text = self._texts.get(name)
        return getattr(self, name) if text is None else float.fromhex(text)

    @classmethod
    def of_op(cls, given: Mapping[str, Any]) -> RoutingSpec:
        """The spec of a call of `diffulex::moe_route` from its arguments by name; other names are passed over."""
        return cls(**{name: given[name] for name in OP_OPTIONS})

    @property
    def num_weights(self) -> int:
        """Columns of the op's results: K + n_shared."""
        return self.top_k + self.n_shared

    @property
    def norm(self) -> float:
        """`renorm`, 0 where `renorm_if_k1` leaves the division out."""
        return float(self.number("renorm")) if self.renorm_if_k1 or self.top_k > 1 else 0.0

    def num_logits(self, num_experts: int) -> int:
        """Columns of the logits, E + num_null + n_shared."""
        return num_experts + self.num_null + self.n_shared

    def op_args(self) -> tuple[int, str, int, int, str, str, float, float, float, float, str, str, bool, str, int]:
        """The scalar arguments of `diffulex::moe_route`, in schema order."""
        # not `dataclasses.astuple`: it copies deeply, and Dynamo breaks the graph there in torch 2.11
        choice = (self.top_k, self.score, self.n_group, self.topk_group, self.group_score, self.group_fill)
        numbers = (self.norm, self.number("eps"), self.number("scale"), self.number("softcap"))
        scores = (self.score_dtype, self.select_on, self.bias_in_weights)
        return (*choice, *numbers, *scores, self.eps_mode, self.n_shared)

    def check(self, num_experts: int) -> None:
        """Raise `MoERangeError` or `MoEOptionError` where the options have no meaning for `num_experts`."""
        where = "diffulex::moe_route"
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise MoERangeError.of(
                    where, expected=f"finite {name} >= 0", got=f"{name}={value}", hint="0 switches it off."
                )
        candidates = num_experts + self.num_null
        if not 0 < self.top_k <= candidates:
            raise MoERangeError.of(
                where,
                expected=f"0 < top_k <= {candidates} experts",
                got=f"top_k={self.top_k}",
                hint="Check num_experts_per_tok of the model config.",
            )
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise MoEOptionError.of(
                    where,
                    expected=f"{name} in {known}",
                    got=repr(getattr(self, name)),
                    hint=f"Choose one of {known}.",
                )
        if self.n_group < 1 or candidates % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise MoERangeError.of(
                where,
                expected=f"n_group dividing {candidates} and 1 <= topk_group <= n_group",
                got=f"n_group={self.n_group}, topk_group={self.topk_group}",
                hint="Use n_group=1, topk_group=1 for a router without groups.",
            )

    def __str__(self) -> str:
        """The options that differ from a plain choice, for reports: `top 8 of sigmoid, renorm, x 2.5`."""
        parts = [f"top {self.top_k} of {self.score}"]
        if self.select_on != "scores":
            parts[0] += f" by {self.select_on}"
        if self.n_group > 1:
            parts.append(f"{self.topk_group} of {self.n_group} groups by {self.group_score}, others {self.group_fill}")
        if self.norm:
            norm = "renorm" if self.norm == 1 else f"renorm by {self.norm:g}-norm"
            sign = "+" if self.eps_mode == "add" else ">="
            parts.append(f"{norm} {sign} {self.eps:g}" if self.eps else norm)
        if self.scale != 1:
            parts.append(f"x {self.scale:g}")
        for field in dataclasses.fields(self)[_TOLD:]:
            value = getattr(self, field.name)
            if field.name not in ("select_on", "eps_mode") and value != field.default:
                parts.append(field.name if value is True else f"{field.name} {value}")
        return ", ".join(parts)


# The fields that are arguments of the op, in schema order.
OP_OPTIONS = tuple(field.name for field in dataclasses.fields(RoutingSpec) if not field.kw_only)
_TOLD = OP_OPTIONS.index("softcap")  # fields from here on are told by name
_NOT_NEGATIVE = ("renorm", "eps", "softcap", "n_shared", "num_null", "input_norm_eps", "jitter")
_KNOWN: dict[str, tuple[str | None, ...]] = {
    "score": SCORES,
    "group_score": GROUP_SCORES,
    "group_fill": GROUP_FILLS,
    "score_dtype": SCORE_DTYPES,
    "select_on": SELECTS,
    "eps_mode": EPS_MODES,
    "null": NULLS,
    "logits_dtype": DTYPES,
    "weight_dtype": DTYPES,
    "apply_weight_on": WEIGHT_PLACES,
}


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """The expert MLP of one layer: sizes, activation, layout.

    act          name or formula understood by `lowering.activation`
    interleaved  gate and up alternate in the rows of w13 (GPT-OSS) instead of standing one after the other
    transposed   the stored weight is [E, in, out]; ops see the transposed view, so only strides change
    latent_size  the experts stand between two projections, from the model's hidden size to this one and back
                 (Nemotron-H); `hidden_size` is this size then, None for none
    output_bias  one bias on the sum of a token's experts, whatever their weights (JetMoe); the layer around the ops
                 adds it
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    act: str
    gated: bool = True
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    dtype: str = "bfloat16"
    latent_size: int | None = None
    output_bias: bool = False
