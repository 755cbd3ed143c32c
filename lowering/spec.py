"""Frozen descriptions of what a MoE block computes. Leaf module: torch-free, shared by every stage.

Shape legend of the whole tree: T tokens, K experts per token, N = T*K slots (slot n belongs to token n // K),
E experts, H hidden, I expert width, J = 2I for gated experts and I otherwise.
"""

from __future__ import annotations

import dataclasses

from .errors import MoEOptionError, MoERangeError

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("max", "top2_sum")
GROUP_FILLS = ("-inf", "0")


@dataclasses.dataclass(frozen=True)
class RoutingSpec:
    """How logits become expert ids and weights.

    score        s = softmax(z) | sigmoid(z) | sqrt(softplus(z)), in fp32
    n_group      experts are split into this many groups; 1 means no groups (DeepSeek-V2/V3)
    topk_group   groups kept; the others get `group_fill` before the selection
    group_score  score of a group: "max" (DeepSeek-V2) or "top2_sum" (DeepSeek-V3)
    renorm       divide the chosen scores by (their sum + eps)
    scale        factor on the final weights (routed_scaling_factor)
    """

    top_k: int
    score: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2_sum"
    group_fill: str = "-inf"
    renorm: bool = True
    eps: float = 0.0
    scale: float = 1.0

    def check(self, num_experts: int) -> None:
        """Raise `MoERangeError` or `MoEOptionError` where the options have no meaning for `num_experts`."""
        where = "diffulex::moe_route"
        if not 0 < self.top_k <= num_experts:
            raise MoERangeError.of(
                where,
                expected=f"0 < top_k <= {num_experts} experts",
                got=f"top_k={self.top_k}",
                hint="Check num_experts_per_tok of the model config.",
            )
        for name, value, known in (
            ("score", self.score, SCORES),
            ("group_score", self.group_score, GROUP_SCORES),
            ("group_fill", self.group_fill, GROUP_FILLS),
        ):
            if value not in known:
                raise MoEOptionError.of(
                    where, expected=f"{name} in {known}", got=repr(value), hint=f"Choose one of {known}."
                )
        if self.n_group < 1 or num_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise MoERangeError.of(
                where,
                expected=f"n_group dividing {num_experts} and 1 <= topk_group <= n_group",
                got=f"n_group={self.n_group}, topk_group={self.topk_group}",
                hint="Use n_group=1, topk_group=1 for a router without groups.",
            )

    def __str__(self) -> str:
        """The options that differ from a plain choice, for reports: `top 8 of sigmoid, renorm, x 2.5`."""
        parts = [f"top {self.top_k} of {self.score}"]
        if self.n_group > 1:
            parts.append(f"{self.topk_group} of {self.n_group} groups by {self.group_score}, others {self.group_fill}")
        if self.renorm:
            parts.append(f"renorm + {self.eps:g}" if self.eps else "renorm")
        if self.scale != 1:
            parts.append(f"x {self.scale:g}")
        return ", ".join(parts)

    def op_args(self) -> tuple[int, str, int, int, str, str, bool, float, float]:
        """The scalar arguments of `diffulex::moe_route`, in schema order."""
        # not `dataclasses.astuple`: it copies deeply, and Dynamo breaks the graph there in torch 2.11
        choice = (self.top_k, self.score, self.n_group, self.topk_group, self.group_score, self.group_fill)
        return (*choice, self.renorm, self.eps, self.scale)


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """The expert MLP of one layer: sizes, activation, layout.

    act          name or formula understood by `lowering.activation`
    interleaved  gate and up alternate in the rows of w13 (GPT-OSS) instead of standing one after the other
    transposed   the stored weight is [E, in, out]; ops see the transposed view, so only strides change
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
