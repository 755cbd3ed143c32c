"""The router behind its logits: what all implementations share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lowering.errors import MoEShapeError
from lowering.spec import RoutingSpec

from .output import TopKOutput


class TopKRouter(nn.Module, ABC):
    """Chooses `spec.top_k` of `num_experts` experts for each token, from logits that a gate made.

    Its parameters, each there only where the spec asks for it, C = num_experts + spec.num_null candidates:

    correction_bias   [C] fp32, added for the choice; moved by the balancing rule of training, so without a gradient
    per_expert_scale  [C], factor on the weight of each expert
    global_scale      [1], factor on all weights

    `watchers` are called with the ids of every choice, [T, K] int32, before any hook. Code that is compiled looks at
    them, as it does not at hooks: it is compiled once more for another number of them. Copies have none.
    """

    watchers: tuple[nn.Module, ...]  # not submodules: neither saved nor moved with the router
    correction_bias: Tensor | None
    per_expert_scale: Tensor | None
    global_scale: Tensor | None

    def __init__(
        self,
        spec: RoutingSpec,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        spec.check(num_experts)
        self.spec = spec
        self.num_experts = num_experts
        self.num_candidates = num_experts + spec.num_null
        self.watchers = ()
        owned = {
            "correction_bias": spec.select_bias,
            "per_expert_scale": spec.per_expert_scale,
            "global_scale": spec.global_scale,
        }
        for name, is_owned in owned.items():
            if not is_owned:
                self.register_parameter(name, None)
                continue
            selects = name == "correction_bias"
            size = 1 if name == "global_scale" else self.num_candidates
            value = torch.empty(size, device=device, dtype=torch.float32 if selects else dtype)
            self.register_parameter(name, nn.Parameter(value, requires_grad=not selects))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Bias 0 and scales 1: a router that nothing was learned for."""
        if self.correction_bias is not None:
            self.correction_bias.zero_()
        for scale in (self.per_expert_scale, self.global_scale):
            if scale is not None:
                scale.fill_(1.0)

    def forward(self, router_logits: Tensor, *, ids: Tensor | None = None) -> TopKOutput:
        """Choose experts, or weigh given ones.

        router_logits [T, C + n_shared] floating, ids [T, K] int32 or int64 (hash tables, router replay).
        Returns `TopKOutput`; ids outside [0, C) come back as C with weight 0. Differentiable in logits and scales.
        Raises `MoEShapeError` where the columns do not fit; the op checks the rest.
        """
        columns = self.spec.num_logits(self.num_experts)
        if router_logits.shape[-1] != columns:
            raise MoEShapeError.of(
                type(self).__name__,
                expected=f"router_logits [T, {columns}], one column per expert, null expert and joint shared expert",
                got=f"shape {tuple(router_logits.shape)}",
                hint="Pass what the gate of this layer returned.",
            )
        weights_TK, ids_TK = self.choose(router_logits, ids)
        if self.global_scale is not None:
            weights_TK = weights_TK * self.global_scale.to(weights_TK.dtype)
        for watcher in self.watchers:
            watcher(ids_TK)
        return TopKOutput(weights_TK, ids_TK, router_logits)

    @abstractmethod
    def choose(self, logits_TE: Tensor, ids_TK: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights [T, K + n_shared] fp32 and ids of the same shape int32, for logits [T, E] and ids [T, K] int."""

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: everything but who watches, who would count in a copy that nobody reads."""
        return self.__dict__ | {"watchers": ()}

    def extra_repr(self) -> str:
        """The spec, for `print(model)`."""
        return f"{self.spec}, num_experts={self.num_experts}"
