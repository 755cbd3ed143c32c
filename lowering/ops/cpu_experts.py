"""The whole expert stage on a CPU in inference, a few experts at a time: nothing of size T*K is written to memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..state import is_batch_invariant
from .cpu_gemm import Chunk, chunks, expert_products, hit_experts
from .moe_dispatch import moe_dispatch

Rows = Callable[[Tensor], Tensor]
_FEW_SLOTS = 64


def is_plain_inference(*tensors: Tensor) -> bool:
    """Whether tensors [...] of any dtype are plain ones on a CPU, and nobody wants gradients or watches the ops."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.jit.is_tracing() or is_batch_invariant():
        return False
    plain = all(tensor.is_cpu and type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    functorch: object = torch._C._functorch.peek_interpreter_stack()
    return plain and functorch is None and _get_current_dispatch_mode() is None and not torch.is_autocast_enabled("cpu")


@dataclasses.dataclass(frozen=True, eq=False)
class CpuExperts:
    """Experts of one layer: w13 [E, J, H], w2 [E, H, I] and biases [E, J], [E, H] in one floating dtype, any strides.

    activation: rows [R, J] to [R, I]. finish: rows [R, H] to [R, H] before they are weighted, None for no such step.
    """

    w13: Tensor
    w2: Tensor
    b13: Tensor | None
    b2: Tensor | None
    activation: Rows
    finish: Rows | None = None

    def __call__(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sums [T, H] in the dtype of hidden; ids outside [0, E) contribute nothing.

        hidden [T, H] in the dtype of the weights, ids [T, K] int, weights [T, K] floating. Sums are in at least fp32,
        in the order of experts.
        """
        wide = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        order_N, token_N, hit = _sorted(ids_TK, self.w13.shape[0])
        weights_N1 = weights_TK.reshape(-1, 1).index_select(0, order_N).to(wide)
        out_TH = torch.zeros_like(hidden_TH, dtype=wide)
        for first, last, experts in chunks(hit):
            token_R = token_N[first:last]
            pre_RJ = _products(hidden_TH.index_select(0, token_R), self.w13, self.b13, experts)
            rows_RH = _products(self.activation(pre_RJ).to(self.w2.dtype), self.w2, self.b2, experts)
            if self.finish is not None:
                rows_RH = self.finish(rows_RH)
            out_TH.index_add_(0, token_R, rows_RH * weights_N1[first:last])
        return out_TH.to(hidden_TH.dtype)


def _sorted(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Chunk]:
    """Slots in the order of experts, their tokens, and the experts that have some; few slots are faster in Python."""
    top_k = ids_TK.shape[1]
    if ids_TK.numel() > _FEW_SLOTS:
        order_N, token_N, offsets_E1 = moe_dispatch(ids_TK, num_experts)
        return order_N, token_N, hit_experts(offsets_E1.tolist())
    slots: dict[int, list[int]] = {}
    for slot, expert in enumerate(ids_TK.reshape(-1).tolist()):
        if 0 <= expert < num_experts:
            slots.setdefault(expert, []).append(slot)
    order: list[int] = []
    hit: Chunk = []
    for expert in sorted(slots):
        hit.append((expert, len(order), len(order) + len(slots[expert])))
        order += slots[expert]
    return torch.tensor(order, dtype=torch.int64), torch.tensor([slot // top_k for slot in order]), hit


def _products(rows_RX: Tensor, weight_EYX: Tensor, bias_EY: Tensor | None, experts: Chunk) -> Tensor:
    """Each expert's product [R, Y] of its rows [R, X]."""
    out_RY = rows_RX.new_empty(rows_RX.shape[0], weight_EYX.shape[1])
    expert_products(rows_RX, weight_EYX, bias_EY, out_RY, experts=experts)
    return out_RY
