"""The router as a loop over tokens, the oracle; imported where it is asked for, as its decorator loads Dynamo."""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.reference.moe_route import moe_route_reference
from lowering.spec import RoutingSpec

from .base import TopKRouter


class ReferenceTopKRouter(TopKRouter):
    """Chooses by `lowering.reference.moe_route`, token by token in Python: slow, any spec, never captured."""

    @torch.compiler.disable(reason="the reference router reads every score on the host")
    def choose(self, logits_TE: Tensor, ids_TK: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights [T, K + n_shared] fp32 and ids of the same shape int32, for logits [T, E] and ids [T, K] int."""
        given = {} if self.per_expert_scale is None else {"per_expert_scale_E": self.per_expert_scale}
        wide = torch.promote_types(logits_TE.dtype, torch.float32)
        weights_TK, chosen_TK = moe_route_reference(
            logits_TE,
            RoutingSpec(*self.spec.op_args()),
            bias_E=self.correction_bias,
            ids_TK=ids_TK,
            dtype=wide,
            **given,
        )
        return weights_TK.to(logits_TE.device), chosen_TK.to(logits_TE.device)
