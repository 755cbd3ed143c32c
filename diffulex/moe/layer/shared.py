"""Shared experts: an MLP every token passes through, beside the routed experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowering.activation import as_function, is_gated
from lowering.errors import MoEOptionError, MoEShapeError

from ..config import SharedExpertSpec

SHARED_GATES = ("none", "sigmoid", "router")


class SharedExpertMLP(nn.Module):
    """`spec.count` experts of `spec.width` as one wide MLP; one product with their down weights adds them up.

    gate_up_proj.weight  [2 * count * width, H]: all gates, then all ups; without gate [count * width, H]
    down_proj.weight     [H, count * width]
    gate.weight          [1, H], where `spec.gate` is "sigmoid": the output is times the sigmoid of it (Qwen2-MoE)

    `spec.gate` "router": each expert is times its own weight, on its block of activation columns (Inkling).
    """

    def __init__(
        self,
        spec: SharedExpertSpec,
        hidden_size: int,
        *,
        act: str = "silu(g) * u",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if spec.gate not in SHARED_GATES:
            raise MoEOptionError.of(
                "SharedExpertMLP",
                expected=f"a gate of {SHARED_GATES}",
                got=repr(spec.gate),
                hint="'none' adds the experts as they are.",
            )
        self.spec = spec
        self.act = act
        self._activation, self._gated = as_function(act), is_gated(act)  # here: Dynamo cannot look into a parser
        rows = spec.total_width * (2 if self._gated else 1)
        self.gate_up_proj = nn.Linear(hidden_size, rows, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(spec.total_width, hidden_size, bias=False, device=device, dtype=dtype)
        sigmoid = spec.gate == "sigmoid"
        self.gate = nn.Linear(hidden_size, 1, bias=False, device=device, dtype=dtype) if sigmoid else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_activation"}  # not to be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._activation = as_function(self.act)

    def forward(self, hidden_states: Tensor, weights_TS: Tensor | None = None) -> Tensor:
        """Sum of the experts [T, H] in the dtype of hidden_states [T, H].

        weights [T, count] floating go with the gate "router" and nothing else; `MoEShapeError` otherwise.
        """
        self._check_weights(weights_TS)
        pre_TJ = self.gate_up_proj(hidden_states)
        wide_TJ = pre_TJ.to(torch.promote_types(pre_TJ.dtype, torch.float32))
        act_TI = self._activation(*(wide_TJ.chunk(2, dim=1) if self._gated else (wide_TJ, wide_TJ)))
        if weights_TS is not None:
            blocks_TSI = act_TI.unflatten(1, (self.spec.count, self.spec.width))
            act_TI = (blocks_TSI * weights_TS.unsqueeze(2)).flatten(1)
        out_TH = self.down_proj(act_TI.to(pre_TJ.dtype))
        return out_TH if self.gate is None else torch.sigmoid(self.gate(hidden_states)) * out_TH

    def _check_weights(self, weights_TS: Tensor | None) -> None:
        columns = self.spec.count if self.spec.gate == "router" else None
        found = None if weights_TS is None else weights_TS.shape[-1]
        if columns != found:
            raise MoEShapeError.of(
                "SharedExpertMLP",
                expected="no weights" if columns is None else f"weights [T, {columns}] of the router",
                got="none" if weights_TS is None else f"shape {tuple(weights_TS.shape)}",
                hint=f"Weights go with the gate 'router'; this layer has {self.spec.gate!r}.",
            )

    def extra_repr(self) -> str:
        """The spec, for `print(model)`."""
        return f"{self.spec.count} x {self.spec.width}, act={self.act!r}, gate={self.spec.gate!r}"
