"""What a router hands on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TopKOutput(NamedTuple):
    """The choice of every token; a tuple, so that it passes through hooks, `torch.export` and collectives as it is.

    weights        [T, K], fp32 (fp64 for fp64 logits); with joint shared columns [T, K + n_shared]
    ids            [T, K] int32; those outside [0, E) choose no expert. [T, K + n_shared] alike
    router_logits  [T, E + num_null + n_shared], what the choice was made of
    """

    weights: Tensor
    ids: Tensor
    router_logits: Tensor
