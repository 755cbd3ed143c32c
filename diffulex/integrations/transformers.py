"""transformers' experts interface leads to the ops: `experts_implementation="diffulex"`, and the defaults while a graph
is captured.

`grouped_mm` and `batched_mm` keep their eager behaviour; inside `torch.compile` and `torch.export` they run the ops,
inference and training. Nothing is imported early: the hook waits until transformers' own module is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowering import ops
from lowering.after_import import after_import
from lowering.ops.cpu_experts import CpuExperts, is_plain_inference
from lowering.state import is_enabled

NAME = "diffulex"
DEVICES = frozenset({"cpu", "cuda", "meta"})  # where the ops have kernels
_MODULE = "transformers.integrations.moe"
_CAPTURED = ("grouped_mm", "batched_mm")

ExpertsForward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def diffulex_experts_forward(
    self: Any, hidden_states_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
) -> Tensor:
    """Forward of an experts module through the ops, in any form transformers declares.

    hidden_states [T, H] floating, top_k_index [T, K] int (ids outside the module's experts contribute nothing),
    top_k_weights [T, K] floating. Returns [T, H] in the dtype of hidden_states. Differentiable.
    """
    w13 = self.gate_up_proj if self.has_gate else self.up_proj
    w2, b13, b2 = self.down_proj, None, None
    if self.has_bias:
        b13, b2 = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias, self.down_proj_bias
    if self.is_transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    hidden_TH = hidden_states_TH.to(w13.dtype)  # autocast can leave the two in different dtypes
    activation = self._apply_gate if self.has_gate else self.act_fn
    finish = self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None
    if is_plain_inference(hidden_TH, w13, w2):
        experts = CpuExperts(w13, w2, b13, b2, activation, finish)
        return experts(hidden_TH, top_k_index_TK, top_k_weights_TK).to(hidden_states_TH.dtype)
    order_N, _, offsets_E1 = ops.moe_dispatch(top_k_index_TK, w13.shape[0])
    pre_NJ = ops.moe_expert_up(hidden_TH, w13, b13, order_N, offsets_E1, top_k_index_TK.shape[1])
    slots_NH = ops.moe_expert_down(activation(pre_NJ).to(w2.dtype), w2, b2, order_N, offsets_E1)
    if finish is not None:
        slots_NH = finish(slots_NH)
    return ops.moe_combine(slots_NH, top_k_weights_TK).to(hidden_states_TH.dtype)


def _is_plain(experts: Any) -> bool:
    """Whether no weight is of a subclass, as quantized ones are, that knows the stock products and none of the ops.

    Asked as Dynamo can: `is_traceable_wrapper_subclass` it takes to be false of each of its tensors.
    """
    return not any(hasattr(type(weight), "__tensor_flatten__") for weight in experts.parameters(recurse=False))


def _captured(stock: ExpertsForward) -> ExpertsForward:
    """The stock function in eager mode, on other devices and when switched off, the ops while a graph is captured."""

    @functools.wraps(stock)
    def forward(self: Any, hidden_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and is_enabled() and hidden_TH.device.type in DEVICES and _is_plain(self):
            return diffulex_experts_forward(self, hidden_TH, top_k_index_TK, top_k_weights_TK)
        return stock(self, hidden_TH, top_k_index_TK, top_k_weights_TK)

    return forward


def register(module: ModuleType) -> None:
    """Register in transformers' experts interface; `module` is `transformers.integrations.moe`."""
    functions = module.ALL_EXPERTS_FUNCTIONS
    if NAME in functions:
        return
    functions.register(NAME, diffulex_experts_forward)
    for name in _CAPTURED:
        if name in functions:
            functions.register(name, _captured(functions[name]))


def install() -> None:
    """Register now where transformers is loaded, else as soon as it is."""
    after_import(_MODULE, register)
