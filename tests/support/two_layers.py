"""A model of two layers of experts, for what is said of models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .experts import make_case
from .inputs import FORMS, BlockForm

FORM = FORMS["plain"].replace(dtype=torch.float32)


def interface(self: Any, *tensors: Tensor) -> Any:
    """What transformers' decorated experts do: look their function up by the name in the configuration."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS[self.config._experts_implementation](self, *tensors)


class Model(nn.Module):
    """Two layers of experts in one list; `ids` and weights are given, so that no graph needs C++."""

    def __init__(self, form: BlockForm = FORM, *, breaks: bool = False, implementation: str = "grouped_mm") -> None:
        super().__init__()
        case = make_case(form, interface)
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": make_case(form, interface).module}) for _ in range(2))
        for layer in self.layers:
            layer["experts"].config._experts_implementation = implementation
        self.breaks, self.inputs = breaks, case.inputs

    def forward(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        hidden_TH = self.layers[0]["experts"](hidden_TH, ids_TK, weights_TK)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.layers[1]["experts"](hidden_TH, ids_TK, weights_TK)
