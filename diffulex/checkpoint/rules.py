"""One name in a checkpoint <-> one part of a parameter: the vocabulary that `schemes` is written in, and its algebra.

Parameters of a MoE block: `gate.weight`, `gate.bias`, `router.*`, `w13` [E, J, H], `w2` [E, H, I], `b13` [E, J],
`b2` [E, H], `out_bias` [H], `latent_in.weight`, `latent_out.weight`, `shared_experts.*`. A rule says how one stored
tensor maps onto one of them, and `pair` turns both into views of the same shape: loading copies one way, saving the
other.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from torch import Tensor

# Rows of these belong to experts: their first dimension may be a part of the model's experts.
EXPERT_PARAMETERS = ("w13", "w2", "b13", "b2")
# Gate rows and up rows share these.
GATED_PARAMETERS = ("w13", "b13", "shared_experts.gate_up_proj.weight")
EXPERT = "{e}"
PARTS = ("gate", "up")
FORMS = ("transposed", "interleaved", "flat", "row", "null", "bank")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One name under a layer's prefix.

    key    the name; `{e}` stands for the number of an expert. Without it, a tensor of experts holds all of them,
           stacked in dimension 0
    param  the parameter it belongs to; "" for what the model's own code reads (a hash table, a norm behind the block)
    part   "gate" or "up": these rows of a parameter that has both; "": all of it
    form   how the stored tensor differs, words of:
           transposed    [in, out] instead of [out, in]
           interleaved   gate and up rows alternate
           flat          experts are folded into dimension 0: [E * rows, ...]
           row           a leading dimension of 1
           bank          shared experts one by one, [n, ...]; the parameter has them side by side, as one wide MLP
           null          null experts have rows too, behind the E real ones, which nothing reads
    """

    key: str
    param: str
    part: str = ""
    form: str = ""

    def has(self, word: str) -> bool:
        """Whether `word` is in the form."""
        return word in self.form.split()

    @property
    def of_experts(self) -> bool:
        """Whether the parameter has rows per expert."""
        return self.param in EXPERT_PARAMETERS

    @property
    def per_expert(self) -> bool:
        """Whether each expert has a stored tensor of its own."""
        return EXPERT in self.key

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """What names under the layer's prefix match; group 1 is the expert's number, where there is one."""
        return re.compile(re.escape(self.key).replace(re.escape(EXPERT), r"(\d+)"))

    def piece_shape(self, shape: tuple[int, ...], *, num_shared: int = 1) -> tuple[int, ...]:
        """Shape of what is stored for a piece of a parameter: one expert's, or a whole parameter that is not theirs."""
        if self.part:
            shape = (shape[0] // 2, *shape[1:])
        if self.has("bank"):
            down = self.param not in GATED_PARAMETERS
            shape = (shape[0], shape[1] // num_shared) if down else (shape[0] // num_shared, shape[1])
            return (num_shared, *shape)
        if self.has("transposed"):
            shape = (*shape[:-2], shape[-1], shape[-2])
        return (1, *shape) if self.has("row") else shape


def separate(tensor: Tensor, *, interleaved: bool) -> Tensor:
    """View [J, ...] as [2, J / 2, ...] of the same dtype, gate rows first, whichever way they lie."""
    half = tensor.shape[0] // 2
    return tensor.unflatten(0, (half, 2)).transpose(0, 1) if interleaved else tensor.unflatten(0, (2, half))


def pair(rule: Rule, piece: Tensor, *, stored: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of a piece of a parameter and of what is stored for it, with the same numbers in the same places.

    piece        one expert's [J, H], [H, I], [J] or [H], or a whole parameter that is not of experts; any dtype
    stored       `rule.piece_shape(piece.shape)`, any dtype
    interleaved  whether gate and up rows alternate in the parameter
    """
    if rule.has("bank"):
        return _pair_bank(rule, piece, stored)
    if rule.has("row"):
        stored = stored[0]
    if rule.has("transposed"):
        stored = stored.mT
    if rule.part:
        return separate(piece, interleaved=interleaved)[PARTS.index(rule.part)], stored
    if rule.param in GATED_PARAMETERS and rule.has("interleaved") != interleaved:
        return separate(piece, interleaved=interleaved), separate(stored, interleaved=rule.has("interleaved"))
    return piece, stored


def _pair_bank(rule: Rule, piece: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    count = stored.shape[0]
    if rule.param not in GATED_PARAMETERS:  # [H, n * I] and [n, H, I]
        return piece.unflatten(1, (count, -1)).transpose(0, 1), stored
    both = separate(piece, interleaved=False).unflatten(1, (count, -1))  # [2, n, I, H]
    if rule.part:
        return both[PARTS.index(rule.part)], stored
    return both, stored.unflatten(1, (-1, 2)).permute(2, 0, 1, 3)
