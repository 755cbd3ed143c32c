"""Experts modules as transformers' own experts functions see them, in every form, and those functions untouched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowering.activation import is_gated
from lowering.reference.moe_block import ExpertWeights, moe_block_reference

from .inputs import BlockForm, BlockInputs, make_block
from .oracle import random_like


def _swiglu_oai(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1.0) * (gate * torch.sigmoid(gate * 1.702))


# The activations of `lowering.activation` as a model writes them.
GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": lambda gate, up: functional.silu(gate) * up,
    "geglu": lambda gate, up: functional.gelu(gate) * up,
    "geglu_tanh": lambda gate, up: functional.gelu(gate, approximate="tanh") * up,
    "reglu": lambda gate, up: functional.relu(gate) * up,
    "swiglu_oai": _swiglu_oai,
}
UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
    "relu2": lambda pre: functional.relu(pre).square(),
}


class Experts(nn.Module):
    """The attributes transformers' experts functions read, with the weights of a `BlockForm`.

    `run` is called as they are: run(self, hidden [T, H], ids [T, K], weights [T, K]) -> [T, H].
    """

    def __init__(self, block: BlockInputs, run: Callable[..., Tensor], *, transposed: bool = False) -> None:
        super().__init__()
        self.run = run
        self.act = block.act
        self.interleaved = block.interleaved
        self.num_experts = block.w13_EJH.shape[0]
        self.has_gate = is_gated(block.act)
        self.has_bias = block.b13_EJ is not None
        self.is_transposed = transposed
        self.is_concatenated = not block.interleaved
        self.has_post_expert_norm = False
        self._is_expert_parallel = False
        self.config = SimpleNamespace(_experts_implementation="grouped_mm")
        name = "gate_up_proj" if self.has_gate else "up_proj"
        for key, weight in ((name, block.w13_EJH), ("down_proj", block.w2_EHI)):
            setattr(self, key, nn.Parameter(weight.transpose(1, 2).contiguous() if transposed else weight))
        if block.b13_EJ is not None and block.b2_EH is not None:
            setattr(self, f"{name}_bias", nn.Parameter(block.b13_EJ))
            self.down_proj_bias = nn.Parameter(block.b2_EH)

    def act_fn(self, pre_NI: Tensor) -> Tensor:
        return UNGATED[self.act](pre_NI)

    def _apply_gate(self, pre_NJ: Tensor) -> Tensor:
        if self.interleaved:
            return GATED[self.act](pre_NJ[..., ::2], pre_NJ[..., 1::2])
        gate_NI, up_NI = pre_NJ.chunk(2, dim=-1)
        return GATED[self.act](gate_NI, up_NI)

    def forward(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        # one symbol for T, as in a model, where ids and weights come from hidden
        torch._check(ids_TK.shape[0] == hidden_TH.shape[0])
        torch._check(weights_TK.shape[0] == hidden_TH.shape[0])
        return self.run(self, hidden_TH, ids_TK, weights_TK)


def stock_function(name: str) -> Callable[..., Tensor]:
    """transformers' own experts function, whatever is registered under its name."""
    from transformers.integrations import moe

    return getattr(moe, f"{name}_experts_forward")


def reference_function(self: Experts, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The per-token loop over the module's weights, in the dtype of hidden; to be called as an experts function."""
    name = "gate_up_proj" if self.has_gate else "up_proj"
    w13, w2 = getattr(self, name), self.down_proj
    return moe_block_reference(
        hidden_TH,
        weights_TK,
        ids_TK,
        experts=ExpertWeights(
            w13.transpose(1, 2) if self.is_transposed else w13,
            w2.transpose(1, 2) if self.is_transposed else w2,
            b13_EJ=getattr(self, f"{name}_bias") if self.has_bias else None,
            b2_EH=self.down_proj_bias if self.has_bias else None,
            act=self.act,
            interleaved=self.interleaved,
        ),
        dtype=hidden_TH.dtype,
    )


@dataclasses.dataclass(frozen=True)
class StockCase:
    """Stock experts, the same experts in fp64 through the per-token loop, and inputs (hidden, ids int64, weights)."""

    module: Experts
    oracle: Experts
    inputs: tuple[Tensor, Tensor, Tensor]

    @property
    def oracle_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs in fp64."""
        hidden_TH, ids_TK, weights_TK = self.inputs
        return hidden_TH.double(), ids_TK, weights_TK.double()


def make_case(form: BlockForm, run: Callable[..., Tensor] | None = None) -> StockCase:
    """The experts of a form, stock `grouped_mm` by default; ids outside are E, transformers' sentinel."""
    block = make_block(form)
    outside = (block.ids_TK < 0) | (block.ids_TK >= form.experts)
    ids_TK = torch.where(outside, form.experts, block.ids_TK).long()
    module = Experts(block, run or stock_function("grouped_mm"), transposed=form.transposed)
    module._is_expert_parallel = bool(outside.any())
    oracle = Experts(block.double(), reference_function, transposed=form.transposed)
    return StockCase(module, oracle, (block.hidden_TH, ids_TK, block.weights_TK))


def output_and_gradients(run: Callable[..., Tensor], module: Experts, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The output of `run(hidden, ids, weights)` [T, H] and gradients of a fixed weighted sum of it: for hidden, weights
    and the parameters of `module`, by name, each in its own shape and dtype.
    """
    hidden_TH, ids_TK, weights_TK = inputs
    leaves = {"hidden": hidden_TH.detach().requires_grad_(), "weights": weights_TK.detach().requires_grad_()}
    leaves |= dict(module.named_parameters())
    out_TH = run(leaves["hidden"], ids_TK, leaves["weights"])
    grad_TH = random_like(out_TH)
    found = torch.autograd.grad(out_TH, list(leaves.values()), grad_TH, allow_unused=True)
    grads = (
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves.values(), found, strict=True)
    )
    return {"output": out_TH.detach(), **dict(zip(leaves, grads, strict=True))}
