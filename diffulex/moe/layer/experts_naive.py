"""The routed experts as a loop over tokens; imported where it is asked for, as its decorator loads Dynamo."""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.reference.moe_block import ExpertWeights, moe_block_reference


@torch.compiler.disable(reason="the naive loop reads expert ids on the host")
def run_naive(hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, *, experts: ExpertWeights) -> Tensor:
    """The experts as a loop over tokens that accumulates in fp32 (fp64 for fp64): the oracle; arguments as `run_ops`.

    hidden [T, H] and weights [T, K] floating, ids [T, K] int. Returns [T, H] in the dtype of hidden.
    """
    wide = torch.promote_types(hidden_TH.dtype, torch.float32)
    return moe_block_reference(hidden_TH, weights_TK, ids_TK, experts=experts, dtype=wide).to(hidden_TH.dtype)
