"""What the timed functions are given: hidden states, and expert ids with weights or router logits, by distribution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .shapes import Shape

ROUTINGS = ("uniform", "zipf", "one-hot")
SOURCES = ("topk", "logits")
_AHEAD = 30.0  # by which the logits of chosen experts lead; softmax keeps the others above zero in fp32


class Inputs(NamedTuple):
    """One input set: hidden [T, H] and weights [T, K] in the layer's dtype, ids [T, K] int64, logits [T, E] fp32.

    ids and weights are `route` of the logits.
    """

    hidden_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor

    def of(self, source: str) -> tuple[Tensor, ...]:
        """What a function takes by its source, in the dtypes above.

        (hidden [T, H], ids [T, K], weights [T, K]) for "topk", (hidden [T, H], logits [T, E]) for "logits".
        """
        if source == "topk":
            return self.hidden_TH, self.ids_TK, self.weights_TK
        return self.hidden_TH, self.logits_TE

    def rows(self, index_R: Tensor) -> Inputs:
        """The set of some of the tokens, by their index [R] int64."""
        return Inputs(*(tensor[index_R] for tensor in self))


def route(logits_TE: Tensor, top_k: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Softmax of logits [T, E] fp32 or wider, top-k, renormalised: weights [T, K] in `dtype`, ids [T, K] int64."""
    weights_TK, ids_TK = logits_TE.softmax(-1).topk(top_k, dim=-1)
    return (weights_TK / weights_TK.sum(-1, keepdim=True)).to(dtype), ids_TK


def count_of_sets(tokens: int) -> int:
    """How many input sets are rotated through, so that what one call read has left the caches when it is read again."""
    return 16 if tokens <= 8 else 4 if tokens <= 512 else 2


def draw_logits(routing: str, tokens: int, *, shape: Shape, generator: torch.Generator) -> Tensor:
    """Router logits [T, E] fp32 whose top-k follows a distribution.

    uniform  N(0, 1)
    zipf     log popularity plus Gumbel noise: top-k draws without repeats, popularity 1 / rank, experts permuted
    one-hot  the same K experts for all tokens, with N(0, 1) between them

    The generator draws permutation and choice as well, so that sets of different seeds read different experts: with the
    same ones in all sets, few experts would stay in the L2 cache.
    """
    device, size = generator.device, (tokens, shape.num_experts)
    if routing == "uniform":
        return torch.randn(size, device=device, generator=generator)
    order_E = torch.randperm(shape.num_experts, device=device, generator=generator)
    if routing == "zipf":
        popularity_E = torch.empty(shape.num_experts, device=device)
        popularity_E[order_E] = 1.0 / torch.arange(1, shape.num_experts + 1, device=device)
        waiting_TE = torch.empty(size, device=device).exponential_(generator=generator)
        return popularity_E.log() - waiting_TE.clamp_min(1e-30).log()
    logits_TE = torch.randn(size, device=device, generator=generator)
    logits_TE[:, order_E[: shape.top_k]] += _AHEAD
    return logits_TE


def make_inputs(
    shape: Shape,
    tokens: int,
    *,
    sets: int,
    routing: str = "uniform",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> list[Inputs]:
    """`sets` seeded input sets of T tokens in a dtype on a device."""
    inputs = []
    for seed in range(sets):
        generator = torch.Generator(device).manual_seed(seed)
        logits_TE = draw_logits(routing, tokens, shape=shape, generator=generator)
        weights_TK, ids_TK = route(logits_TE, shape.top_k, dtype=dtype)
        hidden_TH = torch.randn(tokens, shape.hidden, device=device, generator=generator).to(dtype)
        inputs.append(Inputs(hidden_TH, ids_TK, weights_TK, logits_TE))
    return inputs
